"""All benchmarks, one after the other: ``make bench``. Each prints its table and writes its results as JSON.

    python -m benchmarks [NAME ...] [--quick]
"""

import argparse
import subprocess
import sys

FULL = {
    "admission": [],
    "passthrough": [],
    "accept": ["--seconds", "5"],
    "log_append": [],
    "drain": ["--events", "2000000"],
    "end_to_end": ["--seconds", "30"],
    "shapes": [],
    "reconcile": ["--events", "2000000"],
    "balances": [],
    "client": [],
    "kafka": [],
}
QUICK = {"accept": ["--seconds", "1"], "drain": ["--events", "200000"], "end_to_end": ["--seconds", "5"],
         "shapes": ["--events", "50000", "--history", "100000"], "reconcile": ["--events", "200000"],
         "client": ["--events", "20000", "--seconds", "2"], "kafka": ["--seconds", "1", "--events", "100000"]}


def main() -> None:
    """Run them; the exit code is the worst of theirs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="which ones; all by default")
    parser.add_argument("--quick", action="store_true", help="short runs, to see that they work")
    arguments = parser.parse_args()
    chosen = QUICK if arguments.quick else FULL
    worst = 0
    if unknown := set(arguments.names) - set(FULL):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(FULL)}")
    for name in arguments.names or chosen:
        result = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *chosen.get(name, [])], check=False)
        worst = max(worst, result.returncode)
    sys.exit(worst)


if __name__ == "__main__":
    main()
