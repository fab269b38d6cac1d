"""The reconciliation report: differences with their causes, quantities and money; and the careful reading of one event.

``Report`` contains a ``Check`` for each comparison, and each ``Difference`` has one ``Cause`` from a closed list.
``Findings`` groups single events into differences. ``Worth`` computes what they are worth in units and cents.
``read_line`` and ``changes`` compare one log line with one stored row.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any

import msgspec
import xxhash

from aggregator.decode.columns import awkward_numbers
from meters.aggregation import amount_of, exact_sum, is_summable
from meters.catalogue.catalogue import Catalogue
from meters.errors import Reason, Refusal
from meters.event import USER, Event, check_line, event_id, identity, parse_uuid4, place_key
from meters.event_values import Facts, facts
from meters.exact import EXACT, amount_text, decode_tokens
from meters.filters import matches
from meters.log import LATEST_US
from meters.meter import Meter
from meters.tariff import unit_amounts
from meters.timestamps import instant_of

# One event: what its log line says, what its stored row says, and how the two differ.
#
# ``meters.event``, which also validates events at the gateway, reads the line; no code that fills the store is
# involved. The contribution of an event is the reference evaluation of each meter over it.

_METADATA = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Reading(msgspec.Struct, frozen=True):
    """A line that can be counted, as the store should have it."""

    event: Event
    organization_id: str
    external_id: str
    ingested_at: datetime
    raw: bytes

    @property
    def facts(self) -> Facts:
        """What meters see of it."""
        return facts(self.event, self.ingested_at)

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"{self.external_id} ({event_id(*self.identity)})"

    @property
    def identity(self) -> tuple[int, int]:
        """What it is counted once by."""
        has_place = self.event.external_id is None
        return identity(self.organization_id, place_key(self.external_id) if has_place else self.external_id)

    def identity_in(self, row: Mapping[str, Any]) -> tuple[int, int]:
        """The identity that its stored row should have: earlier versions made a place's as that of an external id."""
        former = identity(self.organization_id, self.external_id)
        return former if (row["id_hi"], row["id_lo"]) == former else self.identity


def read_line(raw: bytes, tenant: str | None, ingested_us: int, place: str) -> Reading | Refusal:
    """A line of the log. ``place`` is its identity when the sender gave none."""
    if ingested_us >= LATEST_US:
        return Reason.RECORD_TIME.at(0)
    if tenant is not None:
        named = parse_uuid4(tenant)
        if not isinstance(named, str):  # a producer that skips the gateway, or a damaged disk
            return Reason.ORGANIZATION_UNKNOWN.at(0, "organization_id", input=tenant)
        tenant = named
    if b"\n" in raw:
        return Reason.RECORD_LINES.at(0)
    event = check_line(raw, organization_id=tenant, now=instant_of(ingested_us))
    if isinstance(event, Refusal):
        return event
    external_id = event.external_id if event.external_id is not None else place
    return Reading(event, tenant or event.organization_id or "", external_id, instant_of(ingested_us), raw)


def facts_of_row(row: Mapping[str, Any]) -> Facts:
    """What meters see of a stored row (a row of the question ``at``)."""
    who = {"external_customer_id" if row["kind"] == "external" else "customer_id": row["who"]}
    event = Event(name=row["name"], metadata=_METADATA(row["metadata"]), timestamp=_aware(row["timestamp"]), **who)
    return facts(event, _aware(row["ingested_at"]), row["source"])


def row_name(row: Mapping[str, Any]) -> str:
    """What a person calls a stored row."""
    return f"{row['external_id']} ({event_id(row['id_hi'], row['id_lo'])})"


def changes(reading: Reading, row: Mapping[str, Any]) -> list[str]:
    """What a stored row says otherwise than its line, one sentence each; empty where it says the same."""
    event = reading.event
    external = event.external_customer_id is not None
    expected = {
        "organization_id": reading.organization_id,
        "customer": event.external_customer_id if external else event.customer_id,
        "name": event.name,
        "timestamp": event.timestamp or reading.ingested_at,
        "ingested_at": reading.ingested_at,
        "external_id": reading.external_id,
        "parent_id": event.parent_id,
        "member_id": event.member_id,
        "external_member_id": event.external_member_id,
        "source": USER,
        "id": reading.identity_in(row),
        "content hash": xxhash.xxh3_64_intdigest(reading.raw),
        "exact numbers": _exact(awkward_numbers(event.metadata)),
    }
    stored = {
        "organization_id": row["organization_id"],
        "customer": row["who"] if row["kind"] == ("external" if external else "customer") else None,
        "name": row["name"],
        "timestamp": _aware(row["timestamp"]),
        "ingested_at": _aware(row["ingested_at"]),
        "external_id": row["external_id"],
        "parent_id": row["parent"],
        "member_id": row["member_id"],
        "external_member_id": row["external_member_id"],
        "source": row["source"],
        "id": (row["id_hi"], row["id_lo"]),
        "content hash": row["content"],
        "exact numbers": _exact(row["awkward"]),
    }
    expected |= {f"metadata.{key}": value for key, value in _tokens(event.metadata).items()}
    stored |= {f"metadata.{key}": value for key, value in _tokens(_METADATA(row["metadata"])).items()}
    return [
        f"{key}: the log says {_shown(expected.get(key))}, the store has {_shown(stored.get(key))}"
        for key in dict.fromkeys([*expected, *stored]) if expected.get(key) != stored.get(key)
    ]  # fmt: skip


def is_repetition(reading: Reading, first: Reading) -> bool:
    """Whether a later line with the same id says what the first one said; a line without a time repeats any."""
    ours, theirs = reading.event, first.event
    fields = ("name", "customer_id", "external_customer_id", "parent_id", "member_id", "external_member_id")
    same_time = ours.timestamp is None or reading.facts.timestamp == first.facts.timestamp
    same = all(getattr(ours, field) == getattr(theirs, field) for field in fields)
    return same and same_time and _tokens(ours.metadata) == _tokens(theirs.metadata)


def contributions(meters: Iterable[Meter], found: Facts) -> dict[str, Decimal]:
    """What the event adds to each meter that can be added to, by the meter's id."""
    added: dict[str, Decimal] = {}
    for meter in meters:
        if not is_summable(meter.aggregation) or not matches(meter.filter, found):
            continue
        if meter.aggregation.func == "count":
            added[meter.id] = Decimal(1)
        elif (amount := amount_of(found, meter.aggregation.property or "")) is not None:
            added[meter.id] = amount
    return added


def _tokens(metadata: Mapping[str, msgspec.Raw]) -> dict[str, Any]:
    """Values with numbers as they were sent: 1.0, 1.00 and "1.0" are told apart, as the store does."""
    return {key: decode_tokens(bytes(raw)) for key, raw in metadata.items()}


def _exact(awkward: str | None) -> Any:
    return json.loads(awkward) if awkward else None


def _shown(value: object) -> str:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%dT%H:%M:%S.%fZ}"
    return "nothing" if value is None else repr(value)


def _aware(instant: datetime) -> datetime:
    return instant.replace(tzinfo=UTC)


# The report. Pure.
#
# Two causes explain a difference, since nothing is missing or wrong: the rounding of doubles, and a total that covers
# another range by definition. Such differences are listed, but an installation that has no others counts as equal.

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
    def is_unpriced(self) -> bool:
        """Whether quantities are at stake and no price of them is known."""
        return bool(self.quantities) and self.cents is None

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
    def cents(self) -> Decimal | None:
        """Money at stake, without signs, as far as prices are known; None where none of them is."""
        known = [difference.cents.copy_abs() for difference in self.differences if difference.cents is not None]
        return None if self.unpriced and not known else exact_sum(known)

    @property
    def unpriced(self) -> int:
        """The number of differences whose quantities have a price that is not known."""
        return sum(difference.is_unpriced for difference in self.differences)


def signed(amount: Decimal) -> str:
    """A quantity that was moved, with its sign."""
    text = amount_text(amount)
    return text if text.startswith("-") else f"+{text}"


def report_json(report: Report) -> bytes:
    """The report for a program, with the verdict beside it. Decimals are texts, so that no reader bends them."""
    verdict = {"equal": report.is_equal, "failed": report.has_failed, "cents": report.cents}
    return msgspec.json.encode({**verdict, **msgspec.to_builtins(report, builtin_types=(datetime, Decimal))})


# Quantities and money. Pure.

Quantities = dict[str, Decimal]
"""By the meter's id: several meters may have one name."""


class Worth:
    """Meters and prices as the control stream has them."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._cents = {
            meter.id: amounts.pop()
            for meter in catalogue.meters.values()
            if len(amounts := unit_amounts(catalogue, meter)) == 1
        }
        meters = catalogue.meters.values()
        self._in_use = Counter((meter.organization_id, meter.name) for meter in meters if meter.archived_at is None)

    def meters(self, organization_id: str) -> list[Meter]:
        """The organization's meters that are in use."""
        return [meter for meter in self._catalogue.meters_of(organization_id) if meter.archived_at is None]

    def of(self, organization_id: str, found: Facts) -> Quantities:
        """What an event adds to the organization's meters."""
        return contributions(self.meters(organization_id), found)

    def named(self, quantities: Mapping[str, Decimal]) -> dict[str, Decimal]:
        """Quantities as a person reads them: by the meter's name, with its id where another one in use is called so."""
        return {self._name(id): amount for id, amount in quantities.items()}

    def _name(self, meter_id: str) -> str:
        meter = self._catalogue.meters.get(meter_id)
        if meter is None:
            return meter_id
        others = self._in_use[meter.organization_id, meter.name] - (meter.archived_at is None)
        return f"{meter.name} ({meter_id})" if others else meter.name

    def cents(self, quantities: Mapping[str, Decimal]) -> Decimal | None:
        """What quantities cost by their meters' unit prices, credits and caps aside; None where no price is known.

        A meter for which products have several prices has no price that is known: a difference of many customers does
        not say which of them pay what.
        """
        parts = [EXACT.multiply(self._cents[id], amount) for id, amount in quantities.items() if id in self._cents]
        if not parts:
            return None
        return exact_sum(parts).quantize(Decimal("0.01"), context=EXACT)


def add(totals: Quantities, more: Mapping[str, Decimal], sign: int = 1) -> None:
    """Add quantities to others, in place."""
    for id, amount in more.items():
        totals[id] = EXACT.add(totals.get(id, Decimal(0)), amount if sign > 0 else amount.copy_negate())


def between(there: Mapping[str, Decimal], here: Mapping[str, Decimal]) -> Quantities:
    """What one side has more than the other, without zeros."""
    totals = dict(there)
    add(totals, here, -1)
    return {id: amount for id, amount in totals.items() if amount}


# Grouping: single findings of one cause, hour and organization become one difference. Pure.
#
# An hour of lost events is one line of the report instead of a hundred thousand; a single event is named.

_HOUR = timedelta(hours=1)
_Key = tuple[Cause, int, datetime, str]


class _Group:
    def __init__(self) -> None:
        self.count = 0
        self.events: list[str] = []
        self.details: list[str] = []
        self.quantities: dict[str, Decimal] = {}


class Findings:
    """What differs between the log and the store, event by event."""

    def __init__(self) -> None:
        self._groups: dict[_Key, _Group] = {}

    def note(
        self, cause: Cause, partition: int, when: datetime, organization_id: str, event: str,
        quantities: Mapping[str, Decimal], detail: str = "",
    ) -> None:  # fmt: skip
        """One event. ``when`` is its ingestion (naive means UTC), ``quantities`` are store minus log."""
        hour = (when if when.tzinfo else when.replace(tzinfo=UTC)).replace(minute=0, second=0, microsecond=0)
        group = self._groups.setdefault((cause, partition, hour, organization_id), _Group())
        group.count += 1
        add(group.quantities, quantities)
        if len(group.events) < SHOWN_EVENTS_MAX:
            group.events.append(event)
            if detail and detail not in group.details:
                group.details.append(detail)

    def differences(self, worth: Worth) -> Iterator[Difference]:
        """Everything noted, in order of time."""
        for key, group in sorted(self._groups.items(), key=lambda item: (item[0][2], item[0][1], item[0][0])):
            cause, partition, hour, _ = key
            window = f"partition {partition}, {hour:%Y-%m-%d %H}:00 UTC"
            yield Difference(
                check="log",
                cause=cause,
                where=f"event {group.events[0]}" if group.count == 1 else window,
                what="; ".join(group.details) or MEANING[cause],
                repair=Repair.REBUILD,
                count=group.count,
                window=(hour, hour + _HOUR),
                events=group.events,
                quantities=worth.named({id: amount for id, amount in group.quantities.items() if amount}),
                cents=worth.cents(group.quantities),
            )
