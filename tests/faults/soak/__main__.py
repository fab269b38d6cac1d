"""``make soak``: a server under load and faults for as long as it is asked for, proven at the end to the last event.

    python -m tests.faults.soak [--minutes 60] [--seed N] [--rate LINES_A_SECOND] [--work DIRECTORY] [--kafka]

Leaves its figures in benchmarks/results/soak.json. Exit code 3 when an invariant did not hold; then the data stays
where it is, and the seed that is printed gives the same faults again.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.report import RESULTS, environment
from tests.faults.evidence import SEED
from tests.faults.soak.run import Options, Outcome, Soak, say, unexplained
from tests.faults.soak.vitals import sparkline


def main() -> None:
    """Run, report, and leave with 0 or 3."""
    options = read_options()
    say(f"soak: {options.minutes:g} minutes, seed {options.seed}, in {options.work}")
    outcome = Soak(options).run()
    report(outcome)
    if outcome.problems:
        print(f"\nAgain: make soak ARGS='--minutes {options.minutes:g} --seed {options.seed}'")
        print(f"What is left: {options.work}; a disk.ext4 in it can be looked into with mount -o loop")
        sys.exit(3)
    shutil.rmtree(options.work, ignore_errors=True)


def read_options() -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--rate", type=int, default=None, help="lines a second; 70 %% of what was measured by default")
    parser.add_argument("--work", type=Path, default=None, help="where everything is kept; a new temporary directory")
    parser.add_argument("--kafka", action="store_true", help="over a Kafka broker, which is killed and stopped too")
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="meterstream-soak-"))
    return Options(given.minutes, given.seed, given.rate, work, given.kafka)


def report(outcome: Outcome) -> None:
    """Print every figure, and keep them."""
    print()
    for name, value in outcome.figures.items():
        print(f"{name:18} {json.dumps(value)}")
    for name, values in outcome.charts.items():
        print(f"{name:18} {sparkline(values)} max {max(values, default=0):,.0f}{'' if '/' in name else ' MB'}")
    memory = {}
    for name, slope in outcome.memory.items():
        memory[name] = slope._asdict() | {"unexplained_bytes_per_hour": unexplained(name, slope)}
        print(
            f"{name:18} {slope.resident_bytes / 1e6:,.0f} MB at the end; {slope.bytes_per_hour / 1e6:+,.1f} MB an hour "
            f"over {slope.seconds:.0f} s, {unexplained(name, slope) / 1e6:+,.1f} without the identities of new events"
        )
    where = environment() | {"command": " ".join(["python -m tests.faults.soak", *sys.argv[1:]])}
    found = {"benchmark": "soak", "environment": where, **outcome.figures, "memory": memory}
    found |= {"charts": outcome.charts, "problems": outcome.problems}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "soak.json").write_text(json.dumps(found, indent=2) + "\n")
    print("\n".join(outcome.problems) or "every invariant held")


if __name__ == "__main__":
    main()
