"""What a reconciliation found: how much was compared, what differs, why, what it is worth, and what to do. Pure.

A difference has one cause from a closed list. Two causes explain a difference away, since nothing is missing and
nobody erred: the last digits of doubles, and a total that speaks of another range by definition. They are listed like
all others, but an installation that has no others counts as equal.
"""

from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any

import msgspec

from meters.aggregation import exact_sum
from meters.amount import amount_text

SHOWN_EVENTS_MAX = 20
"""Events that a difference names. Its count and its quantities speak of all of them."""

DIFFERENCES_MAX = 1_000
"""Differences of a check that a report lists: a person reads the first page, and a repair does not need the list. As
many explained ones beside them, which may be as many as there are balances and must not crowd out the others."""


class Cause(StrEnum):
    """Why two numbers differ."""

    LOST = "lost"  # one side has it, the other one never got it
    DOUBLED = "doubled"  # counted twice
    CHANGED = "changed"  # both sides have it, and it does not say the same
    UNFOUNDED = "unfounded"  # counted, and no line of the log says so
    LATE = "late"  # on its way, or counted in another period
    ROUNDING = "rounding"  # the same amounts, added as doubles there
    FILTER_SEMANTICS = "filter semantics"  # the same events, and the filter is read differently there
    CONFLICT = "conflict"  # one id, two contents, and the sides hold different ones
    OUTSIDE_THE_RANGE = "outside the range"  # a total there speaks of all time, here of the range
    UNKNOWN = "unknown"


EXPLAINED = frozenset({Cause.ROUNDING, Cause.OUTSIDE_THE_RANGE})

MEANING = {
    Cause.LOST: "It was taken, and is missing on one side.",
    Cause.DOUBLED: "It is counted more than once.",
    Cause.CHANGED: "Both sides have it, with different content.",
    Cause.UNFOUNDED: "It is counted, but the log holds no such line.",
    Cause.LATE: "It has not arrived yet, or it arrived in another period.",
    Cause.ROUNDING: "The same amounts, added with the limited digits of doubles on the other side.",
    Cause.FILTER_SEMANTICS: "The same events, but the other side reads the meter's filter differently.",
    Cause.CONFLICT: "One id was used for two different contents; each side counted another one.",
    Cause.OUTSIDE_THE_RANGE: "The other side's total speaks of all time, ours of the range.",
    Cause.UNKNOWN: "No rule explains it; look at the events named.",
}


class Repair(StrEnum):
    """What mends a difference."""

    REBUILD = "rebuild the store"  # the view is wrong, the log is right
    RESTART = "restart the aggregator"  # what it keeps in memory is counted anew
    SEND = "send again"  # an upstream lacks events; their ids make a repetition harmless
    CORRECT = "correct upstream"  # an upstream has too much; an event takes it back
    WAIT = "wait"  # on its way
    DECIDE = "decide"  # a person has to
    NOTHING = "nothing"


class Counted(msgspec.Struct, frozen=True):
    """One thing that was compared: how many of it, and whether both sides agreed."""

    what: str
    compared: int
    different: int = 0
    here: str = ""
    there: str = ""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One difference, down to the event or the window. Quantities are by meter, with a sign: there minus here."""

    check: str
    cause: Cause
    where: str
    what: str
    repair: Repair
    count: int = 1
    window: tuple[datetime, datetime] | None = None
    events: list[str] = []
    quantities: dict[str, Decimal] = {}
    cents: Decimal | None = None
    payload: dict[str, Any] = {}  # what a repair needs, or the doubt that keeps it from being done

    @property
    def is_explained(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.cause in EXPLAINED

    @property
    def moved(self) -> str:
        """The quantities in one line, for a person."""
        return ", ".join(f"{name} {signed(amount)}" for name, amount in self.quantities.items())


class Bucket(msgspec.Struct, frozen=True):
    """One hour of one partition of the log: its lines by what became of them, and a checksum of each side."""

    partition: int
    hour: datetime
    lines: int
    stored: int
    duplicates: int
    dead: int
    log_checksum: str
    store_checksum: str


class Check(msgspec.Struct, kw_only=True):
    """One comparison: ``name`` is log, store, ledger or upstream.

    ``skipped`` says why it did not take place: ``has_failed`` because it could not, otherwise because nobody set it up.
    """

    name: str
    sides: str
    skipped: str = ""
    has_failed: bool = False
    counted: list[Counted] = []
    differences: list[Difference] = []
    differences_count: int = 0
    explained_count: int = 0  # of these
    buckets: list[Bucket] = []
    notes: list[str] = []
    seconds: float = 0.0

    def add(self, difference: Difference) -> None:
        """Take in a difference; those beyond DIFFERENCES_MAX are only counted."""
        self.differences_count += 1
        self.explained_count += difference.is_explained
        of_its_kind = self.explained_count if difference.is_explained else self.unexplained_count
        if of_its_kind <= DIFFERENCES_MAX:
            self.differences.append(difference)

    @property
    def unexplained_count(self) -> int:
        """Differences with which something is wrong."""
        return self.differences_count - self.explained_count


class Done(msgspec.Struct, frozen=True):
    """What a repair does or did, in a sentence, and to how many things."""

    repair: Repair
    what: str
    count: int = 0


class Report(msgspec.Struct, kw_only=True):
    """The whole. ``as_of`` are positions of the log up to which the two sides were compared."""

    made_at: datetime
    as_of: str
    since: datetime | None
    until: datetime | None
    checks: list[Check]
    plan: list[Done] = []
    done: list[Done] = []
    mended: list[Difference] = []  # what was found before the repair; ``checks`` are from after it

    @property
    def differences(self) -> list[Difference]:
        """Those of all checks."""
        return [difference for check in self.checks for difference in check.differences]

    @property
    def is_equal(self) -> bool:
        """Whether nothing is wrong: no difference, or only explained ones."""
        return not any(check.unexplained_count for check in self.checks)

    @property
    def has_failed(self) -> bool:
        """Whether anything could not be compared."""
        return any(check.has_failed for check in self.checks)

    @property
    def verdict(self) -> str:
        """The outcome in a sentence without its full stop, which claims nothing of what was not compared."""
        left_out = [check for check in self.checks if check.skipped]
        if len(left_out) == len(self.checks):
            return "Nothing was compared"
        if not self.is_equal:
            return "There are differences"
        if not left_out:
            return "Everything agrees"
        names = " and ".join("Polar" if check.name == "upstream" else f"the {check.name}" for check in left_out)
        return f"Everything that was compared agrees; {names} was not compared"

    @property
    def cents(self) -> Decimal:
        """Money at stake, without signs, as far as prices are known."""
        return exact_sum(difference.cents.copy_abs() for difference in self.differences if difference.cents)


def signed(amount: Decimal) -> str:
    """A quantity that was moved, with its sign."""
    text = amount_text(amount)
    return text if text.startswith("-") else f"+{text}"


def report_json(report: Report) -> bytes:
    """The report for a program, with the verdict beside it. Decimals are texts, so that no reader bends them."""
    verdict = {"equal": report.is_equal, "failed": report.has_failed, "cents": report.cents}
    return msgspec.json.encode({**verdict, **msgspec.to_builtins(report, builtin_types=(datetime, Decimal))})
