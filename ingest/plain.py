"""Which events of a body are plain beyond doubt, by looking at all of them at once.

Nearly every event is plain: fields of the expected types, an ISO timestamp, a known customer. C code checks types and
limits in one pass. What types cannot tell is told by counting bytes over the whole body: if there are exactly as many
opening brackets as the parsed events need, then nothing is nested and no key with an object is given twice; if the
reserved objects have exactly as many colons as parsed keys, then no key in them is given twice or unknown.

Whatever is not proven plain is a suspect, for ``meters.event`` to read with care. This module refuses nothing. It is
narrower than the careful reading in everything, and wider in nothing: a property test holds the two together.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from meters.catalogue import Catalogue
from meters.refusal import NAME_LENGTH_MAX, STRING_LENGTH_MAX

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)  # stands for "not given": never in the future

Text = Annotated[str, Meta(min_length=1, max_length=STRING_LENGTH_MAX)]
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Number = Annotated[float, Meta(gt=-1e26, lt=1e26)]  # every number of 27 digits is read as 1e26 or more
Cents = Annotated[int, Meta(gt=-100_000, lt=100_000)] | Annotated[float, Meta(gt=-1e5, lt=1e5)]


class Object(Struct, gc=False):
    """Any JSON object, unread."""


class Plain(Struct, gc=False):
    """An event of an organization's token, without anything unusual."""

    name: Annotated[str, Meta(max_length=NAME_LENGTH_MAX)]
    external_customer_id: str | None = None
    timestamp: Annotated[datetime, Meta(tz=True)] = _EPOCH
    external_id: str | None = None
    metadata: dict[str, Text | Integer | Number | bool | Object] | UnsetType = UNSET
    customer_id: str | None = None
    member_id: str | None = None
    external_member_id: str | None = None
    parent_id: str | None = None
    organization_id: None = None


class Cost(Struct, gc=False):
    """A plain ``_cost``: two keys, a number and not text."""

    amount: Cents
    currency: Literal["usd"]


class Llm(Struct, gc=False):
    """A plain ``_llm``: whole numbers and not text."""

    vendor: str
    model: str
    input_tokens: Integer
    output_tokens: Integer
    total_tokens: Integer
    cached_input_tokens: Integer | UnsetType = UNSET


class Reserved(Struct, frozen=True, gc=False):
    """The reserved keys of a metadata object, uncut."""

    cost: Raw | UnsetType = msgspec.field(name="_cost", default=UNSET)
    llm: Raw | UnsetType = msgspec.field(name="_llm", default=UNSET)


class WithReserved(Struct, gc=False):
    """An event of which only the reserved metadata is read."""

    metadata: Reserved = Reserved()


class _Plains(Struct, gc=False):
    events: list[Plain]


class _WithReserveds(Struct, gc=False):
    events: list[WithReserved]


_decode_plains = msgspec.json.Decoder(_Plains).decode
_decode_plain = msgspec.json.Decoder(Plain).decode
_decode_reserved = msgspec.json.Decoder(_WithReserveds).decode
_decode_costs = msgspec.json.Decoder(list[Cost]).decode
_decode_llms = msgspec.json.Decoder(list[Llm]).decode

# Escapes that can hide something: ASCII (a NUL, or letters of a reserved key) and halves of surrogate pairs.
_HIDING = re.compile(rb"\\u(?:00[0-7]|[dD][89a-fA-F])")


class Finding(NamedTuple):
    """The external id of each event (None where it has none, or is a suspect), and the suspects' indexes."""

    external_ids: list[str | None]
    suspects: set[int]


def read_plain(body: bytes) -> list[Plain] | None:
    """The events of ``{"events": [...]}`` by their types alone; None unless all of them fit."""
    try:
        return _decode_plains(body).events
    except (msgspec.MsgspecError, RecursionError):
        return None


def find_suspects(body: bytes, lines: Sequence[Raw], organization_id: str, catalogue: Catalogue, latest: datetime,
                  plains: list[Plain] | None) -> Finding:
    """Sort the events of a body, cut into ``lines``, into plain ones and suspects. ``plains`` is ``read_plain(body)``.

    A timestamp may be ``latest`` at most.
    """
    if plains is not None:
        return _find(body, lines, plains, organization_id, catalogue, latest)
    fitting = [index for index, line in enumerate(lines) if _fits(line)]
    rest = [lines[index] for index in fitting]
    body = b'{"events":[' + b",".join(rest) + b"]}"
    found = _find(body, rest, _decode_plains(body).events, organization_id, catalogue, latest)
    external_ids: list[str | None] = [None] * len(lines)
    for index, external_id in zip(fitting, found.external_ids, strict=True):
        external_ids[index] = external_id
    suspects = set(range(len(lines))).difference(fitting)
    return Finding(external_ids, suspects.union(fitting[index] for index in found.suspects))


def _fits(line: Raw) -> bool:
    try:
        _decode_plain(line)
    except (msgspec.MsgspecError, RecursionError):
        return False
    return True


def _find(
    body: bytes, lines: Sequence[Raw], plains: list[Plain], organization_id: str, catalogue: Catalogue,
    latest: datetime,
) -> Finding:
    suspects = set(_unknown_customers(plains, organization_id, catalogue))
    if plains and max([event.timestamp for event in plains]) > latest:
        suspects.update(index for index, event in enumerate(plains) if event.timestamp > latest)
    if b"\\" in body and _HIDING.search(body):
        suspects.update(index for index, line in enumerate(lines) if _HIDING.search(line))
    metadata = [event.metadata for event in plains]
    holders = [
        index for index, held in enumerate(metadata) if held is not UNSET and ("_cost" in held or "_llm" in held)
    ]
    reserved = _plain_reserved(body) if holders else 0
    if reserved is None:
        suspects.update(holders)
    needed = 2 + 2 * len(plains) - metadata.count(UNSET) + (reserved or 0)
    if body.count(b"{") + 1 != needed or body.find(b"[") != body.rfind(b"["):
        suspects.update(_bracketed(lines, plains))
    return Finding([event.external_id for event in plains], suspects)


def _unknown_customers(plains: list[Plain], organization_id: str, catalogue: Catalogue) -> Iterable[int]:
    """Events without an external customer, unless they name a customer that exists, and no member."""
    for index in [index for index, event in enumerate(plains) if event.external_customer_id is None]:
        event = plains[index]
        known = event.customer_id and catalogue.customer(organization_id, event.customer_id)
        if not known or event.member_id is not None:
            yield index


def _bracketed(lines: Sequence[Raw], plains: list[Plain]) -> Iterable[int]:
    """Events with more brackets than a plain event needs, be it in a text, a nested value or a repeated key."""
    for index, (line, event) in enumerate(zip(lines, plains, strict=True)):
        needed = 1
        if event.metadata is not UNSET:
            cost, llm = event.metadata.get("_cost"), event.metadata.get("_llm")
            needed += 1 + isinstance(cost, Object) + isinstance(llm, Object)
        text = bytes(line)
        if b"[" in text or text.count(b"{") != needed:
            yield index


def _plain_reserved(body: bytes) -> int | None:
    """How many reserved objects there are; None unless each of them is plain."""
    found = [event.metadata for event in _decode_reserved(body).events]
    costs = [metadata.cost for metadata in found if metadata.cost is not UNSET]
    llms = [metadata.llm for metadata in found if metadata.llm is not UNSET]
    return len(costs) + len(llms) if _plain_costs(costs) and _plain_llms(llms) else None


def _plain_costs(costs: Sequence[Raw]) -> bool:
    """Whether all are plain: none of their texts holds a colon, so there is one for each key."""
    joined = b",".join(costs)
    try:
        _decode_costs(b"[%s]" % joined)
    except msgspec.MsgspecError:
        return False
    return joined.count(b":") == 2 * len(costs)


def _plain_llms(llms: Sequence[Raw]) -> bool:
    """Whether all are plain: a colon for each key, and those within the two texts."""
    joined = b",".join(llms)
    try:
        found: list[Llm] = _decode_llms(b"[%s]" % joined)
    except msgspec.MsgspecError:
        return False
    colons = 5 * len(found) + sum([llm.cached_input_tokens is not UNSET for llm in found])
    colons += sum([llm.vendor.count(":") + llm.model.count(":") for llm in found])
    return joined.count(b":") == colons
