"""One event, read with care: what a line of the log says, what a row of the store says, and what lies between them.

The line is read by ``meters.event``, the same definition that refuses events at the door; nothing of the code that
fills the store takes part. What an event is worth is the reference evaluation of each meter over it.
"""

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgspec
import xxhash

from aggregator.awkward import awkward_numbers
from meters.aggregation import amount_of, is_summable
from meters.event import Event, check_line, event_id, identity, parse_uuid4
from meters.exact_json import decode_tokens
from meters.facts import Facts, facts
from meters.filter import matches
from meters.log import LATEST_US
from meters.meter import Meter
from meters.refusal import Reason, Refusal
from meters.timestamp import instant_of

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
        return f"{self.external_id} ({event_id(*identity(self.organization_id, self.external_id))})"


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
        "id": identity(reading.organization_id, reading.external_id),
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
