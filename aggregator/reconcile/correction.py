"""Events that take back what Polar counts too much, where nothing can be removed. Pure.

What takes an event back is the same event with its summed numbers negated, so it is truthful only where sums alone
count that event: a meter that counts events, averages or compares them would move the wrong way. It names what it takes
back by a digest of it, so that the next comparison knows it, and its id is made of the same digest, so that sending it
again changes nothing.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import msgspec
import xxhash

from aggregator.reconcile.pairing import Seen
from meters.aggregation import amount_of, considers, exact_sum
from meters.facts import Facts, Number
from meters.filter import matches
from meters.meter import Meter

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
        metadata = _negated(metadata, path.split("."))
    mark = mark_of(event)
    metadata = {**metadata, MARK: mark}
    opposite = msgspec.structs.replace(event.facts, metadata=metadata)
    if not all(_cancels(meter, event.facts, opposite) for meter in meters):
        return None
    return _encode({
        "name": event.name, "timestamp": event.timestamp, "external_customer_id": event.who,
        "external_id": f"takes-back/{mark}/{number}", "metadata": _plain(metadata),
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


def _plain(value: Any) -> Any:
    """As JSON, numbers with their own digits."""
    if isinstance(value, Number):
        return msgspec.Raw(value.token.encode())
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, dict) else value
