"""``make soak``: a server under load and faults for as long as it is asked for, proven at the end to the last event.

    python -m tests.faults.soak [--minutes 60] [--seed N] [--rate LINES_A_SECOND] [--work DIRECTORY] [--kafka]

Leaves its figures in benchmarks/results/soak.json (or soak_kafka.json) if it took ten minutes or more. Exit code 3 when
an invariant did not hold; then the data stays where it is, and the seed that is printed gives the same faults again.
"""

import argparse
import contextlib
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.report import Report
from tests.faults.soak.run import Options, Outcome, Soak, say, unexplained
from tests.faults.soak.vitals import sparkline
from tests.support.faults.store_checks import SEED

KEPT_MINUTES_MIN = 10.0  # a shorter one is to see that it works


def main() -> None:
    """Run, report, and leave with 0 or 3."""
    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through every `finally`, which put back what was changed
    say(f"soak: {options.minutes:g} minutes, seed {options.seed}, in {options.work}")
    name = "soak_kafka" if options.kafka else "soak"
    kept = Report(name, "a server under load while everything around it fails: what is left of the events")
    outcome = Soak(options).run()
    with contextlib.nullcontext() if options.minutes >= KEPT_MINUTES_MIN else contextlib.chdir(options.work):
        report(outcome, kept)
    if kept.code:
        again = f"--minutes {options.minutes:g} --seed {options.seed} --rate {outcome.figures['lines/s']}"
        print(f"\nAgain: make soak ARGS='{again}{' --kafka' * options.kafka}', as root or not as now: so are the kinds")
        print(f"What is left: {options.work}; a disk.ext4 in it can be looked into with mount -o loop")
        sys.exit(kept.code)
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


def report(outcome: Outcome, kept: Report) -> None:
    """Print every figure, and keep them."""
    figures = dict(outcome.figures)
    struck, recovery_s = figures.pop("faults"), figures.pop("recovery_s")
    kept.add(**figures)
    for kind, times in struck.items():
        kept.add(**{"fault": kind, "times": times, "recovery median s": recovery_s[kind][0],
                    "recovery max s": recovery_s[kind][1]})  # fmt: skip
    for name, slope in outcome.memory.items():
        kept.add(**{
            "process": name, "MB at the end": slope.resident_bytes / 1e6, "watched s": slope.seconds,
            "MB an hour": slope.bytes_per_hour / 1e6, "without new identities": unexplained(name, slope) / 1e6,
        })  # fmt: skip
    for name, values in outcome.charts.items():
        kept.add(**{"over time": name, "chart": sparkline(values), "max": max(values, default=0.0)})
    for problem in outcome.problems:
        kept.check(problem, False)
    compared = "sums and balances agree, no rebuild was made" if figures.get("rebuilt") == "no" else \
        "sums, balances and a rebuild agree"  # fmt: skip
    kept.check(f"every invariant holds: nothing lost, doubled or made up; {compared}", not outcome.problems)
    kept.finish()


if __name__ == "__main__":
    main()
