"""Pair our events with Polar's, and build the events that correct what Polar counts too much. Pure.

``pair`` matches the events of both sides and returns a ``Pair`` with a cause for each that differs. ``takes_back``
builds a correcting event. ``billing`` and ``analytics`` are Polar's two other readings of a meter's filter.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from operator import ge, gt, le, lt
from typing import Any, NamedTuple

import msgspec
import xxhash

from aggregator.reconcile.report import Cause
from meters.aggregation import amount_of, considers, evaluate, exact_sum
from meters.event import USER
from meters.event_values import RESERVED, TIMESTAMP, Facts, Number, is_built_in, lookup, steps
from meters.exact import parse_amount
from meters.filters import Clause, Filter, Operator, Scalar, holds, matches
from meters.meter import Meter
from meters.timestamps import EPOCH

# Polar's other readings of a filter.
#
# Quantities and balances use one reading, which is also ours (``meters.filters``). Polar's invoices are computed by
# another program, with the plain comparisons of its language; event lists and cost metrics read a copy with typed
# columns. For mixed types the three disagree, and an invoice may count what a balance does not. These functions tell
# such a difference from a lost event.

Reading = Callable[[Filter, Facts], bool]

_ORDER = {Operator.GT: gt, Operator.GTE: ge, Operator.LT: lt, Operator.LTE: le}


def billing(filter: Filter, facts: Facts) -> bool:
    """Whether an invoice would count the event: true is 1, a number is never a text, other types are not ordered."""
    return matches(filter, facts, _billing_holds)


def analytics(filter: Filter, facts: Facts) -> bool:
    """Whether an event list would show the event: what is no string reads as "", what is no number as 0."""
    return matches(filter, facts, _analytics_holds)


OTHERS: dict[str, Reading] = {"invoices": billing, "event lists": analytics}


def value(meter: Meter, events: Iterable[Facts], reading: Reading = matches) -> Decimal:
    """The meter's value over events, its filter read in the way given."""
    taken = [facts for facts in events if reading(meter.filter, facts) and considers(meter.aggregation, facts)]
    return evaluate(meter.aggregation, taken)


def _billing_holds(clause: Clause, facts: Facts) -> bool:
    if clause.property == TIMESTAMP:
        whole = (facts.timestamp - EPOCH).total_seconds() // 1
        stored: Any = Decimal(int(whole))
    elif is_built_in(clause.property):
        return holds(clause, facts)
    else:
        stored = _plain(lookup(facts.metadata, clause.property))
    if clause.operator is Operator.EXISTS:
        return (stored is not None) is clause.value
    if stored is None:
        return False
    values = clause.value if isinstance(clause.value, list) else [clause.value]
    operator = Operator.EQ if clause.operator is Operator.IN else clause.operator
    return any(_compare(operator, stored, one) for one in values)


def _compare(operator: Operator, stored: Any, value: Scalar) -> bool:
    if operator in (Operator.LIKE, Operator.NOT_LIKE):
        return (str(value) in str(stored)) is (operator is Operator.LIKE)
    if operator is Operator.EQ:
        return bool(stored == value)
    if operator is Operator.NE:
        return bool(stored != value)
    try:
        return bool(_ORDER[operator](stored, value))
    except TypeError:
        return False


def _analytics_holds(clause: Clause, facts: Facts) -> bool:
    if is_built_in(clause.property) or clause.operator is Operator.EXISTS:
        return holds(clause, facts)
    stored = _plain(lookup(facts.metadata, clause.property))
    values = clause.value if isinstance(clause.value, list) else [clause.value]
    operator = Operator.EQ if clause.operator is Operator.IN else clause.operator
    return any(_compare(operator, _column(operator, stored, one), one) for one in values)


def _column(operator: Operator, stored: Any, value: Scalar) -> Any:
    """The column that the copy reads: a string, or else a number."""
    if isinstance(value, str) or operator in (Operator.LIKE, Operator.NOT_LIKE):
        return stored if isinstance(stored, str) else ""
    if isinstance(stored, str):
        return _number_in(stored)
    return stored if isinstance(stored, Decimal) else Decimal(0)


def _number_in(text: str) -> Decimal:
    try:
        return parse_amount(text) or Decimal(0)
    except ValueError:
        return Decimal(0)


def _plain(stored: Any) -> Any:
    return stored.amount if isinstance(stored, Number) else stored


# Pairing.
#
# Polar shows neither the id that an event was sent with nor its time of arrival. So an event is identified by its
# content: name, customer, time and metadata, with numbers compared as the doubles that Polar keeps. Events left over
# on both sides are then paired again with fewer and fewer common fields; the missing field gives the cause.

class Seen(NamedTuple):
    """An event as one side shows it. ``external_id``, ``ingested_at`` and ``place`` are known on our side alone.

    ``has_parent``: it belongs to another event, without which Polar does not list it.
    """

    name: str
    timestamp: datetime
    who: str
    content: str
    facts: Facts
    external_id: str = ""
    ingested_at: datetime | None = None
    place: str = ""
    is_named: bool = True  # ``who`` is an external id
    has_parent: bool = False

    @property
    def label(self) -> str:
        """What a person calls it."""
        known = f"{self.external_id}: " if self.external_id else ""
        return f"{known}{self.name} of {self.who}, {self.timestamp:%Y-%m-%d %H:%M:%S} UTC"


class Pair(NamedTuple):
    """Something that differs: ours, theirs, or two events that were meant to be one."""

    cause: Cause
    ours: Seen | None
    theirs: Seen | None


def seen(event: dict[str, Any], ingested_at: datetime | None = None, place: str = "") -> Seen:
    """An event of the feed or of an event list, decoded with exact decimals."""
    external, by_id = event.get("external_customer_id"), event.get("customer_id")
    who = str(external if external is not None else by_id)
    timestamp = datetime.fromisoformat(event["timestamp"])
    metadata = event.get("metadata") or {}
    found = Facts(
        name=event["name"], timestamp=timestamp, metadata={key: _value(key, value) for key, value in metadata.items()},
        external_customer_id=who, source=event.get("source", USER),
    )  # fmt: skip
    content = json.dumps({key: _loose(key, value) for key, value in metadata.items()}, sort_keys=True, default=str)
    external_id = event.get("external_id") or ""
    return Seen(
        event["name"], timestamp, who, content, found, external_id, ingested_at, place, external is not None,
        bool(event.get("parent_id")),
    )  # fmt: skip


def pair(ours: Sequence[Seen], theirs: Sequence[Seen]) -> list[Pair]:
    """Everything that is not on both sides alike, each with its cause."""
    missing, extra = _left_over(ours, theirs), _left_over(theirs, ours)
    pairs: list[Pair] = []
    moved = _match(missing, extra, lambda event: (event.name, event.who, event.content))
    pairs += [Pair(Cause.LATE, mine, other) for mine, other in moved]
    altered = _match(missing, extra, lambda event: (event.name, event.who, event.timestamp))
    pairs += [Pair(Cause.CHANGED, mine, other) for mine, other in altered]
    another = _match(missing, extra, lambda event: (event.name, event.timestamp, event.content))
    pairs += [Pair(Cause.CHANGED, mine, other) for mine, other in another]  # it counts for another customer
    pairs += [Pair(Cause.LOST, mine, None) for mine in missing]
    here = {key_of(event) for event in ours}
    pairs += [Pair(Cause.DOUBLED if key_of(other) in here else Cause.UNFOUNDED, None, other) for other in extra]
    return pairs


def key_of(event: Seen) -> tuple[Any, ...]:
    """What an event is known by."""
    return event.name, event.timestamp, event.who, event.content


def _left_over(events: Iterable[Seen], others: Iterable[Seen]) -> list[Seen]:
    there = Counter(key_of(event) for event in others)
    left = []
    for event in events:
        if there[key_of(event)]:
            there[key_of(event)] -= 1
        else:
            left.append(event)
    return left


def _match(missing: list[Seen], extra: list[Seen], key: Any) -> list[tuple[Seen, Seen]]:
    """Pairs with the same key; both lists lose them."""
    waiting: defaultdict[Any, list[Seen]] = defaultdict(list)
    for event in extra:
        waiting[key(event)].append(event)
    pairs, unpaired = [], []
    for event in missing:
        if waiting[key(event)]:
            pairs.append((event, waiting[key(event)].pop(0)))
        else:
            unpaired.append(event)
    missing[:] = unpaired
    extra[:] = [event for events in waiting.values() for event in events]
    return pairs


def _value(key: str, value: Any) -> Any:
    """As ``meters.event_values`` reads it: reserved numbers may come as text."""
    if isinstance(value, dict):
        known, numbers = RESERVED.get(key, (frozenset(), frozenset()))
        return {name: _number(inner, name in numbers) for name, inner in value.items() if name in known}
    return _number(value, False)


def _number(value: Any, in_text: bool) -> Any:
    if isinstance(value, bool) or not (isinstance(value, int | Decimal) or (in_text and isinstance(value, str))):
        return value
    token = str(value)
    amount = parse_amount(token)
    return value if amount is None else Number(token, amount)


def _loose(key: str, value: Any) -> Any:
    """The value as a double would have it, and as the forwarder sends it: a reserved object has its known keys alone,
    those that say something, with numbers of twelve decimals."""
    if isinstance(value, dict):
        known, numbers = RESERVED.get(key, (value.keys(), frozenset()))
        return {
            name: _double(_rounded(inner)) if name in numbers else inner
            for name, inner in value.items() if name in known and inner is not None
        }  # fmt: skip
    return value if isinstance(value, bool | str) else _double(value)


def _rounded(value: Any) -> Any:
    amount = parse_amount(str(value))
    return value if amount is None else amount


def _double(value: Any) -> Any:
    try:
        return repr(float(value))
    except (TypeError, ValueError):
        return value


# Corrections: Polar cannot delete an event, so a second event takes it back.
#
# The correcting event is the same event with its summed numbers negated. It is correct only if sums alone count the
# event: meters that count events, average or compare them would move the wrong way. It names the original by a
# digest, so that the next comparison recognizes it. Its id is made of the same digest, so sending it again has no
# effect.

MARK = "meterstream_takes_back"
METADATA_KEYS_MAX = 50  # of an event at Polar
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.encode


def mark_of(event: Seen) -> str:
    """What an event is called by the one that takes it back."""
    said = event.name, event.timestamp.isoformat(), event.who, event.content
    return xxhash.xxh3_128_hexdigest(repr(said).encode())


def settled(events: Sequence[Seen]) -> tuple[list[Seen], Counter[str]]:
    """The events without those that were taken back and what takes them back; how many were, by mark."""
    marks = Counter(str(event.facts.metadata[MARK]) for event in events if MARK in event.facts.metadata)
    if not marks:
        return list(events), marks
    taken_back = marks & Counter(mark_of(event) for event in events)
    left, pending = [], {True: Counter(taken_back), False: Counter(taken_back)}
    for event in events:
        takes = MARK in event.facts.metadata
        mark = str(event.facts.metadata[MARK]) if takes else mark_of(event)
        if pending[takes][mark]:
            pending[takes][mark] -= 1
        else:
            left.append(event)
    return left, taken_back


def takes_back(event: Seen, meters: Iterable[Meter], number: int) -> bytes | None:
    """The event that takes one back, as it is sent; None where none can.

    ``meters`` are all that may count the event over there; ``number`` tells further ones of the same content apart.
    """
    meters = list(meters)
    counting = [meter for meter in meters if _counts(meter, event.facts)]
    if not counting or len(event.facts.metadata) >= METADATA_KEYS_MAX:
        return None
    metadata = event.facts.metadata
    for path in {meter.aggregation.property or "" for meter in counting}:
        metadata = _negated(metadata, steps(path))
    mark = mark_of(event)
    metadata = {**metadata, MARK: mark}
    opposite = msgspec.structs.replace(event.facts, metadata=metadata)
    if not all(_cancels(meter, event.facts, opposite) for meter in meters):
        return None
    return _encode({
        "name": event.name, "timestamp": event.timestamp, "external_customer_id": event.who,
        "external_id": f"takes-back/{mark}/{number}", "metadata": _as_json(metadata),
    })  # fmt: skip


def instead(body: bytes) -> bytes:
    """The body of an event, to be sent in the place of one that was taken back: under another id, always the same."""
    fields = _fields(body)
    external_id = msgspec.json.decode(fields["external_id"], type=str)
    return _encode({**fields, "external_id": f"instead/{external_id}"})


def _counts(meter: Meter, facts: Facts) -> bool:
    return matches(meter.filter, facts) and considers(meter.aggregation, facts)


def _cancels(meter: Meter, one: Facts, opposite: Facts) -> bool:
    if not _counts(meter, one):
        return not _counts(meter, opposite)
    if meter.aggregation.func != "sum" or not _counts(meter, opposite):
        return False
    amounts = [amount_of(facts, meter.aggregation.property or "") for facts in (one, opposite)]
    return exact_sum(amount or Decimal(0) for amount in amounts) == 0


def _negated(value: Any, path: Sequence[str]) -> Any:
    """The value with the number at the path negated."""
    if not path and isinstance(value, Number):
        token = value.token.removeprefix("-") if value.token.startswith("-") else f"-{value.token}"
        return Number(token, value.amount.copy_negate())
    if path and isinstance(value, dict) and path[0] in value:
        return {**value, path[0]: _negated(value[path[0]], path[1:])}
    return value


def _as_json(value: Any) -> Any:
    """As JSON, numbers with their own digits."""
    if isinstance(value, Number):
        return msgspec.Raw(value.token.encode())
    return {key: _as_json(inner) for key, inner in value.items()} if isinstance(value, dict) else value
