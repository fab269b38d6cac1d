"""What was aimed for, beside what was measured, as rows of the page. A goal that is missed stays in the table, and one
that a shorter run says nothing about is called that."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Rows = Sequence[Mapping[str, Any]]


class Goal(NamedTuple):
    """A value from the rows of one result; it is reached from the bound on: up to it, or from it upward.

    ``value`` raises IndexError where the run was not the one that the goal is about. What is not ``given`` in the rows,
    such as the load that a latency is about, leaves the goal missed whatever the value.
    """

    what: str | Callable[[Rows], str]
    result: str
    value: Callable[[Rows], float]
    bound: float
    at_least: bool = False
    given: Callable[[Rows], bool] = lambda rows: True

    def reached(self, found: float) -> bool:
        """Whether the value keeps to the bound."""
        return found >= self.bound if self.at_least else found <= self.bound


def of(column: str, **where: Any) -> Callable[[Rows], float]:
    """The column in the last of the rows that are so. Raises IndexError when there is none."""
    return lambda rows: float(
        [row[column] for row in rows if column in row and where.items() <= row.items()][-1]
    )


def kept(column: str) -> Callable[[Rows], float]:
    """The column of the last row that has it in the largest before. Raises IndexError for less than two."""
    def ratio(rows: Rows) -> float:
        found = [row[column] for row in rows if column in row]
        return float(found[-1] / sorted(found[:-1])[-1])

    return ratio


def most(column: str) -> Callable[[Rows], float]:
    """The largest of the column. Raises IndexError when no row has it."""
    return lambda rows: float(sorted(row[column] for row in rows if column in row)[-1])


def share(column: str, of_column: str) -> Callable[[Rows], float]:
    """The last of a column in the last of another one. Raises IndexError when one of them is not there."""
    return lambda rows: of(column)(rows) / of(of_column)(rows)


def sized(column: str, least: int, value: Callable[[Rows], float]) -> Callable[[Rows], float]:
    """The value of a run that was at least so large. Raises IndexError for a smaller one."""
    def found(rows: Rows) -> float:
        if max(row.get(column, 0) for row in rows) < least:
            raise IndexError(f"a run with {column} of {least} or more")
        return value(rows)

    return found


def lasting(what: str) -> Callable[[Rows], str]:
    """The title of a goal for a minute, with how long the run lasted where its rows say so."""
    def title(rows: Rows) -> str:
        return f"{what}; over {_seconds(rows):g} s" if _seconds(rows) else what

    return title


def sustained(rows: Rows) -> bool:
    """Whether the run lasted for a minute."""
    return _seconds(rows) >= 60


def _seconds(rows: Rows) -> float:
    return min((float(row["seconds"]) for row in rows if "seconds" in row), default=0.0)


def balance(what: str) -> Callable[[Rows], float]:
    """The slowest of a hundred reads at half load; beside less where a run had no more."""
    return lambda rows: of("p99_ms", what=what, beside=_beside(rows))(rows)


def _beside(rows: Rows) -> str:
    return "half load" if any(row.get("beside") == "half load" for row in rows) else "streaming"


def drained_from(log: str) -> Callable[[Rows], float]:
    """Events a second from a backlog in a log of this kind."""
    return of("events/s", log=log, server="meterstream")


AT = "at 100,000/s"  # a phase that is named after what was asked for
ALMOST = 95_000  # events a second that are nearly what was asked for
BESIDE = {"half load": "half load", "streaming": "5,000 events/s"}
LONG = 50_000_000  # events of the history that the goals are about: ``make bench ARGS=--long``

GOALS = (
    Goal(lasting("end to end for 60 s, embedded, events/s"), "end_to_end", of("events/s", phase="full speed"), 200_000,
         True, sustained),
    Goal("longest time without an acknowledgement, ms", "end_to_end", most("longest stall ms"), 1000),
    Goal("freshness p99 at 100,000 events/s, ms", "freshness", of("fresh p99 ms", phase=AT), 200,
         given=lambda rows: of("events/s", phase=AT)(rows) >= ALMOST),
    Goal(lasting("end to end for 60 s over Kafka, events/s"), "kafka_end_to_end", of("events/s", phase="full speed"),
         100_000, True, sustained),
    Goal("taken by a core, 100 events a body, events/s", "accept",
         of("events/CPU s", **{"server": "meterstream", "gateways": 1, "events a body": 100}), 400_000, True),
    Goal("taken by a core, single events, requests/s", "accept",
         of("events/CPU s", **{"server": "meterstream", "gateways": 1, "events a body": 1}), 25_000, True),
    Goal("times an endpoint that writes rows into SQLite, 100 events a body", "accept",
         of("times usual per CPU", **{"gateways": 1, "events a body": 100}), 15, True),
    Goal("times the usual stack with a Kafka send per event, 100 events a body, embedded log", "kafka_accept",
         of("times usual per CPU", **{"server": "meterstream, embedded log", "events a body": 100}), 15, True),
    Goal("the same over Kafka, per core", "kafka_accept",
         of("times usual per CPU", **{"server": "meterstream", "gateways": 1, "events a body": 100}), 10, True),
    Goal("a backlog over Kafka, in the speed of the embedded log's", "kafka_drain",
         lambda rows: drained_from("kafka")(rows) / drained_from("embedded")(rows), 0.75, True),
    Goal("1,000 meters, CPU time in that of ten", "shapes",
         of("times ordinary", shape="1,000 meters, each of one model"), 3),
    Goal("speed at 50 million events in the best of shorter histories", "history",
         sized("stored", LONG, kept("full speed/s")), 0.8, True),
    Goal("resident memory of the aggregator at 50 million events, MB", "history",
         sized("stored", LONG, of("resident MB")), 2048),
    Goal("the same at its peak, MB", "history", sized("stored", LONG, of("peak MB")), 2048),
    Goal("a month by the day at 50 million events, idle, p99, ms", "history",
         sized("stored", LONG, of("month idle p99 ms")), 50),
    Goal(lambda rows: f"a balance at {BESIDE[_beside(rows)]}, p99, ms", "balances", balance("one balance"), 2),
    Goal("the same without a gateway between, ms", "balances", balance("one balance, no gateway between"), 2),
    Goal("one customer's total at half load, p99, ms", "end_to_end", of("read p99 ms", phase="half load"), 5),
    Goal("the same without a gateway between, ms", "end_to_end",
         of("without gateway p99 ms", phase="half load"), 5),
    Goal("ten million events reconciled with store and log, s", "reconcile",
         sized("log", 10_000_000, lambda rows: float(rows[0]["wall s"] * 1e7 / rows[0]["log"])), 120),
    Goal("memory of that, MB", "reconcile", sized("log", 10_000_000, of("peak MB")), 1000),
    Goal("killed and started again, to the first event taken, ms", "history", of("restart to taken ms"), 1000),
    Goal("50 million events, caught up after a start, in the best of shorter histories", "history",
         sized("stored", LONG, kept("drained/s")), 0.8, True),
    Goal("50 million events, the store made again, in the speed of catching up", "history",
         sized("stored", LONG, share("rebuild/s", "drained/s")), 0.8, True),
)  # fmt: skip


def rows(results: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each goal whose result is there."""
    for goal in GOALS:
        if goal.result in results:
            bound = f"{'at least' if goal.at_least else 'at most'} {goal.bound:,g}"
            found = results[goal.result]["rows"]
            what = goal.what if isinstance(goal.what, str) else goal.what(found)
            yield {"goal": what, "wanted": bound, **_judged(goal, found)}


def _judged(goal: Goal, found: Rows) -> dict[str, Any]:
    try:
        value = goal.value(found)
    except IndexError:
        return {"measured": "", "reached": "not measured"}
    return {"measured": value, "reached": "yes" if goal.reached(value) and goal.given(found) else "no"}
