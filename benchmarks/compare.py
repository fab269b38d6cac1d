"""Compare the speed of two checkouts, measured in turns on one machine: ``make bench BASE=<commit>``.

A host's speed drifts by more than most changes cost, from one second to the next. So both checkouts run at the same
time and take short turns, eight in a round, in an order that favors neither side. A goal's value in a round is the
median of the four turns of a side, and its ratio compares these two values. Half of the way all processes start anew:
one may stay slower than another one of the same code as long as it lives.

"Here" is the working tree, "base" is the commit. Both are copied into a scratch directory that is removed at the end
(``checkouts``), and each is measured by its own benchmarks (``turns``).

    python -m benchmarks.compare COMMIT [--rounds N] [--only ingest,drain] [--kafka] [--json FILE] [--quick]
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from benchmarks.checkouts import Checkout, FailedError, checkouts
from benchmarks.page import shown
from benchmarks.report import environment

WORSE, FAILED, INTERRUPTED = 1, 2, 130  # exit codes
TOLERANCE = 0.05
ROUNDS = 8
STOP_S_MAX = 60.0  # a server writes a checkpoint when it stops
GOAL_WIDTH = 36

Figures = Mapping[str, float]


class Group(NamedTuple):
    """Goals that are measured together. The last two are estimates for both checkouts, for the time that is left."""

    title: str
    seconds: float  # of one stretch of load
    size: int  # events of a backlog, or customers
    start_s: float
    round_s: float


GROUPS = {
    "ingest": Group("one gateway alone, embedded log", 0.2, 0, 10, 13),
    "drain": Group("a backlog, embedded log", 0, 100_000, 9, 9),
    "end_to_end": Group("from a POST to a number", 1, 0, 12, 20),
    "freshness": Group("from a POST to a number, at a fixed rate", 1, 0, 12, 11),
    "balances": Group("reads of a million customer meters", 0.3, 100_000, 25, 23),
}
KAFKA = {"kafka": Group("over a real broker", 1, 100_000, 40, 40)}
QUICK_SECONDS, QUICK_SIZE = 0.1, 2_000  # a comparison that only shows that everything works


class Row(NamedTuple):
    """One goal of both checkouts. A ratio above 1 means that this checkout is better than the base."""

    goal: str
    base: list[float]
    here: list[float]
    ratios: list[float]

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def verdict(self) -> str:
        """``same`` within the tolerance; beyond it ``worse`` or ``better``, or ``noise`` if the ratios disagree."""
        if abs(self.ratio - 1) <= TOLERANCE:
            return "same"
        if min(self.ratios) <= 1 <= max(self.ratios):
            return "noise"
        return "worse" if self.ratio < 1 else "better"


def order(number: int) -> tuple[int, ...]:
    """Return the sides in the order of their turns in a round. A steady drift of the machine weighs on both alike."""
    return (0, 1, 1, 0, 1, 0, 0, 1) if number % 2 == 0 else (1, 0, 0, 1, 0, 1, 1, 0)


def medians(turns: Sequence[Figures]) -> dict[str, float]:
    """The median of each goal over some turns."""
    return {goal: statistics.median(turn[goal] for turn in turns) for goal in turns[0]}


def compared(rounds: Iterable[tuple[Figures, Figures]]) -> list[Row]:
    """Pair each goal's values round by round; a value that is missing or zero on one side has no ratio."""
    rows = []
    for goal in dict.fromkeys(goal for _, here in rounds for goal in here):
        pairs = [(base[goal], here[goal]) for base, here in rounds if base.get(goal) and here.get(goal)]
        if pairs:
            bases, heres = ([pair[side] for pair in pairs] for side in (0, 1))
            rows.append(Row(goal, bases, heres, [_ratio(goal, *pair) for pair in pairs]))
    return rows


def _ratio(goal: str, base: float, here: float) -> float:
    return here / base if goal.endswith("/s") else base / here


def table(rows: Iterable[Row]) -> str:
    """A line for each goal, at most 80 columns wide; a long name goes on in the next line."""
    lines = []
    for row in rows:
        first, *rest = textwrap.wrap(row.goal, GOAL_WIDTH - 1)
        spread = f"{_times(min(row.ratios))}..{_times(max(row.ratios))}"
        values = f"{shown(statistics.median(row.base)):>9}{shown(statistics.median(row.here)):>10}"
        lines += [f"{first:<{GOAL_WIDTH}}{values}{_times(row.ratio):>6}{spread:>12} {row.verdict}"]
        lines += [f"  {more}" for more in rest]
    return "\n".join(lines)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def report(base: str, found: Mapping[str, Sequence[Row]]) -> str:
    """The tables of all groups, with how to read them above."""
    head = f"{'':<{GOAL_WIDTH}}{'base':>9}{'here':>10}{'ratio':>6}{'spread':>12}"
    parts = [
        f"Base is {base}, here is the working tree. Values are medians of the rounds.\n"
        "A ratio above 1 means that here is better: more in a second, or less time.\n"
        "The ratio is the median of the rounds' ratios, the spread their least and\n"
        f"largest. Within {TOLERANCE:.0%} is \"same\"; beyond that \"worse\" or \"better\", or \"noise\"\n"
        "if the spread includes 1.",
    ]
    for group, rows in found.items():
        rounds = max(len(row.ratios) for row in rows)
        parts.append(f"{group}: {(GROUPS | KAFKA)[group].title}; rounds: {rounds}\n{head}\n{table(rows)}")
    worse = [f"\n  {group}: {row.goal}" for group, rows in found.items() for row in rows if row.verdict == "worse"]
    parts.append(f"Worse: {len(worse)}{''.join(worse)}")
    return "\n\n".join(parts)


class Worker:
    """A checkout's process that measures one group."""

    def __init__(self, checkout: Checkout, group: str, asked: Group) -> None:
        self._name = f"{group} of {checkout.name}"
        self._log = checkout.work / f"{group}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [checkout.python, "-m", "benchmarks.turns", group, "--seconds", str(asked.seconds),
                 "--size", str(asked.size)],
                cwd=checkout.work, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:
            if kind is None:
                self._end()
            else:
                self._stop()

    def ready(self) -> list[str]:
        """Wait until everything is prepared, and return the names of its turns. Raises FailedError."""
        names: list[str] = json.loads(self._answer())
        return names

    def turn(self, name: str) -> dict[str, float]:
        """Measure once. Raises FailedError."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer says more
            self._process.stdin.write(f"{name}\n")
            self._process.stdin.flush()
        figures: dict[str, float] = json.loads(self._answer())
        return figures

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure(self._process.wait())
        return line

    def _end(self) -> None:
        """Let it check its numbers. Raises FailedError."""
        self._process.communicate()
        if self._process.returncode:
            raise self._failure(self._process.returncode)

    def _stop(self) -> None:
        """End it and the processes of its group; it stops its servers itself."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self._process.pid, how)
                self._process.communicate(timeout=STOP_S_MAX)
                return

    def _failure(self, code: int) -> FailedError:
        printed = self._log.read_text(errors="replace").strip()[-2000:]
        return FailedError(f"{self._name} ended with exit code {code}:\n{printed}", code if code > WORSE else FAILED)


class Disturbance:
    """Processor time that this comparison did not get, from the beginning on."""

    def __init__(self) -> None:
        self._before = _processors_s()

    def __str__(self) -> str:
        """Meant for the end, when every process of the comparison has been waited for."""
        passed, busy, stolen = (now - before for now, before in zip(_processors_s(), self._before, strict=True))
        others, host = max(busy, 0) / passed, stolen / passed
        return f"Other programs took {others:.0%} of the processors' time, the host kept {host:.0%}."


def _processors_s() -> tuple[float, float, float]:
    """Seconds of all processors: in all, busy for other processes than ours, and stolen by the host (proc(5))."""
    ticks = [int(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    passed, idle, stolen = (part / os.sysconf("SC_CLK_TCK") for part in (sum(ticks), ticks[3] + ticks[4], ticks[7]))
    return passed, passed - idle - stolen - sum(os.times()[:4]), stolen


class Progress:
    """Lines about what runs, with the time that is left by the estimates and by what the run took so far."""

    def __init__(self, groups: Mapping[str, Group], rounds: int) -> None:
        starts = len(_stretches(rounds))
        self._planned_s = sum(group.start_s * starts + group.round_s * rounds for group in groups.values())
        self._began_s, self._done_s = time.monotonic(), 0.0

    def say(self, what: str) -> None:
        """Print what begins now."""
        pace = (time.monotonic() - self._began_s) / self._done_s if self._done_s else 1.0
        left_min = (self._planned_s - self._done_s) * pace / 60
        print(f"{what}; about {left_min:.0f} min left", file=sys.stderr, flush=True)

    def done(self, planned_s: float) -> None:
        """Count a part as finished."""
        self._done_s += planned_s


Rounds = list[tuple[Figures, Figures]]  # of base and here


def measure(pair: Sequence[Checkout], groups: Mapping[str, Group], rounds: int, found: dict[str, Rounds]) -> None:
    """Add each group's rounds to ``found``: of every group the first half, then the second half. Raises FailedError."""
    progress = Progress(groups, rounds)
    for numbers in _stretches(rounds):
        for name, group in groups.items():
            progress.say(f"{name}: starting")
            with contextlib.ExitStack() as running:
                workers = [running.enter_context(Worker(checkout, name, group)) for checkout in pair]
                base, here = (worker.ready() for worker in workers)
                turns = [turn for turn in here if turn in base]
                progress.done(group.start_s)
                for number in numbers:
                    progress.say(f"{name}: round {number + 1} of {rounds}")
                    found.setdefault(name, []).append(_round(workers, turns, order(number)))
                    progress.done(group.round_s)


def _stretches(rounds: int) -> list[range]:
    """The rounds of the first start and those of the second."""
    half = (rounds + 1) // 2
    return [numbers for numbers in (range(half), range(half, rounds)) if numbers]


def _round(workers: Sequence[Worker], names: Iterable[str], sides: Sequence[int]) -> tuple[Figures, Figures]:
    """Figures of base and here. Both take turns of one kind before the next kind begins."""
    base: dict[str, float] = {}
    here: dict[str, float] = {}
    for name in names:
        taken = [(side, workers[side].turn(name)) for side in sides]
        base |= medians([figures for side, figures in taken if side == 0])
        here |= medians([figures for side, figures in taken if side == 1])
    return base, here


def main() -> None:
    """Compare; exit 1 when a goal is worse, 2 when something failed, 3 when a number was wrong."""
    arguments = _arguments()
    groups, rounds = _chosen(arguments), 1 if arguments.quick else arguments.rounds
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    where, disturbance = environment(), Disturbance()
    figures: dict[str, Rounds] = {}
    is_interrupted = False
    try:
        with checkouts(Path(__file__).resolve().parent.parent, arguments.base) as pair:
            measure(pair, groups, rounds, figures)
    except FailedError as failed:
        print(failed, file=sys.stderr)
        sys.exit(failed.code)
    except KeyboardInterrupt:  # the rounds until then are shown
        is_interrupted = True
    found = {name: rows for name, both in figures.items() if (rows := compared(both))}
    print(f"{report(arguments.base, found)}\n\n{disturbance}")
    if arguments.json:
        groups_rows = {name: [{**row._asdict(), "ratio": row.ratio, "verdict": row.verdict} for row in rows]
                       for name, rows in found.items()}  # fmt: skip
        content = {"base": arguments.base, "environment": where, "disturbance": str(disturbance), "groups": groups_rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    is_worse = any(row.verdict == "worse" for rows in found.values() for row in rows)
    sys.exit(INTERRUPTED if is_interrupted else WORSE if is_worse and not arguments.quick else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="a commit")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"{ROUNDS} by default")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {','.join(GROUPS)}")
    parser.add_argument("--kafka", action="store_true", help="measure over a real broker, too")
    parser.add_argument("--json", type=Path, help="a file for every value and ratio")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")
    arguments = parser.parse_args()
    if unknown := set(arguments.only or ()) - set(GROUPS):
        parser.error(f"no goals are called {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    if arguments.rounds < 1:
        parser.error("at least one round is needed")
    return arguments


def _chosen(arguments: argparse.Namespace) -> dict[str, Group]:
    """The groups that were asked for, with short stretches for a quick comparison."""
    names = [name for name in GROUPS if name in (arguments.only or GROUPS)] + ["kafka"] * arguments.kafka
    groups = {name: (GROUPS | KAFKA)[name] for name in names}
    if not arguments.quick:
        return groups
    return {name: group._replace(seconds=QUICK_SECONDS, size=QUICK_SIZE) for name, group in groups.items()}


if __name__ == "__main__":
    main()
