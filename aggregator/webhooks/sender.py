"""The webhook sender: turns causes into messages, and delivers them with retries.

``Sender.run`` executes two independent loops over the outbox. Every two seconds the first one builds messages from
all causes: many changes of one customer become one message, and thresholds are checked on the way. Customers whose
state cannot be computed yet are deferred (``Aside``). The second loop sends due messages, one at a time to each
endpoint, those of one type in order as long as the endpoint answers. A type that the receiver's code cannot handle
holds back no other type. A message is marked after it was sent, so a crash in between sends
it again under the same ``webhook-id`` (at least once).

Endpoints take turns, and the one whose last turn is longest ago comes next. A turn ends when the endpoint does not
answer, and an organization has a limited number of turns at a time. So a slow endpoint delays others by one turn at
most.
"""

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import NamedTuple, NoReturn, TypeVar

import duckdb
import httpx
import structlog
from msgspec.structs import replace

from aggregator.engine.change_events import Review, review_of
from aggregator.service.service import Desk
from aggregator.store import webhook_outbox
from aggregator.store.queries.scope import naive
from aggregator.store.webhook_outbox import Attempt, Cause, Message
from aggregator.view import Unavailable
from aggregator.webhooks import targets
from aggregator.webhooks.messages import looked_at, messages_of, missed
from aggregator.webhooks.reviews import Left, page_of, whom
from aggregator.webhooks.targets import Crowded, Names, Unresolved
from meters.backoff import Backoff
from meters.catalogue.catalogue import Customer
from meters.log import TryAgain, format_position, parse_position
from meters.webhooks import (
    API_VERSION,
    THRESHOLD_REACHED,
    Endpoint,
    EndpointSet,
    EndpointSettled,
    Heard,
    keys,
    signature,
)

# Deferred customers: those whose state cannot be computed yet, because a meter is being backfilled.
#
# Each is retried after a growing pause, and no other customer waits for them. One cause of each stays in the outbox
# and stands for all later ones. Which cause, and how long to wait, is known only in memory: after a restart all are
# retried at once.

PAUSE_S_MAX = 300.0
"""Between two questions that have no answer, each of which may take as long as the store lets it."""


class Waiting(NamedTuple):
    """A customer to be told of later, by a cause that stays; ``since`` when the organization lacks it."""

    cause: int
    organization_id: str
    since: datetime
    pause_s: float
    again_s: float


class Aside:
    """Those customers. The first pause is ``pause_s``; each is twice the one before. ``now_s`` is a steady clock's."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._waiting: dict[str, Waiting] = {}

    def resting(self, now_s: float) -> dict[str, int]:
        """Who is not to be asked about yet, each with the cause that stays."""
        return {id: one.cause for id, one in self._waiting.items() if one.again_s > now_s}

    def note(self, asked: Collection[int], kept: Mapping[int, Customer], now: datetime, now_s: float) -> None:
        """Take in what came of causes: the customers of those that are kept wait, the others are told."""
        before = self._waiting
        self._waiting = {id: one for id, one in before.items() if one.cause not in asked}
        for cause, customer in kept.items():
            last = before.get(customer.id)
            pause_s = min(2 * last.pause_s, PAUSE_S_MAX) if last else self._pause_s
            since = last.since if last else now
            self._waiting[customer.id] = Waiting(cause, customer.organization_id, since, pause_s, now_s + pause_s)

    def since(self) -> dict[str, datetime]:
        """From when on organizations were not told everything; those that were are left out."""
        found: dict[str, datetime] = {}
        for one in self._waiting.values():
            found[one.organization_id] = min(one.since, found.get(one.organization_id, one.since))
        return found


# Delivery.
#
# Each delivery is signed with both readings of the secret (``meters.webhooks``), so that a verifier of Standard
# Webhooks and one of Polar's both find a valid signature. During a rotation it is also signed with both readings of
# the old one.

ENDPOINTS_AT_ONCE = 16  # requests under way; each waits for one answer
ORGANIZATION_AT_ONCE = 4  # of them: three others find room, whoever hangs
DISABLE_AFTER = 10  # failed messages in a row, each after all its attempts: nobody is there (Polar's rule)
ORDER_GUARD = timedelta(seconds=60)  # so long a failing message holds back those of its type after it (Polar's rule)
FORGET_EVERY_S = 3600.0  # what is older than a month is let go of; an hour more or less does not matter
ANSWER_BYTES_MAX = 65_536  # of an answer that nobody reads; a longer one costs the connection
CAUGHT_UP_S = 5.0  # memory moves milliseconds after a commit, or never
_LOOK_S = 0.005
REVIEW_RESTS_S = 5.0  # before customers are asked about again whose state could not be told
TOLD_KEPT = 100  # positions, a minute apart; an endpoint that is away for longer is settled once it is back
GONE = 410  # the endpoint says that it is not one any more (Standard Webhooks)
USER_AGENT = "meterstream-webhooks"
JITTER = (1.0, 1.1)  # no pause is shorter than the handbook says

logger = structlog.get_logger("aggregator")
T = TypeVar("T")


class Pace(NamedTuple):
    """How fast; tests are in a hurry."""

    tick_s: float = 0.25  # how often the outbox is looked at
    collect_s: float = 2.0  # movements of one customer within this are one message (Polar: 1 to 5 s)
    timeout_s: float = 10.0  # for a whole delivery (Polar's)
    attempts_max: int = 10
    backoff_s: float = 2.0  # doubled with each attempt: some 17 minutes for all of them
    settle_s: float = 60.0  # what a store made anew from the log may tell twice


class Sender:
    """One for a process. ``run`` until cancelled; ``desk`` is the API's, so both see one catalogue."""

    def __init__(self, desk: Desk, *, private_allowed: bool = False, pace: Pace = Pace()) -> None:  # noqa: B008
        self._desk, self._private_allowed, self._pace = desk, private_allowed, pace
        self._busy: dict[str, str] = {}  # endpoints whose turn it is, with their organizations
        self._served_s: dict[str, float] = {}  # when the last turn of each ended
        self._names = Names()
        self._writing = asyncio.Lock()
        self._aside = Aside(pace.collect_s)
        self._reviews: dict[int, Left] = {}  # by cause
        self._reviewing: dict[int, tuple[str, datetime]] = {}  # by cause: whose they are, and since when
        self._told: list[tuple[datetime, Heard]] = []  # by when everything before a position was made into messages
        self._unsettled = True
        self._forgot_s = -FORGET_EVERY_S

    async def run(self) -> None:
        """Tell whatever is to be told, for ever."""
        cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))  # or endpoints behind one address would share them
        limits = httpx.Limits(max_connections=ENDPOINTS_AT_ONCE, max_keepalive_connections=0)
        async with (
            httpx.AsyncClient(trust_env=False, timeout=self._pace.timeout_s, limits=limits, cookies=cookies) as http,
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(_for_ever(self._collect, self._pace.collect_s))
            await _for_ever(lambda: self._tick(http, tasks), self._pace.tick_s)

    async def _tick(self, http: httpx.AsyncClient, deliveries: asyncio.TaskGroup) -> None:
        endpoints = self._desk.catalogue.webhooks.endpoints
        if not endpoints:
            return
        await self._forget(list(endpoints.values()))
        waiting = await self._write(lambda connection: webhook_outbox.waiting(connection, self._now()))
        for id in sorted(waiting, key=lambda id: self._served_s.get(id, -math.inf)):
            endpoint = endpoints.get(id)
            if endpoint is not None and self._has_turn(endpoint):
                self._busy[id] = endpoint.organization_id
                deliveries.create_task(self._deliver(http, id))

    def _has_turn(self, endpoint: Endpoint) -> bool:
        if endpoint.id in self._busy or (endpoint.disabled_at is not None and endpoint.deleted_at is None):
            return False
        of_organization = sum(id == endpoint.organization_id for id in self._busy.values())
        return len(self._busy) < ENDPOINTS_AT_ONCE and of_organization < ORGANIZATION_AT_ONCE

    async def _forget(self, endpoints: Sequence[Endpoint]) -> None:
        """Now and then, let go of what is old, and of what waits for endpoints that have been disabled for as long."""
        now_s, before = time.monotonic(), self._desk.now() - webhook_outbox.KEPT
        if now_s - self._forgot_s < FORGET_EVERY_S:
            return
        long_disabled = [one.id for one in endpoints if one.disabled_at is not None and one.disabled_at < before]
        await self._write(lambda connection: webhook_outbox.forget(connection, self._now(), long_disabled))
        self._forgot_s = now_s

    def _now(self) -> datetime:
        """As the store writes times: UTC, without saying so."""
        return naive(self._desk.now())

    async def _write(self, work: Callable[[duckdb.DuckDBPyConnection], T]) -> T:
        """One after the other: of two that change one message the second would fail, and what it noted be lost."""
        def whole() -> T:
            with self._desk.view.outbox() as connection:
                return work(connection)

        async with self._writing:
            return await asyncio.to_thread(whole)

    async def _collect(self) -> None:
        """Make messages of every cause, and say in the log how far everybody was told.

        A store that is filled again from the log says nothing before it has what was told already: its balances are
        those of long ago until then.
        """
        view, webhooks = self._desk.view, self._desk.catalogue.webhooks
        if not webhooks.endpoints:
            return
        listening = [endpoint for endpoint in list(webhooks.endpoints.values()) if endpoint.deleted_at is None]
        if not all(_reaches(view.as_of, webhooks.heard(endpoint)) for endpoint in listening):
            return
        heard = Heard(format_position(view.as_of), view.control_position)
        resting = self._aside.resting(time.monotonic())
        causes, stored = await self._write(
            lambda here: (webhook_outbox.take_causes(here, resting.values()), webhook_outbox.stored(here))
        )  # fmt: skip
        if causes:
            await self._caught_up(stored)
            self._unsettled = True
            reviews = [(cause, review) for cause in causes if (review := review_of(cause)) is not None]
            if len(reviews) < len(causes):
                await self._tell([cause for cause in causes if review_of(cause) is None], resting)
            for cause, review in reviews:
                self._reviewing.setdefault(cause.number, (cause.organization_id, self._now()))
                await self._look_again(cause, review)
        if len(causes) < webhook_outbox.CAUSES_AT_ONCE:
            await self._settle(heard)

    async def _tell(self, causes: Sequence[Cause], resting: Mapping[str, int]) -> None:
        """Make messages of causes, and let go of all but those of customers whose state cannot be told yet."""
        now = self._now()
        telling = await messages_of(self._desk, causes, now, resting)
        if telling.decisions:  # told by causes of their own
            async with self._desk.deciding:
                await self._desk.decide_each([decision] for decision in telling.decisions)
        asked = {cause.number for cause in causes}

        def write(connection: duckdb.DuckDBPyConnection) -> None:
            webhook_outbox.keep_causes(connection, {cause: customer.id for cause, customer in telling.kept.items()})
            webhook_outbox.put_messages(connection, telling.messages, asked - telling.kept.keys(), tuple(self._busy))

        await self._write(write)
        self._aside.note(asked, telling.kept, now, time.monotonic())

    async def _look_again(self, cause: Cause, review: Review) -> None:
        """Tell of the next customers of a review, and let go of its cause after the last of them."""
        now, left = self._now(), self._reviews.get(cause.number)
        if left is None:
            left = await self._begun(cause, review, now)
            if left is None:
                return
        if time.monotonic() < left.rests_until_s:
            return
        page, rest = page_of(left)
        telling = await looked_at(self._desk, page, cause, review, now)
        if telling.decisions:
            async with self._desk.deciding:
                await self._desk.decide_each([decision] for decision in telling.decisions)
        waiting = list(telling.kept.values())
        done = [] if rest or waiting else [cause.number]
        await self._write(lambda here: webhook_outbox.put_messages(here, telling.messages, done, tuple(self._busy)))
        rests_s = 0.0 if rest else time.monotonic() + REVIEW_RESTS_S
        self._reviews[cause.number] = Left([*rest, *waiting], rests_s)
        if done:
            del self._reviews[cause.number], self._reviewing[cause.number]

    async def _begun(self, cause: Cause, review: Review, now: datetime) -> Left | None:
        """Whom a review is about; None while its meter is being counted. What an endpoint missed is offered to it."""
        endpoint_id, type = review.endpoint_id, THRESHOLD_REACHED

        def read(here: duckdb.DuckDBPyConnection) -> tuple[set[str], set[str]]:
            if endpoint_id is not None:
                return webhook_outbox.not_taken(here, endpoint_id), webhook_outbox.known(here, endpoint_id, type)
            return webhook_outbox.told_before(here, cause.organization_id) if review.is_changed else set(), set()

        others, known = await self._write(read)
        customers = await whom(self._desk, cause, review, others, now)
        if customers is None:
            return None
        if endpoint_id is not None:
            messages = missed(self._desk, cause, review, known, now)

            def offer(here: duckdb.DuckDBPyConnection) -> None:
                webhook_outbox.offer_again(here, endpoint_id, type, now)
                webhook_outbox.put_messages(here, messages, [], tuple(self._busy))

            await self._write(offer)
        return Left(customers)

    async def _caught_up(self, stored: webhook_outbox.Stored) -> None:
        """Wait until memory, which the words are made of, is as far as the store, which has the causes.

        Raises Unavailable when it does not get there: the engine ended in between, and the next one starts there.
        """
        view = self._desk.view
        if not await view.wait_for(stored.events, CAUGHT_UP_S):
            raise Unavailable("the view is behind its store")
        deadline_s = time.monotonic() + CAUGHT_UP_S
        while view.control_position < stored.control:
            if time.monotonic() > deadline_s:
                raise Unavailable("the view is behind its store")
            await asyncio.sleep(_LOOK_S)

    async def _settle(self, heard: Heard) -> None:
        """Write into the log how far endpoints were told everything: once in a while, and only if anything was told."""
        now = self._now()
        if not self._unsettled or (self._told and (now - self._told[-1][0]).total_seconds() < self._pace.settle_s):
            return
        self._told = [*self._told, (now, heard)][-TOLD_KEPT:]
        oldest, lacking = await self._write(webhook_outbox.oldest_pending), self._aside.since()
        for organization_id, since in self._reviewing.values():
            lacking[organization_id] = min(since, lacking.get(organization_id, since))
        webhooks = self._desk.catalogue.webhooks
        settled = []
        for endpoint in list(webhooks.endpoints.values()):
            firsts = (oldest.get(endpoint.id), lacking.get(endpoint.organization_id))
            done = [what for at, what in self._told if all(first is None or at < first for first in firsts)]
            if done and endpoint.deleted_at is None and _is_further(done[-1], webhooks.heard(endpoint)):
                settled.append(EndpointSettled(endpoint.id, done[-1]))
        if settled:
            await self._desk.decide_each([one] for one in settled)
        enabled = {id for id, endpoint in list(webhooks.endpoints.items()) if endpoint.disabled_at is None}
        self._unsettled = not enabled.isdisjoint(oldest)

    async def _deliver(self, http: httpx.AsyncClient, endpoint_id: str) -> None:
        try:
            with _later():
                ends_s = time.monotonic() + self._pace.timeout_s
                while await self._deliver_in_order(http, endpoint_id, ends_s) >= webhook_outbox.MESSAGES_AT_ONCE:
                    continue  # there may be more
        finally:
            del self._busy[endpoint_id]
            self._served_s[endpoint_id] = time.monotonic()

    async def _deliver_in_order(self, http: httpx.AsyncClient, endpoint_id: str, ends_s: float) -> int:
        """Send the next messages, of which the last begins before the turn ends; how many of them are settled now."""
        parked_before = self._now() - ORDER_GUARD, self._now()
        pending = await self._write(lambda connection: webhook_outbox.pending(connection, endpoint_id, parked_before))
        done: list[Message] = []
        attempts: list[Attempt] = []
        held = set[str]()  # types of which a message failed that the later ones wait for
        for message in pending:
            if message.type in held:
                continue
            endpoint = self._desk.catalogue.webhooks.endpoints[endpoint_id]
            now = self._now()
            if endpoint.deleted_at is not None:
                done.append(message._replace(status="failed", settled_at=now))
                continue
            if endpoint.disabled_at is not None or time.monotonic() >= ends_s:
                break
            if message.due_at <= now:
                attempt = await self._attempt(http, endpoint, message)
                if attempt is None:
                    break
                attempts.append(attempt)
                message = self._after(message, attempt)
                done.append(message)
                if attempt.status_code is None:
                    break
            if message.status == "pending" and now - message.caused_at < ORDER_GUARD:
                held.add(message.type)
        await self._write(lambda connection: webhook_outbox.mark(connection, done, attempts))
        await self._disable_if_gone(endpoint_id, attempts, [one for one in done if one.status == "failed"])
        return sum(one.status != "pending" for one in done)

    def _after(self, message: Message, attempt: Attempt) -> Message:
        now, number = self._now(), message.attempts + 1
        if attempt.status_code is not None and 200 <= attempt.status_code < 300:
            return message._replace(attempts=number, status="delivered", settled_at=now)
        if number >= self._pace.attempts_max or attempt.status_code == GONE:
            return message._replace(attempts=number, status="failed", settled_at=now)
        backoff = Backoff(self._pace.backoff_s, math.inf, JITTER)  # the number of attempts is the bound
        pause_s = backoff.pause_s(number, random.random())  # noqa: S311 (no secret hangs on it)
        return message._replace(attempts=number, due_at=now + timedelta(seconds=pause_s))

    async def _attempt(self, http: httpx.AsyncClient, endpoint: Endpoint, message: Message) -> Attempt | None:
        """What came of sending a message; None where that has to wait for other names to be resolved."""
        started, began_s = self._now(), time.monotonic()
        status_code: int | None = None
        try:
            async with asyncio.timeout(self._pace.timeout_s):
                status_code = await self._post(http, endpoint, message)
                outcome = f"answered {status_code}"
        except Crowded:
            return None
        except (targets.Forbidden, Unresolved) as reason:
            outcome = str(reason)
        except TimeoutError:
            outcome = f"no answer within {self._pace.timeout_s:g} s"
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            outcome = f"no connection: {type(error).__name__}"
        return Attempt(
            id=self._desk.new_id(), message_id=message.id, endpoint_id=endpoint.id, number=message.attempts + 1,
            organization_id=endpoint.organization_id, started_at=started, status_code=status_code, outcome=outcome,
            took_ms=int(1000 * (time.monotonic() - began_s)),
        )  # fmt: skip

    async def _post(self, http: httpx.AsyncClient, endpoint: Endpoint, message: Message) -> int:
        look_up = partial(self._names.addresses, endpoint.organization_id)
        target = await targets.resolve(endpoint.url, look_up, private_allowed=self._private_allowed)
        headers = signed_headers(endpoint, message, self._desk.now()) | {"host": target.host}
        sni = {"sni_hostname": target.server_name}
        async with http.stream(
            "POST", target.url, content=message.body.encode(), headers=headers, extensions=sni
        ) as response:  # fmt: skip
            received = 0
            async for chunk in response.aiter_raw():
                received += len(chunk)
                if received > ANSWER_BYTES_MAX:
                    break
            return response.status_code

    async def _disable_if_gone(self, endpoint_id: str, attempts: list[Attempt], failed: list[Message]) -> None:
        if not failed:
            return
        endpoint = self._desk.catalogue.webhooks.endpoints[endpoint_id]
        since = naive(endpoint.modified_at or endpoint.created_at)
        in_a_row = await self._write(
            lambda connection: webhook_outbox.failures_in_a_row(connection, endpoint_id, since, DISABLE_AFTER)
        )  # fmt: skip
        is_gone = any(attempt.status_code == GONE for attempt in attempts)
        if in_a_row < DISABLE_AFTER and not is_gone:
            return
        reason = "it answered 410" if is_gone else f"{DISABLE_AFTER} messages in a row could not be delivered"
        logger.warning("webhook_endpoint_disabled", endpoint=endpoint_id, reason=reason)
        async with self._desk.deciding:
            endpoint = self._desk.catalogue.webhooks.endpoints[endpoint_id]
            if endpoint.deleted_at is None and endpoint.disabled_at is None:
                now = self._desk.now()
                await self._desk.decide(EndpointSet(replace(endpoint, disabled_at=now, disabled_reason=reason)))


async def _for_ever(work: Callable[[], Awaitable[None]], pause_s: float) -> NoReturn:
    while True:
        with _later():
            await work()
        await asyncio.sleep(pause_s)


@contextlib.contextmanager
def _later() -> Iterator[None]:
    """What fails in here is done again: the outbox has everything. A webhook is no reason to end the process."""
    try:
        yield
    except (Unavailable, TryAgain):
        pass  # between two engines, or the store is busy
    except Exception:
        logger.exception("webhooks_failed")


def signed_headers(endpoint: Endpoint, message: Message, now: datetime) -> dict[str, str]:
    """The headers of a delivery made now."""
    good = [secret.value for secret in endpoint.secrets if secret.expires_at is None or now < secret.expires_at]
    stamp, body = str(int(now.timestamp())), message.body.encode()
    signatures = [signature(key, message.id, stamp, body) for secret in good for key in keys(secret)]
    return {
        "content-type": "application/json",
        "user-agent": USER_AGENT,
        "webhook-api-version": API_VERSION,
        "webhook-id": message.id,
        "webhook-timestamp": stamp,
        "webhook-signature": " ".join(signatures),
    }


def _is_further(one: Heard, other: Heard) -> bool:
    return one != other and one.control >= other.control and _reaches(parse_position(one.events) or {}, other)


def _reaches(position: Mapping[int, int], heard: Heard) -> bool:
    return all(position.get(partition, 0) >= end for partition, end in (parse_position(heard.events) or {}).items())
