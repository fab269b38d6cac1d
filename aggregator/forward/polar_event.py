"""An event of the feed as Polar takes it. Pure: bytes in, bytes out.

Polar wants ``_cost.amount`` with at most 12 decimals and the counts of ``_llm`` as whole numbers, and drops keys that
it does not know; here amounts are rounded when they are counted and keep the digits they came with. So what is sent is
what was counted. Everything else goes on as it is; what Polar does not take, it says itself.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from aggregator.forward.planner import Item
from aggregator.place import FeedPlace
from meters.amount import amount_text, parse_amount
from meters.facts import RESERVED, number_token
from meters.timestamp import microseconds_of

ROLLUP_NAME = "meterstream.rollup"
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder(decimal_format="number").encode


class Entry(msgspec.Struct):
    """One item of the feed; the event is looked into for its customer alone."""

    place: str
    ingested_at: datetime
    event: msgspec.Raw


class _Seen(msgspec.Struct):
    timestamp: datetime
    external_id: str
    metadata: msgspec.Raw
    external_customer_id: str | None = None
    customer_id: str | None = None


class Group(msgspec.Struct):
    """One item of a rollup."""

    meter_id: str
    window: datetime
    count: int
    sum: msgspec.Raw
    external_customer_id: str | None = None
    customer_id: str | None = None


_see = msgspec.json.Decoder(_Seen).decode


def item_of(entry: Entry, lane: str) -> Item:
    """What the forwarder needs to know of an event, and its bytes for Polar."""
    seen = _see(entry.event)
    partition, offset, line = map(int, entry.place.split(":"))
    return Item(
        lane=lane, external_id=seen.external_id, who=_who(seen), timestamp_us=microseconds_of(seen.timestamp),
        ingested_us=microseconds_of(entry.ingested_at), body=_within_limits(bytes(entry.event), bytes(seen.metadata)),
        partition=partition, offset=offset, line=line,
    )  # fmt: skip


def piece_at(position: Mapping[int, FeedPlace]) -> str:
    """The name of the piece of the log that begins there. A line is named only where it is not a record's first."""
    places = [(partition, *(place if place[1] else place[:1])) for partition, place in sorted(position.items())]
    return ",".join(":".join(map(str, place)) for place in places) or "0"


def rollup_item(group: Group, aggregation: str, window_s: int, piece: str, now_us: int) -> Item:
    """The event that carries what a customer used of a meter in a window, as far as one piece of the log has it.

    Its id names window and piece, so that sending it again is a duplicate and a late event goes into another one.
    """
    by_id, by_name = {"customer_id": group.customer_id}, {"external_customer_id": group.external_customer_id}
    customer = by_name if group.customer_id is None else by_id
    stamp = group.window.isoformat().replace("+00:00", "Z")
    external_id = f"rollup/{group.meter_id}/{window_s}/{stamp}/{piece}/{_who(group)}"
    value = msgspec.Raw(str(group.count).encode()) if aggregation == "count" else group.sum
    metadata = {"meter": group.meter_id, "value": value, "events": group.count, "seconds": window_s}
    body = {"name": ROLLUP_NAME, "timestamp": stamp, "external_id": external_id, **customer, "metadata": metadata}
    return Item(
        lane="rollup", external_id=external_id, who=_who(group), timestamp_us=microseconds_of(group.window),
        ingested_us=now_us, body=_encode(body),
    )  # fmt: skip


def _who(seen: _Seen | Group) -> str:
    """A customer's name with its kind, so that an id is never taken for an external id."""
    return f"c:{seen.customer_id}" if seen.external_customer_id is None else f"e:{seen.external_customer_id}"


def _within_limits(event: bytes, metadata: bytes) -> bytes:
    if b'"_' not in metadata:
        return event
    fields: dict[str, Any] = dict(_fields(metadata))
    for key in RESERVED.keys() & fields.keys():
        fields[key] = _reserved(key, fields[key])
    return _encode({**_fields(event), "metadata": fields})


def _reserved(key: str, raw: msgspec.Raw) -> dict[str, Any]:
    known, numbers = RESERVED[key]
    values: dict[str, Any] = {name: value for name, value in _fields(raw).items() if name in known}
    for name in numbers & values.keys():
        amount = parse_amount(number_token(bytes(values[name])))
        if amount is None:
            continue  # cannot have been counted
        text = amount_text(amount)
        values[name] = text if key == "_cost" else msgspec.Raw(text.encode())  # as text no double comes between
    return values
