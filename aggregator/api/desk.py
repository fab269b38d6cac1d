"""What every endpoint needs: who asks, what they may see, and a place to put the question.

Answers from memory are given on the event loop, if they are short. Questions to the store block, so each gets a thread,
as does what takes long in memory; only a few run at a time and only so many wait. Decisions are taken one after the
other, each against what the last one made true.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Protocol, TypeVar
from weakref import WeakValueDictionary

from fastapi import Depends, Request, Response

from aggregator.api.errors import BodyTooLarge, Forbidden, Malformed, json_response
from aggregator.api.limits import (
    BODY_BYTES_MAX,
    CHANGES_AT_ONCE,
    IN_DOUBT_S,
    INTERRUPT_AGAIN_S,
    QUERIES_AT_ONCE,
    QUERIES_OF_ONE_AT_ONCE,
    QUERIES_OF_ONE_WAITING_MAX,
    QUERIES_WAITING_MAX,
    QUERY_S_MAX,
    RETRY_AFTER_S,
    SETTLED_S,
    VERIFICATIONS_AT_ONCE,
    VERIFICATIONS_WAITING_MAX,
    WAIT_S_MAX,
    WAITS_MAX,
    WAITS_OF_ONE_MAX,
)
from aggregator.api.line import Line, Waits
from aggregator.store.queries.asking import Asking, Here, Looking, Patience, Reading
from aggregator.view import Unavailable, View
from meters import exact_json
from meters.access import Denied, authorize
from meters.catalogue import Catalogue, Change, Token
from meters.detail import detail
from meters.log import TryAgain, format_position, parse_position

T = TypeVar("T")
Found = TypeVar("Found", covariant=True)


class _Work(Protocol[Found]):
    def run(self) -> Found: ...

    def interrupt(self) -> None: ...


def _interrupt(asking: _Work[Any], work: "asyncio.Future[Any]") -> None:
    """Until it has ended: between two statements there is nothing to interrupt."""
    if not work.done():
        asking.interrupt()
        asyncio.get_running_loop().call_later(INTERRUPT_AGAIN_S, _interrupt, asking, work)


def _ended(leave: Callable[[], None], work: "asyncio.Future[Any]") -> None:
    leave()  # now that its thread is free
    if not work.cancelled():
        work.exception()  # nobody may be left to hear of it


class Deciding:
    """Decisions are taken one after the other, by whoever holds this.

    Where nobody could say whether a decision is true, the next one waits until everything durable is heard of: it may
    be the same one, asked for again.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._lock = asyncio.Lock()
        self._in_doubt = False

    async def __aenter__(self) -> None:
        await self._lock.acquire()
        try:
            if self._in_doubt and not await self._view.informed(IN_DOUBT_S):
                raise Unavailable("a decision before this one is not applied yet", RETRY_AFTER_S)
            self._in_doubt = False
        except BaseException:
            self._lock.release()
            raise

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._in_doubt |= isinstance(error, Unavailable | TryAgain | asyncio.CancelledError)
        self._lock.release()


class Desk:
    """The one object that endpoints share. ``now`` and ``new_id`` are the world's; a test brings its own.

    ``settled_s`` after a moment everything that was stamped before it is in the log.
    """

    def __init__(
        self, view: View, now: Callable[[], datetime], new_id: Callable[[], str], settled_s: float = SETTLED_S
    ) -> None:
        self.view, self.now, self.new_id, self.settled_s = view, now, new_id, settled_s
        waiting = Waits(QUERIES_WAITING_MAX, QUERIES_OF_ONE_WAITING_MAX)
        self._asking = Line(QUERIES_AT_ONCE, QUERIES_OF_ONE_AT_ONCE, waiting)
        self._threads = ThreadPoolExecutor(QUERIES_AT_ONCE, "question")  # of their own, so that nothing waits for them
        self.waits = Waits(WAITS_MAX, WAITS_OF_ONE_MAX)
        self.deciding = Deciding(view)
        crowd = Waits(VERIFICATIONS_WAITING_MAX, VERIFICATIONS_WAITING_MAX)
        self.verifying = Line(VERIFICATIONS_AT_ONCE, VERIFICATIONS_AT_ONCE, crowd)
        self._settling: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self.keys_at_work: set[tuple[str, str | None]] = set()  # organizations' Idempotency-Keys

    @property
    def catalogue(self) -> Catalogue:
        """Organizations, customers and meters."""
        return self.view.catalogue

    def settling(self, organization_id: str, customer: str) -> asyncio.Lock:
        """What decisions about one customer alone hold, so that those about different customers are made together."""
        return self._settling.setdefault((organization_id, customer), asyncio.Lock())

    async def ask(self, token: Token, question: Callable[[Here], T]) -> Reading[T]:
        """Put a question to the store for the token's organization. Raises Busy, TooLong, TooLarge, Unavailable."""
        return await self.ask_about(token.organization_id, question)

    async def ask_about(self, organization_id: str, question: Callable[[Here], T]) -> Reading[T]:
        """The same where nobody shows a token."""
        return await self._in_line(organization_id, Asking(self.view.read, organization_id, question))

    async def look(self, token: Token, work: Callable[[Patience], T]) -> T:
        """Have long work done over memory, in the same line. Raises Busy, TooLong, Unavailable."""
        return await self._in_line(token.organization_id, Looking(work))

    async def _in_line(self, organization_id: str, asking: _Work[T]) -> T:
        leave = await self._asking.enter(organization_id)
        work = asyncio.get_running_loop().run_in_executor(self._threads, asking.run)
        work.add_done_callback(partial(_ended, leave))  # the thread may outlast whoever asked
        try:
            await asyncio.wait({work}, timeout=QUERY_S_MAX)
        finally:
            _interrupt(asking, work)  # it takes too long, or whoever asked has gone; else this does nothing
        await asyncio.wait({work})
        return work.result()

    def close(self) -> None:
        """Wait until the last question has ended."""
        self._threads.shutdown()

    async def decide(self, *changes: Change) -> None:
        """Make decisions true, all or none. The caller holds ``deciding`` from before it looked at the catalogue.

        Where there is nothing to decide nothing is written down.
        """
        if changes:
            await self.view.decide(*changes)

    async def decide_each(self, decisions: Iterable[Sequence[Change]]) -> None:
        """Make many decisions true, each of them all or none. What fails leaves those before it: ask for the rest."""
        together: list[Change] = []
        for changes in decisions:
            if together and len(together) + len(changes) > CHANGES_AT_ONCE:
                await self.decide(*together)
                together = []
            together += changes
        if together:
            await self.decide(*together)

    def subjects(
        self, token: Token, customer_ids: list[str] | None, external_ids: list[str] | None
    ) -> list[int] | None:
        """The numbers of the customers asked for, under either name of each; None when nobody in particular is."""
        if customer_ids is None and external_ids is None:
            return None
        organization = token.organization_id
        ids, externals = self.catalogue.identifiers(organization, customer_ids or (), external_ids or ())
        find = self.view.directory.find
        numbers = {number for id in ids for number in find(organization, None, id)}
        numbers |= {number for name in externals for number in find(organization, name, None)}
        return sorted(numbers)


async def desk(request: Request) -> Desk:
    """The desk of the app that serves the request. A coroutine, because other dependencies are run in threads."""
    found: Desk = request.app.state.desk
    return found


def allow(scopes: frozenset[str]) -> Callable[[Request], Awaitable[Token]]:
    """A dependency: the caller's token, which has one of the scopes. Only for who has one ``Prefer: wait`` waits."""

    async def who(request: Request) -> Token:
        here = await desk(request)
        outcome = authorize(request.headers.get("authorization"), scopes, here.catalogue, here.now())
        if isinstance(outcome, Denied):
            raise Forbidden(outcome)
        await caught_up(request, outcome.organization_id)
        return outcome

    return who


async def caught_up(request: Request, organization_id: str) -> None:
    """Honor ``Prefer: wait=N`` with a ``Log-Position``: read what was written, if it becomes visible in time.

    Raises Busy where too many wait for that already.
    """
    seconds = _wait_seconds(",".join(request.headers.getlist("prefer")))
    text = request.headers.get("log-position")
    if seconds is None or not text:
        return
    position = parse_position(text)
    if position is None:
        message = "Input should be positions such as 0:18,1:7"
        raise Malformed([detail("value_error", ("header", "Log-Position"), message, text)])
    here = await desk(request)
    if not await here.view.wait_for(position, 0):
        with here.waits.of(organization_id):
            await here.view.wait_for(position, min(seconds, WAIT_S_MAX))


def _wait_seconds(prefer: str) -> int | None:
    """The ``wait`` of Prefer headers (RFC 7240), whose preferences may have parameters; None where there is none."""
    for preference in prefer.lower().split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        value = value.strip(' "')
        if name.strip() == "wait" and value.isascii() and value.isdigit():
            return int(value[:6])
    return None


AtDesk = Annotated[Desk, Depends(desk)]


async def body_of(request: Request, *, otherwise: Any = None) -> Any:
    """The request's JSON with exact numbers; ``otherwise`` where there is none. Raises BodyTooLarge, Malformed."""
    received = await bytes_of(request)
    if not received and otherwise is not None:
        return otherwise
    if not received:
        raise Malformed([detail("missing", ("body",), "Field required")])
    return decoded(received)


async def bytes_of(request: Request, bytes_max: int = BODY_BYTES_MAX) -> bytes:
    """The request's body as it was sent. Raises BodyTooLarge."""
    received = bytearray()
    async for chunk in request.stream():
        received += chunk
        if len(received) > bytes_max:
            raise BodyTooLarge
    return bytes(received)


def decoded(body: bytes) -> Any:
    """A body's JSON with exact numbers. Raises Malformed."""
    try:
        return exact_json.decode(body)
    except ValueError as error:
        place = getattr(error, "pos", 0)
        raise Malformed([detail("json_invalid", ("body", place), "JSON decode error", {})]) from error


def answer(body: Any, as_of: Mapping[int, int], status: int = 200) -> Response:
    """A response that says as of which positions it is true."""
    return json_response(status, body, {"As-Of": format_position(as_of)})
