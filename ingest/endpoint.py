"""``POST /v1/events/ingest``: from a request to a durable record and an answer.

A 2xx leaves after the append returned, never before; a log that cannot write is a 503 with Retry-After. The checks
come in Polar's order, each answering for itself: token and scope, the token's quota, the encoding and length of the
body, the body as JSON, its events, the names in them.

``duplicates`` in an answer is what this process can know: repetitions within the request, and of events that it
acknowledged lately. All of them are written; the store alone decides what counts, and may know more.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

import msgspec

from ingest import answers, telemetry
from ingest.admission import Admitted, RefusedBody, Tenant, admit, admit_quickly
from ingest.answers import JSON, Answer
from ingest.body import ENCODINGS, Receive, read, unpack
from ingest.gather import Gather
from ingest.limits import (
    ANSWER_BYTES_MAX,
    BODY_BYTES_MAX,
    BODY_DEADLINE_S,
    IN_FLIGHT_BYTES_MAX,
    INLINE_BODY_BYTES_MAX,
    InFlight,
    RequestQuota,
)
from ingest.quick import Quick
from ingest.recent import Fingerprints, RecentIdentities, Verdict
from ingest.shape import Shapes
from ingest.spread import Spread
from ingest.tail import CatalogueTail
from ingest.turns import TURN_BYTES_MIN, Turns
from meters.access import Denied, authorize, good_credential, writing
from meters.catalogue import Catalogue, Token
from meters.log import Entry, Log, NoSuchPartition, Refused, TryAgain, format_position
from meters.refusal import Reason

SCOPES = writing("events")

NOT_WRITABLE_S = 5.0
"""How long a failed append keeps ``/readyz`` at no: long enough to be seen, short enough for traffic to try again."""

Headers = Mapping[bytes, bytes]
Made = TypeVar("Made")


class Preferences(NamedTuple):
    """What a ``Prefer`` header (RFC 7240) may ask: to keep the good events, and to hear of each one."""

    lenient: bool
    representation: bool

    @property
    def applied(self) -> bytes:
        """The ``Preference-Applied`` header; empty for none."""
        names = [b"handling=lenient"] * self.lenient + [b"return=representation"] * self.representation
        return b", ".join(names)


def read_preferences(header: bytes) -> Preferences:
    """The preferences known here; others are ignored, as they may be."""
    asked = {b"".join(part.partition(b";")[0].split()).lower() for part in header.split(b",")}
    return Preferences(b"handling=lenient" in asked, b"return=representation" in asked)


def new_ids(count: int) -> list[str]:
    """So many external ids of 128 random bits: in a million million of them the chance of a pair is 10^-15."""
    digits = os.urandom(16 * count).hex()
    return [digits[start : start + 32] for start in range(0, 32 * count, 32)]


class Opened(NamedTuple):
    """A request that may send its body."""

    token: Token
    encoding: str
    preferences: Preferences


class EndpointSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The endpoint's bounds. An operator sets ``requests_per_minute``."""

    body_bytes_max: int = BODY_BYTES_MAX
    body_deadline_s: float = BODY_DEADLINE_S
    in_flight_bytes_max: int = IN_FLIGHT_BYTES_MAX
    requests_per_minute: int = 0  # for each token, and each customer at the portal; 0 sets no limit


class IngestEndpoint:
    """Takes requests one by one; what they share is the log, the catalogue, and the limits."""

    def __init__(self, log: Log, tail: CatalogueTail, settings: EndpointSettings) -> None:
        self.in_flight = InFlight(settings.in_flight_bytes_max)
        self.position: dict[int, int] = {}  # of every partition of usage.events, as far as this process knows
        self._gather = Gather(log)
        self._tail = tail
        self._settings = settings
        self._quota = RequestQuota(settings.requests_per_minute)
        self._spread = Spread()
        self._large_spread = Spread()  # for the thread alone, as the other one is for the event loop alone
        self._shapes = Shapes()
        self._quick = Quick()
        self._recent = RecentIdentities(table=self._quick.table)
        self._turns = Turns()
        # One thread: parsing holds the interpreter, so a second would only take memory.
        self._large_bodies = ThreadPoolExecutor(1, "admission")
        self._not_writable_until_s = 0.0

    @property
    def writable(self) -> bool:
        """False until the log's partitions are known, and for a while after it refused to write."""
        return bool(self.position) and time.monotonic() >= self._not_writable_until_s

    def learn(self, ends: Mapping[int, int]) -> None:
        """Hear which partitions the log has, and how far they reach; others are forgotten."""
        self.position = dict(ends)

    def close(self) -> None:
        """End the thread."""
        self._large_bodies.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, headers: Headers, length: int, receive: Receive) -> Answer:
        """The answer to one request. ``headers`` are lower case, ``length`` is the Content-Length. Raises Gone."""
        opened = self.open(headers, length)
        if isinstance(opened, Answer):
            return opened
        settings = self._settings
        body = await read(receive, settings.body_deadline_s, self.in_flight, settings.body_bytes_max)
        if isinstance(body, Answer):
            return body
        try:
            return await self.take(opened, body)
        finally:
            self.in_flight.give_back(len(body))

    def open(self, headers: Headers, length: int) -> Opened | Answer:
        """Judge a request by its head."""
        if not self._tail.current:
            return answers.unavailable("CatalogueUnavailable", "Tokens are not known yet.", 1)
        now = datetime.now(UTC)
        token = authorize(_authorization(headers), SCOPES, self._tail.catalogue, now)
        if isinstance(token, Denied):
            challenge = ((name.lower().encode(), value.encode()) for name, value in token.headers.items())
            return Answer(token.status, token.body, (JSON, *challenge))
        wait_s = self._quota.wait_s(token.id, time.monotonic())
        if wait_s:
            return answers.too_many_requests(wait_s)
        encoding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
        if encoding not in ENCODINGS:
            return answers.unsupported_encoding()
        if length > self._settings.body_bytes_max:
            return answers.too_large(self._settings.body_bytes_max)
        return Opened(token, encoding, read_preferences(headers.get(b"prefer", b"")))

    def organization_of(self, headers: Headers, now: datetime) -> str:
        """Whose good token, or whose customer's session, the request shows; empty where it shows none."""
        shown = good_credential(_authorization(headers), self._tail.catalogue, now)
        return shown.organization_id if shown else ""

    def too_many(self, headers: Headers, now: datetime) -> Answer | None:
        """The answer to a token or a customer who asked too often. Whoever shows neither is refused elsewhere."""
        if not self._settings.requests_per_minute:
            return None
        shown = good_credential(_authorization(headers), self._tail.catalogue, now)
        if shown is None:
            return None
        key = shown.id if isinstance(shown, Token) else shown.customer_id  # of whom there are fewer than of sessions
        wait_s = self._quota.wait_s(key, time.monotonic())
        return answers.too_many_requests(wait_s) if wait_s else None

    async def take(self, opened: Opened, body: bytes) -> Answer:
        """Judge the body, whose bytes are counted into ``in_flight``, write its events, and answer."""
        token, encoding, preferences = opened
        if encoding in ("", "identity"):
            return await self._admit(token, body, preferences)
        unpacked = await self._in_thread(unpack, body, encoding, self._settings.body_bytes_max)
        if isinstance(unpacked, Answer):
            return unpacked
        if not self.in_flight.take(len(unpacked)):
            return answers.busy()
        try:
            return await self._admit(token, unpacked, preferences)
        finally:
            self.in_flight.give_back(len(unpacked))

    async def _admit(self, token: Token, body: bytes, preferences: Preferences) -> Answer:
        telemetry.BODY_BYTES.inc(len(body))
        position_before = dict(self._tail.position)
        admitted, in_thread = await self._judge(token, body, preferences)
        if _names_unknown(admitted):  # or made a moment ago, and not yet known here
            if not await self._tail.catch_up():
                return answers.unavailable("CatalogueUnavailable", "The newest customers are not known yet.", 1)
            if self._tail.position != position_before:
                admitted, in_thread = await self._judge(token, body, preferences)
        if isinstance(admitted, RefusedBody):
            return await self._do(in_thread, _unprocessable, admitted)
        return await self._append(token, admitted, preferences, in_thread)

    async def _judge(self, token: Token, body: bytes, preferences: Preferences) -> tuple[Admitted | RefusedBody, bool]:
        """What is admitted, and whether that is so much that the rest of the work is for the thread as well."""
        if TURN_BYTES_MIN <= len(body) <= INLINE_BODY_BYTES_MAX:
            await self._turns.take()
        tenant = Tenant(token.organization_id, self._tail.catalogue, new_ids, self._shapes, self._quick.read)
        now = datetime.now(UTC)
        if len(body) <= INLINE_BODY_BYTES_MAX:
            found = admit_quickly(body, tenant, now, lenient=preferences.lenient)
            if found is not None:
                return found, False
        return await self._in_thread(_admit_large, body, tenant, now, preferences), True

    async def _append(self, token: Token, admitted: Admitted, preferences: Preferences, in_thread: bool) -> Answer:
        is_long = in_thread and bool(preferences.applied)  # else the answer is two numbers
        if not admitted.lines:
            return await self._do(is_long, _accepted, admitted, None, preferences, dict(self.position))
        if not self.position:
            return answers.unavailable("LogUnavailable", "The log cannot write just now.", 1)
        where = token.organization_id, self._tail.catalogue, len(self.position)
        spread = self._large_spread if in_thread else self._spread
        prepared = await self._do(in_thread, _prepared, admitted, *where, spread)
        position = await self._write(prepared.entries)
        if isinstance(position, Answer):
            return position
        # What was acknowledged is known to the event loop alone, which needs no lock for it.
        verdicts = self._recent.take(prepared.events) if prepared.events is not None else None
        return await self._do(is_long, _accepted, admitted, verdicts, preferences, position)

    async def _write(self, entries: Sequence[Entry]) -> Mapping[int, int] | Answer:
        """Append, and say where the log stands after it."""
        try:
            position = await self._gather.append(entries)
        except TryAgain as error:
            return self._not_writable(error.retry_after_s)
        except NoSuchPartition:  # made again with fewer; the next look at the log will tell
            return self._not_writable(NOT_WRITABLE_S)
        except Refused as error:
            return answers.problem(413, "RequestBodyTooLarge", str(error))
        self._not_writable_until_s = 0.0
        self._advance(position)
        return position

    def _not_writable(self, retry_after_s: float) -> Answer:
        self._not_writable_until_s = time.monotonic() + NOT_WRITABLE_S
        return answers.unavailable("LogUnavailable", "The log cannot write just now.", retry_after_s)

    def _advance(self, written: Mapping[int, int]) -> None:
        for partition in written.keys() & self.position.keys():  # one may be gone since
            self.position[partition] = max(self.position[partition], written[partition])

    async def _do(self, in_thread: bool, work: Callable[..., Made], *arguments: Any) -> Made:
        """Do what may take long: in the thread, or here and at once."""
        return await self._in_thread(work, *arguments) if in_thread else work(*arguments)

    async def _in_thread(self, work: Callable[..., Made], *arguments: Any) -> Made:
        """Do what takes long in the thread for large bodies, while the event loop serves everybody else."""
        return await asyncio.get_running_loop().run_in_executor(self._large_bodies, work, *arguments)


def _admit_large(body: bytes, tenant: Tenant, now: datetime, preferences: Preferences) -> Admitted | RefusedBody:
    return admit(body, tenant, now, lenient=preferences.lenient)


class _Prepared(NamedTuple):
    """What is made of admitted events before they are written: what tells a repetition, and the records."""

    events: Fingerprints | None  # None where no event has a name of its own
    entries: list[Entry]


def _prepared(
    admitted: Admitted, organization_id: str, catalogue: Catalogue, partitions: int, spread: Spread
) -> _Prepared:
    events = None
    if admitted.fingerprints is not None:
        events = Fingerprints(*admitted.fingerprints)
    elif admitted.named:
        events = Fingerprints.of(organization_id, admitted.external_ids, admitted.lines)
    return _Prepared(events, spread.entries(admitted, organization_id, catalogue, partitions))


def _authorization(headers: Headers) -> str:
    return headers.get(b"authorization", b"").decode("latin-1")


def _names_unknown(admitted: Admitted | RefusedBody) -> bool:
    """Whether an event was refused because there is no such customer."""
    unknown, _ = Reason.CUSTOMER_UNKNOWN.value
    if isinstance(admitted, RefusedBody):
        return any(entry["type"] == unknown for entry in admitted.detail)
    return any(refusal.type == unknown for refusal in admitted.refusals)


def _unprocessable(refused: RefusedBody) -> Answer:
    telemetry.EVENTS_REJECTED.inc(len({entry["loc"][2] for entry in refused.detail if len(entry["loc"]) > 2}))
    found = answers.problem(422, refused.error, refused.detail)
    if len(found.body) <= ANSWER_BYTES_MAX:
        return found
    return answers.problem(422, refused.error, [entry | {"input": None} for entry in refused.detail])


def _accepted(
    admitted: Admitted, verdicts: Sequence[Verdict] | None, preferences: Preferences, position: Mapping[int, int]
) -> Answer:
    count = len(admitted.lines)
    verdicts = verdicts or [Verdict.ACCEPTED] * count if preferences.representation or verdicts else None
    inserted = count if verdicts is None else verdicts.count(Verdict.ACCEPTED)
    rejected = len({refusal.index for refusal in admitted.refusals})
    telemetry.count_events(inserted, 0 if verdicts is None else verdicts.count(Verdict.CONFLICT), count, rejected)
    headers = [JSON, (b"log-position", format_position(position).encode())]
    if not preferences.applied:
        return Answer(200, b'{"inserted":%d,"duplicates":%d}' % (inserted, count - inserted), tuple(headers))
    found: dict[str, Any] = {"inserted": inserted, "duplicates": count - inserted}
    if preferences.lenient:
        found["rejected"] = [
            {"index": refusal.index, "type": refusal.type, "loc": refusal.loc, "msg": refusal.msg}
            for refusal in admitted.refusals
        ]
    if preferences.representation:
        found["events"] = _representation(admitted, verdicts or [])
    headers.append((b"preference-applied", preferences.applied))
    return Answer(200, msgspec.json.encode(found), tuple(headers))


def _representation(admitted: Admitted, verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """What became of each event of the request, in its order."""
    kept = zip(admitted.indexes, verdicts, admitted.external_ids, strict=True)
    rows = [{"index": index, "verdict": verdict, "external_id": external_id} for index, verdict, external_id in kept]
    rejected = sorted({refusal.index for refusal in admitted.refusals})
    rows += [{"index": index, "verdict": Verdict.REJECTED, "external_id": None} for index in rejected]
    return sorted(rows, key=lambda row: row["index"])
