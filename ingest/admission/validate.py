"""Validate a request body: bytes in, log lines or refusals out. No I/O and no clock.

``admit`` returns ``Admitted`` (lines for the log) or ``RefusedBody`` (errors in Polar's words). ``admit_quickly``
gives up when too many events need the full parser; ``admit_together`` validates ordinary bodies of several requests
at once.

There are three ways to read an event, from fast to complete: compiled loops (``ingest.admission.kernels``), one typed
pass over the whole body (``read_plain``, ``find_suspects``), and the full parser ``meters.event``. Each fast way
accepts only what the full parser would accept, and only the full parser refuses.

Accepted bytes are passed on as they were sent, with two exceptions: a raw newline becomes a space, because a line is
an event; an event without external id gets one as its last key, because events are deduplicated by their identity.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from ingest.limits import (
    BODY_VALUES_MAX,
    CAREFUL_EVENTS_MAX,
    CAREFUL_VALUES_MAX,
    DETAILS_MAX,
    HURRIED_BODY_VALUES_MAX,
    HURRIED_EVENTS_MAX,
    HURRIED_VALUES_MAX,
    REFUSALS_MAX,
    REFUSALS_OF_EVENT_MAX,
)
from meters.catalogue.access import reference_refusals
from meters.catalogue.catalogue import Catalogue
from meters.errors import DEPTH_MAX, NAME_LENGTH_MAX, STRING_LENGTH_MAX, Refusal
from meters.event import CLOCK_SKEW, check_event
from meters.timestamps import microseconds_of

# Which events of a body are plain beyond doubt, by looking at all of them at once.
#
# Nearly every event is plain: fields of the expected types, an ISO timestamp, a known customer. C code checks types
# and limits in one pass. What types cannot tell is told by counting bytes over the whole body: if there are exactly
# as many opening brackets as the parsed events need, then nothing else is nested and no key with an object is given
# twice; if the metadata has exactly as many colons as parsed keys, then no key in it is given twice.
#
# Whatever is not proven plain is a suspect, for ``meters.event`` to read with care. This module refuses nothing. It
# is narrower than the careful reading in everything, and wider in nothing: a property test holds the two together.

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
    external_ids = [event.external_id or None for event in plains]  # an empty one names nothing
    return Finding(external_ids, suspects, distinct_keys and not suspects)


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


# From a body's bytes to lines for the log, or refusals. No I/O, no clock.
#
# What is plain beyond doubt (``ingest.admission.validate``) is admitted as it stands. Every other event is read with
# care by ``meters.event``, which alone decides, and has Polar's words for a refusal.
#
# The accepted bytes are passed on as they were sent. Two things change: a raw newline between tokens becomes a space,
# because a line is an event; and an event without an external id gets one as its last key, because an event is
# counted by its identity. Of a repeated key the last one counts, so ``"external_id": null`` (or ``""``) is overruled.

if TYPE_CHECKING:
    from ingest.admission.kernels import Found

SCHEMA = "RequestValidationError"
BUSINESS = "PolarRequestValidationError"
"""Polar's names for the two kinds of 422: what an event says, and what the names in it refer to."""

ECHO_BYTES_MAX = 16 * 1024
"""A larger body is not sent back as the ``input`` of what is wrong with it."""


class CompiledReader(Protocol):
    """Reads ordinary bodies by compiled loops: ``ingest.quick.Quick``."""

    def read(
        self, bodies: Sequence[bytes], earliest_us: int, latest_us: int, organization_id: str
    ) -> "Found | None":
        """The events of bodies, up to the first that is odd to loops; None if that is the first, or without loops."""


class IdMaker(Protocol):
    """Makes external ids for events that have none."""

    def make_ids(self, count: int) -> Sequence[str]:
        """So many, each new in the world, of characters that JSON need not escape."""


class Tenant(Struct, frozen=True):
    """Whose token sent the body, what is known just now, and what admission itself does not have."""

    organization_id: str
    catalogue: Catalogue
    id_maker: IdMaker
    compiled: CompiledReader | None = None


class Admitted(Struct, frozen=True):
    """Lines for the log, each with its external id and its index in the request; the three lists run in step.

    ``named`` says whether the sender chose any external id; only then can a line be a repetition. ``refusals`` is
    empty unless the request was lenient. ``distinct_keys``: see ``meters.log.Entry``. ``plains`` are the events as they
    were parsed, if none had to be read with care; ``compiled`` is what loops found, if they read the body, and has the
    external ids then.
    """

    lines: Sequence[Raw | bytes]
    given_ids: Sequence[str]
    indexes: Sequence[int]
    named: bool
    refusals: list[Refusal]
    distinct_keys: bool = False
    plains: Sequence[Plain] | None = None
    compiled: "Found | None" = None

    @property
    def external_ids(self) -> Sequence[str]:
        """Of each line. Made when it is asked for where loops read it, since few answers name ids."""
        return self.given_ids if self.compiled is None else self.compiled.external_ids

    @property
    def value(self) -> bytes:
        """The record's value: NDJSON."""
        return b"\n".join(self.lines) if self.compiled is None else self.compiled.value


class RefusedBody(Struct, frozen=True):
    """The whole request is refused: Polar's name for the error, and its detail list."""

    error: str
    detail: list[dict[str, Any]]


class _Envelope(Struct, gc=False):
    events: list[Raw]


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_fields = msgspec.json.Decoder(dict[str, Raw]).decode
_EARLIEST_US = microseconds_of(YEAR_TWO)
_BYTE = re.compile(r"\(byte (\d+)\)")


def admit(body: bytes, tenant: Tenant, now: datetime, *, lenient: bool = False) -> Admitted | RefusedBody:
    """Every event of the body as a line, or why not. One bad event refuses all of them, unless ``lenient``."""
    found = _admit(body, tenant, now, lenient, hurry=False)
    assert found is not None
    return found


def admit_quickly(
    body: bytes, tenant: Tenant, now: datetime, *, lenient: bool = False
) -> Admitted | RefusedBody | None:
    """The same; None where more events are unusual than can be read while everybody waits."""
    return _admit(body, tenant, now, lenient, hurry=True)


def read_together(bodies: Sequence[bytes], tenant: Tenant, now: datetime) -> "Found | None":
    """The events of as many bodies as are ordinary, from the first one on; None where the first is not.

    What is said of one body by ``admit`` is the same; ``rows`` of what is found says which events are whose.
    """
    readable = list(itertools.takewhile(lambda body: _unreadable(body) is None, bodies))
    return _read_compiled(readable, tenant, now) if readable else None


def _admit(body: bytes, tenant: Tenant, now: datetime, lenient: bool, *, hurry: bool) -> Admitted | RefusedBody | None:
    """Ask the readers in their order."""
    unreadable = _unreadable(body)
    if unreadable is not None:
        return unreadable
    # 1. Compiled loops, for all of the body or nothing: there are none yet, or a value, key or escape is odd to them.
    compiled = _read_compiled([body], tenant, now)
    if compiled is not None:
        indexes = range(len(compiled.line_places))
        return Admitted(compiled.lines, (), indexes, named=True, refusals=[], distinct_keys=True, compiled=compiled)
    # 2. The plain reading, for each event alone. Its suspects are odd by their types, their bytes or their customer.
    plains = read_plain(body)
    if plains is None and hurry and body.count(b",") > HURRIED_BODY_VALUES_MAX:
        return None
    if plains is None and body.count(b",") > BODY_VALUES_MAX:
        return _too_many("values to look at one by one")
    try:
        lines = _decode_envelope(body).events
    except (msgspec.MsgspecError, RecursionError):
        return _no_envelope(body)
    latest = now + CLOCK_SKEW
    ids, suspects, distinct_keys = find_suspects(body, lines, tenant.organization_id, tenant.catalogue, latest, plains)
    if not suspects:
        plain = _admitted(lines, ids, range(len(lines)), [], tenant, b"\n" in body)
        return msgspec.structs.replace(plain, distinct_keys=distinct_keys, plains=plains)
    # 3. The careful reading, for suspects alone: it accepts each, or says what is wrong. It is by far the slowest.
    values = sum(bytes(lines[index]).count(b",") for index in suspects)
    if hurry and (len(suspects) > HURRIED_EVENTS_MAX or values > HURRIED_VALUES_MAX):
        return None
    if len(suspects) > CAREFUL_EVENTS_MAX:
        return _too_many("unusual events to look at one by one")
    if values > CAREFUL_VALUES_MAX:
        return _too_many("values in unusual events to look at one by one")
    return _admit_with_care(body, lines, sorted(suspects), ids, tenant, now, lenient)


def _read_compiled(bodies: Sequence[bytes], tenant: Tenant, now: datetime) -> "Found | None":
    if tenant.compiled is None:
        return None
    return tenant.compiled.read(bodies, _EARLIEST_US, microseconds_of(now + CLOCK_SKEW), tenant.organization_id)


def _admit_with_care(
    body: bytes, lines: list[Raw], suspects: Sequence[int], ids: list[str | None], tenant: Tenant, now: datetime,
    lenient: bool,
) -> Admitted | RefusedBody:
    """Judge a body by what is wrong with its suspects."""
    error_name, refusals = _with_care(lines, suspects, ids, tenant, now, lenient)
    if refusals and not lenient:
        return RefusedBody(error_name, [_entry(refusal) for refusal in refusals[:DETAILS_MAX]])
    if len(refusals) > REFUSALS_MAX:
        some = [_entry(refusal) for refusal in refusals[: DETAILS_MAX - 1]]
        return RefusedBody(SCHEMA, _too_many(f"refusals to tell, more than {REFUSALS_MAX}").detail + some)
    refused = {refusal.index for refusal in refusals}
    kept = [index for index in range(len(lines)) if index not in refused]
    lines, ids = [lines[index] for index in kept], [ids[index] for index in kept]
    return _admitted(lines, ids, kept, refusals, tenant, b"\n" in body)


def _with_care(
    lines: Sequence[Raw], suspects: Sequence[int], ids: list[str | None], tenant: Tenant, now: datetime, lenient: bool
) -> tuple[str, list[Refusal]]:
    """Read each suspect, note its external id, and collect what is wrong, in the order of the request.

    Names are looked up only when every event is well made, as Polar does; a lenient request hears both. Where refusals
    are more than anybody may hear of, the rest is not read.
    """
    schema: list[Refusal] = []
    business: list[Refusal] = []
    of_event_max = REFUSALS_OF_EVENT_MAX if lenient else DETAILS_MAX
    for index in suspects:
        if len(schema) + len(business) > REFUSALS_MAX if lenient else len(schema) >= DETAILS_MAX:
            break
        event = check_event(bytes(lines[index]), index=index, now=now, complaints_max=of_event_max)
        if isinstance(event, list):
            schema += event[:of_event_max]
            continue
        ids[index] = event.external_id
        business += reference_refusals(
            event, tenant.catalogue, token_organization_id=tenant.organization_id, index=index
        )
    if lenient:
        return SCHEMA, sorted(schema + business, key=lambda refusal: refusal.index)
    return (SCHEMA, schema) if schema else (BUSINESS, business)


def _admitted(
    lines: Sequence[Raw], ids: Sequence[str | None], kept: Sequence[int], refusals: list[Refusal], tenant: Tenant,
    newlines: bool,
) -> Admitted:
    final: list[Raw | bytes] = list(lines)
    if newlines:
        final = [bytes(line).replace(b"\n", b" ") for line in final]
    named = list(ids)
    nameless = [place for place, external_id in enumerate(ids) if external_id is None] if None in ids else []
    for place, external_id in zip(nameless, tenant.id_maker.make_ids(len(nameless)) if nameless else (), strict=True):
        named[place] = external_id
        final[place] = b'%s,"external_id":"%s"}' % (bytes(final[place])[:-1], external_id.encode())
    return Admitted(final, named, kept, len(nameless) < len(final), refusals)  # type: ignore[arg-type]


def _unreadable(body: bytes) -> RefusedBody | None:
    if not body:
        return _refused("missing", ("body",), "Field required")
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError as error:
            return _not_json(error.start, "invalid UTF-8")
    return None


def _no_envelope(body: bytes) -> RefusedBody:
    """Why the body is not ``{"events": [...]}``."""
    try:
        msgspec.json.decode(body, type=Raw)
    except RecursionError:
        return _refused("value_error", ("body",), f"Value error, nesting is limited to {DEPTH_MAX} levels")
    except msgspec.DecodeError as error:
        found = _BYTE.search(str(error))
        return _not_json(int(found[1]) if found else len(body), str(error))
    echo = Raw(body) if len(body) <= ECHO_BYTES_MAX else None
    try:
        fields = _decode_fields(body)
    except msgspec.ValidationError:
        message = "Input should be a valid dictionary or object to extract fields from"
        return _refused("model_attributes_type", ("body",), message, echo)
    if "events" not in fields:
        return _refused("missing", ("body", "events"), "Field required", echo)
    events = fields["events"]
    echo = events if len(bytes(events)) <= ECHO_BYTES_MAX else None
    return _refused("list_type", ("body", "events"), "Input should be a valid list", echo)


def _too_many(what: str) -> RefusedBody:
    return _refused("too_long", ("body", "events"), f"Too many {what}; send fewer events")


def _not_json(offset: int, reason: str) -> RefusedBody:
    entry = {"type": "json_invalid", "loc": ("body", offset), "msg": "JSON decode error", "input": {}}
    return RefusedBody(SCHEMA, [entry | {"ctx": {"error": reason}}])


def _refused(kind: str, loc: tuple[str, ...], message: str, echo: Any = None) -> RefusedBody:
    return RefusedBody(SCHEMA, [{"type": kind, "loc": loc, "msg": message, "input": echo}])


def _entry(refusal: Refusal) -> dict[str, Any]:
    return {"type": refusal.type, "loc": refusal.loc, "msg": refusal.msg, "input": refusal.input}
