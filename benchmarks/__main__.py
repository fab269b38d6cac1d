"""All benchmarks, one after the other, and then the page: ``make bench``.

Each prints its tables, checks its numbers and writes them as JSON. ``--quick`` is to see that everything works: short
runs in a scratch directory, whose numbers mean nothing and are not kept. ``--long`` has the runs that take an hour.

    python -m benchmarks [NAME ...] [--quick | --long]
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.page import PAGE

FULL = {
    "admission": [],
    "passthrough": [],
    "log_append": ["--seconds", "2"],
    "accept": ["--seconds", "4.5"],
    "drain": ["--events", "1000000"],
    "end_to_end": ["--seconds", "30"],
    "freshness": ["--seconds", "10"],
    "shapes": ["--events", "300000"],
    "history": ["--sizes", "500000", "3000000", "--seconds", "8"],
    "reconcile": ["--events", "1000000"],
    "balances": ["--seconds", "5"],
    "client": [],
    "kafka": ["--seconds", "4.5", "--events", "300000"],
}
LONG = {
    **FULL,
    "end_to_end": ["--seconds", "60"],
    "history": ["--sizes", "1000000", "10000000", "50000000", "--customers", "100000"],
    "reconcile": ["--events", "10000000"],
    "kafka": ["--seconds", "10", "--events", "1000000", "--end-to-end-seconds", "60"],
}
QUICK = {
    "admission": ["--repeat", "1"],
    "passthrough": ["--requests", "200"],
    "log_append": ["--seconds", "0.2"],
    "accept": ["--seconds", "1.5"],
    "drain": ["--events", "50000"],
    "end_to_end": ["--seconds", "2"],
    "freshness": ["--seconds", "1"],
    "shapes": ["--events", "20000"],
    "history": ["--sizes", "20000", "200000", "--seconds", "1"],
    "reconcile": ["--events", "50000"],
    "balances": ["--seconds", "1", "--customers", "5000"],
    "client": ["--events", "10000", "--seconds", "1"],
    "kafka": ["--seconds", "1.5", "--events", "50000", "--end-to-end-seconds", "1.5"],
}


def run(chosen: dict[str, list[str]], names: list[str], directory: Path) -> int:
    """Run them in a directory, then make the page there; the exit code is the worst of theirs."""
    worst = 0
    for name in [*names, "page"]:
        began_s = time.monotonic()
        command = [sys.executable, "-m", f"benchmarks.{name}", *chosen.get(name, [])]
        code = subprocess.run(command, check=False, cwd=directory).returncode
        print(f"{name}: {time.monotonic() - began_s:.0f} s{f', exit code {code}' if code else ''}", flush=True)
        worst = max(worst, abs(code))
    return worst


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="which ones; all by default")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="short runs, to see that they work; nothing is kept")
    length.add_argument("--long", action="store_true", help="50 million events, and a minute of load at a time")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(FULL):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(FULL)}")
    names, repository = arguments.names or list(FULL), Path(__file__).parent.parent
    if not arguments.quick:
        sys.exit(run(LONG if arguments.long else FULL, names, repository))
    with tempfile.TemporaryDirectory(prefix="meterstream-bench-") as scratch:
        shutil.copytree(repository / PAGE.parent / "results", Path(scratch) / PAGE.parent / "results")
        shutil.copy(repository / PAGE, Path(scratch) / PAGE)
        sys.exit(run(QUICK, names, Path(scratch)))


if __name__ == "__main__":
    main()
