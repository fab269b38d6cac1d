"""Which events of a body are plain beyond doubt, by looking at all of them at once.

Nearly every event is plain: fields of the expected types, an ISO timestamp, a known customer. C code checks types and
limits in one pass. What types cannot tell is told by counting bytes over the whole body: if there are exactly as many
opening brackets as the parsed events need, then nothing else is nested and no key with an object is given twice; if
the metadata has exactly as many colons as parsed keys, then no key in it is given twice.

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
YEAR_TWO = datetime(2, 1, 1, tzinfo=UTC)
NOT_PLAIN = -(2**32)  # instead of a number of keys; no body has so many

Name = Annotated[str, Meta(max_length=NAME_LENGTH_MAX)]
Time = Annotated[datetime, Meta(tz=True)]
Text = Annotated[str, Meta(min_length=1, max_length=STRING_LENGTH_MAX)]
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Number = Annotated[float, Meta(gt=-1e26, lt=1e26)]  # every number of 27 digits is read as 1e26 or more
Cents = Annotated[int, Meta(gt=-100_000, lt=100_000)] | Annotated[float, Meta(gt=-1e5, lt=1e5)]
Currency = Literal["usd"]


class Nested(Struct, gc=False, forbid_unknown_fields=True):
    """A plain ``_cost`` or ``_llm``: numbers and not text, and no key that is not known."""

    amount: Cents | UnsetType = UNSET
    currency: Currency | UnsetType = UNSET
    vendor: str | UnsetType = UNSET
    model: str | UnsetType = UNSET
    input_tokens: Integer | UnsetType = UNSET
    output_tokens: Integer | UnsetType = UNSET
    total_tokens: Integer | UnsetType = UNSET
    cached_input_tokens: Integer | UnsetType = UNSET


class Plain(Struct, gc=False):
    """An event of an organization's token, without anything unusual."""

    name: Name
    external_customer_id: str | None = None
    timestamp: Time = _EPOCH
    external_id: str | None = None
    metadata: dict[str, Text | Integer | Number | bool | Nested] | UnsetType = UNSET
    customer_id: str | None = None
    member_id: str | None = None
    external_member_id: str | None = None
    parent_id: str | None = None
    organization_id: None = None


class WithMetadata(Struct, gc=False):
    """An event of which only the metadata is read, uncut."""

    metadata: Raw = Raw(b"")


class _Plains(Struct, gc=False):
    events: list[Plain]


class _WithMetadata(Struct, gc=False):
    events: list[WithMetadata]


_decode_plains = msgspec.json.Decoder(_Plains).decode
_decode_plain = msgspec.json.Decoder(Plain).decode
_decode_metadata = msgspec.json.Decoder(_WithMetadata).decode

# Escapes that can hide something: of a NUL, of letters and the underscore (U+0040 to U+007F), which reserved keys are
# made of, of a colon, which is counted, and of halves of surrogate pairs. No other: Go writes & < > as escapes.
HIDING = re.compile(rb"\\u(?:00(?:00|3[aA]|[4-7])|[dD][89a-fA-F])")


class Finding(NamedTuple):
    """The external id of each event (None where it has none, or is a suspect), and the suspects' indexes.

    ``distinct_keys``: beyond doubt no metadata gives a key twice.
    """

    external_ids: list[str | None]
    suspects: set[int]
    distinct_keys: bool


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
    return Finding(external_ids, suspects.union(fitting[index] for index in found.suspects), False)


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
    times = [event.timestamp for event in plains]
    if times and (max(times) > latest or min(times) < YEAR_TWO):  # with its offset, year 1 may have begun before time
        suspects.update(index for index, time in enumerate(times) if time > latest or time < YEAR_TWO)
    if b"\\" in body and HIDING.search(body):
        suspects.update(index for index, line in enumerate(lines) if HIDING.search(line))
    metadata = [event.metadata for event in plains if event.metadata is not UNSET]
    costs = [held["_cost"] for held in metadata if "_cost" in held]
    llms = [held["_llm"] for held in metadata if "_llm" in held]
    keys_in_costs, keys_in_llms = _keys_in_costs(costs), _keys_in_llms(llms)
    keys = sum(map(len, metadata)) + keys_in_costs + keys_in_llms
    texts = [event.metadata for event in _decode_metadata(body).events] if metadata else []
    distinct_keys = keys_in_costs >= 0 <= keys_in_llms and _has_keys(b"".join(texts), keys)
    if not distinct_keys and (costs or llms):
        suspects.update(_doubtful(plains, texts))
    brackets = 1 + len(plains) + len(metadata) + len(costs) + len(llms)
    if body.count(b"{") != brackets or body.find(b"[") != body.rfind(b"["):
        suspects.update(_bracketed(lines, plains))
    return Finding([event.external_id for event in plains], suspects, distinct_keys and not suspects)


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
            needed += 1 + ("_cost" in event.metadata) + ("_llm" in event.metadata)
        text = bytes(line)
        if b"[" in text or text.count(b"{") != needed:
            yield index


def _doubtful(plains: list[Plain], texts: Sequence[Raw]) -> Iterable[int]:
    """Events with a reserved object that is not plain, or with more keys than were parsed."""
    for index, (event, text) in enumerate(zip(plains, texts, strict=True)):
        held = event.metadata
        if held is UNSET or not ("_cost" in held or "_llm" in held):
            continue
        inner = _keys_in_costs([held[key] for key in ("_cost",) if key in held])
        more = _keys_in_llms([held[key] for key in ("_llm",) if key in held])
        if inner < 0 or more < 0 or not _has_keys(bytes(text), len(held) + inner + more):
            yield index


def _keys_in_costs(costs: Sequence[object]) -> int:
    """How many keys plain costs have; NOT_PLAIN if any is not. Keys of another kind are for the count to find."""
    plain = all(type(cost) is Nested and cost.amount is not UNSET and cost.currency is not UNSET for cost in costs)
    return 2 * len(costs) if plain else NOT_PLAIN


def _keys_in_llms(llms: Sequence[object]) -> int:
    """How many keys plain accounts of a language model have; NOT_PLAIN if any is not."""
    keys = 0
    for llm in llms:
        if type(llm) is not Nested or UNSET in (
            llm.vendor, llm.model, llm.input_tokens, llm.output_tokens, llm.total_tokens
        ):
            return NOT_PLAIN
        keys += 5 + (llm.cached_input_tokens is not UNSET)
    return keys


def _has_keys(texts: bytes, keys: int) -> bool:
    """Whether JSON texts with at least so many keys have no more. A colon outside of strings is a key's."""
    if texts.count(b":") == keys:
        return True
    return texts.translate(None, b" \n\t\r").count(b'":') == keys  # some colons are in strings, but not behind a quote
