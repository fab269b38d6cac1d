"""What a benchmark leaves behind: a table for people, JSON for the next run, and where and how it was measured."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
_LIBRARIES = ("duckdb", "pyarrow", "numpy", "msgspec", "uvicorn", "xxhash")


def environment() -> dict[str, Any]:
    """Machine, versions, commit and command."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
    )
    return {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "commit": commit.stdout.strip(),
        "command": " ".join(["python -m", Path(sys.argv[0]).stem, *sys.argv[1:]]),
    }


class Report:
    """Rows of one benchmark, printed as they come and written as JSON at the end."""

    def __init__(self, name: str, question: str) -> None:
        self._name, self._console = name, Console(width=140)
        self._rows: list[dict[str, Any]] = []
        self._console.print(f"[bold]{name}[/bold]: {question}")

    def add(self, **row: Any) -> None:
        """One measured row."""
        self._rows.append(row)

    def finish(self) -> None:
        """Print the table and write the results."""
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        table = Table(*columns, title=self._name)
        for row in self._rows:
            table.add_row(*(_text(row.get(name)) for name in columns))
        self._console.print(table)
        RESULTS.mkdir(exist_ok=True)
        found = {"benchmark": self._name, "environment": environment(), "rows": self._rows}
        (RESULTS / f"{self._name}.json").write_text(json.dumps(found, indent=2, default=str) + "\n")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
