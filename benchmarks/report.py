"""What a benchmark leaves behind: a table for people, JSON for the page, and where and how it was measured.

The JSON goes under the directory that the benchmark was started in, which is the repository for a measurement and a
scratch directory for a trial. ``checks`` are what the run proved of its own numbers.
"""

import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.page import RESULTS, refresh, shown

WRONG = 3  # the exit code when what was counted is not what was acknowledged
_LIBRARIES = ("duckdb", "pyarrow", "numpy", "msgspec", "uvicorn", "xxhash", "confluent-kafka", "fastapi", "pydantic",
              "aiokafka")
_PRODUCT = (":/meters", ":/ingest", ":/aggregator", ":/deploy")  # from the top of the repository
_HERE = Path(__file__).parent


def environment() -> dict[str, Any]:
    """Machine, versions, commit and command. ``load`` is how many processes wanted a core in the last minute."""
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())
    return {
        "at": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "cpus": os.cpu_count(),
        "cpu": model,
        "memory GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "commit": _commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def _commit() -> str:
    """The commit, with a plus where files of the product differ from it."""
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_HERE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    changed = git("status", "--porcelain", "--untracked-files=no", "--", *_PRODUCT)
    return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")


def _processor_ticks() -> tuple[int, int]:
    """What all processors did since the machine began: ticks the host gave to other machines, and all ticks."""
    ticks = [int(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[7], sum(ticks)


class Report:
    """Rows of one benchmark, printed and written as JSON at the end."""

    def __init__(self, name: str, question: str) -> None:
        self._name, self._question, self._console = name, question, Console(width=160)
        self._rows: list[dict[str, Any]] = []
        self._checks: dict[str, bool] = {}
        self._environment = environment()  # of the beginning, before this run loads the machine
        self._ticks = _processor_ticks()
        self._console.print(f"[bold]{name}[/bold]: {question}")

    def add(self, **row: Any) -> None:
        """One measured row."""
        self._rows.append(row)

    def check(self, what: str, right: bool) -> None:
        """A statement about the numbers, and whether it held."""
        self._checks[what] = right

    @property
    def code(self) -> int:
        """The exit code: 0, or WRONG when a check failed."""
        return 0 if all(self._checks.values()) else WRONG

    def finish(self) -> None:
        """Print the tables and the checks, write the results, and bring the page up to date."""
        for columns, rows in itertools.groupby(self._rows, key=tuple):  # rows of one kind are a table
            table = Table(*columns)
            for row in rows:
                table.add_row(*map(shown, row.values()))
            self._console.print(table)
        for what, right in self._checks.items():
            self._console.print(f"{'right' if right else '[red]WRONG[/red]'}: {what}")
        self._environment["stolen %"] = self._stolen_percent()
        RESULTS.mkdir(exist_ok=True, parents=True)
        found = {"benchmark": self._name, "question": self._question, "environment": self._environment,
                 "checks": self._checks, "rows": self._rows}
        (RESULTS / f"{self._name}.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
        refresh()

    def _stolen_percent(self) -> float:
        """How much of the processors' time the host kept from this machine meanwhile: most of a slow hour's cause."""
        stolen, ticks = (now - before for now, before in zip(_processor_ticks(), self._ticks, strict=True))
        return round(100 * stolen / max(ticks, 1), 1)
