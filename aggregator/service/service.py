"""The query service: runs queries and decisions for one organization at a time, without HTTP.

``Desk`` is shared by the API's routes and the webhook sender. ``ask`` runs a store query and ``look`` long work over
memory, each in a thread, because both block; short answers from memory stay on the event loop. ``Line`` limits how
many run and how many wait, in total and for each organization, so one organization cannot starve the others. Too many
waiting requests raise ``Busy``, too long ones ``TooLong``.

``decide`` appends changes to the log and waits until they are applied. Decisions are made one after the other under
``deciding``, each against the state that the previous one left.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from datetime import datetime
from functools import partial
from typing import Generic, NamedTuple, Protocol, TypeVar
from weakref import WeakValueDictionary

import duckdb
from msgspec.structs import replace

from aggregator.service.errors import (
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
    TURN_S_MAX,
    VERIFICATIONS_AT_ONCE,
    VERIFICATIONS_WAITING_MAX,
    WAITS_MAX,
    WAITS_OF_ONE_MAX,
    Busy,
    TooLarge,
    TooLong,
)
from aggregator.service.polar_inbox import Inbox
from aggregator.store.queries.events import Listing
from aggregator.store.queries.feed import Wanted
from aggregator.store.queries.scope import Scope, organization_number
from aggregator.store.queries.usage import Question
from aggregator.view import Snapshot, Unavailable, View
from meters.catalogue.catalogue import Catalogue, Change, Customer, Token
from meters.log import TryAgain
from meters.timestamps import instant_of, microseconds_of

T = TypeVar("T")
Found = TypeVar("Found", covariant=True)
Asked = TypeVar("Asked", Question, Listing, Wanted)


class Patience:
    """A cancellation flag that long loops in a thread must poll."""

    def __init__(self) -> None:
        self.is_over = False

    def each(self, things: Iterable[T]) -> Iterator[T]:
        """Yield the items until the flag is set. Raises TooLong."""
        for thing in things:
            if self.is_over:
                raise TooLong
            yield thing


class Here(NamedTuple):
    """The context of one store query: a connection on one snapshot, and the number of the organization that asks."""

    connection: duckdb.DuckDBPyConnection
    organization: int
    patience: Patience

    def within(self, scope: Scope) -> Scope:
        """Return the scope for the organization that asks. All numbers in it are those of the snapshot."""
        subjects = scope.subjects() if callable(scope.subjects) else scope.subjects
        return replace(scope, organization=self.organization, subjects=subjects)

    def about(self, asked: Asked) -> Asked:
        """Return the question for the organization that asks."""
        return replace(asked, scope=self.within(asked.scope))


class Reading(NamedTuple, Generic[T]):
    """An answer, and the ``usage.events`` positions that it reflects."""

    answer: T
    as_of: Mapping[int, int]


class Order(NamedTuple):
    """The field that a list is sorted by, and the direction."""

    by: str
    ascending: bool


class Page(NamedTuple):
    """The part of a list that is asked for."""

    limit: int
    offset: int


class _Work(Protocol[Found]):
    def run(self) -> Found: ...

    def interrupt(self) -> None: ...


class Asking(Generic[T]):
    """One store query. ``run`` blocks and belongs to a thread; ``interrupt`` may come from any other thread."""

    def __init__(
        self, read: Callable[[], AbstractContextManager[Snapshot]], organization_id: str, question: Callable[[Here], T]
    ) -> None:
        self._read, self._organization_id, self._question = read, organization_id, question
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._patience = Patience()

    def run(self) -> Reading[T]:
        """Return the answer. Raises TooLong, TooLarge, Unavailable."""
        with self._read() as snapshot:
            self._connection = snapshot.connection
            try:
                number = organization_number(snapshot.connection, self._organization_id)
                return Reading(self._question(Here(snapshot.connection, number, self._patience)), snapshot.as_of)
            except duckdb.InterruptException as error:
                raise TooLong from error
            except duckdb.OutOfMemoryException as error:
                raise TooLarge from error
            finally:
                self._connection = None

    def interrupt(self) -> None:
        """Make ``run`` raise TooLong soon, if it still runs."""
        self._patience.is_over = True
        connection = self._connection
        if connection is not None:
            connection.interrupt()


class Looking(Generic[T]):
    """Long work over memory. It opens no snapshot, so it does not wait for a store that is being closed."""

    def __init__(self, work: Callable[[Patience], T]) -> None:
        self._work, self._patience = work, Patience()

    def run(self) -> T:
        """Return the result. Raises TooLong."""
        return self._work(self._patience)

    def interrupt(self) -> None:
        """Make ``run`` raise TooLong soon, if it still runs."""
        self._patience.is_over = True


class Waits:
    """A bounded number of waiting requests, in total and for each organization."""

    def __init__(self, most: int, of_one_max: int) -> None:
        self._most, self._of_one_max = most, of_one_max
        self._waiting: Counter[str] = Counter()

    @property
    def now(self) -> int:
        """The number of waiting requests."""
        return self._waiting.total()

    @contextmanager
    def of(self, organization_id: str) -> Iterator[None]:
        """Count one more waiting request until the block ends. Raises Busy."""
        if self.now >= self._most or self._waiting[organization_id] >= self._of_one_max:
            raise Busy
        self._waiting[organization_id] += 1
        try:
            yield
        finally:
            self._waiting -= Counter([organization_id])  # drops organizations that reach zero


class Line:
    """A concurrency limit, in total and for each organization, with a bounded queue.

    The limits of one organization are lower than the total, so that one cannot starve the others.
    """

    def __init__(self, at_once: int, of_one: int, waits: Waits) -> None:
        self._turns, self._of_one, self.waits = asyncio.Semaphore(at_once), of_one, waits
        self._own: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def enter(self, organization_id: str) -> Callable[[], None]:
        """Wait for the organization's own limit, then for the total; return the function that releases both.

        Raises Busy when the queue is full, and after TURN_S_MAX.
        """
        own = self._own.setdefault(organization_id, asyncio.Semaphore(self._of_one))
        with self.waits.of(organization_id), ExitStack() as held:
            try:
                async with asyncio.timeout(TURN_S_MAX):
                    for turns in (own, self._turns):
                        await turns.acquire()
                        held.callback(turns.release)
            except TimeoutError as error:
                raise Busy from error
            return held.pop_all().close

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Hold the limit for a request that names no organization. Raises Busy."""
        leave = await self.enter("")
        try:
            yield
        finally:
            leave()


def _interrupt(asking: _Work[T], work: "asyncio.Future[T]") -> None:
    """Interrupt again and again until the work has ended: between two statements an interrupt has no effect."""
    if not work.done():
        asking.interrupt()
        asyncio.get_running_loop().call_later(INTERRUPT_AGAIN_S, _interrupt, asking, work)


def _ended(leave: Callable[[], None], work: "asyncio.Future[T]") -> None:
    leave()  # now that its thread is free
    if not work.cancelled():
        work.exception()  # marks it as retrieved: the caller may be gone


class Deciding:
    """The lock under which decisions are made.

    After a decision whose outcome is uncertain, the next one waits until everything durable is applied: it may be a
    retry of the same decision.
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
    """The service that the API's routes and the webhook sender share; one for each process.

    ``now`` and ``new_id`` give the time and new ids; tests pass their own. ``settled_s`` after a moment, everything
    that was stamped before the moment is in the log.
    """

    def __init__(
        self, view: View, now: Callable[[], datetime], new_id: Callable[[], str], settled_s: float = SETTLED_S
    ) -> None:
        self.view, self.now, self.new_id, self.settled_s = view, now, new_id, settled_s
        waiting = Waits(QUERIES_WAITING_MAX, QUERIES_OF_ONE_WAITING_MAX)
        self._asking = Line(QUERIES_AT_ONCE, QUERIES_OF_ONE_AT_ONCE, waiting)
        self._threads = ThreadPoolExecutor(QUERIES_AT_ONCE, "question")  # no other work waits for these threads
        self.waits = Waits(WAITS_MAX, WAITS_OF_ONE_MAX)
        self.deciding = Deciding(view)
        crowd = Waits(VERIFICATIONS_WAITING_MAX, VERIFICATIONS_WAITING_MAX)
        self.verifying = Line(VERIFICATIONS_AT_ONCE, VERIFICATIONS_AT_ONCE, crowd)
        self._settling: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self.inbox = Inbox()
        self.requests_at_work: set[bytes] = set()  # names of requests with an Idempotency-Key

    @property
    def catalogue(self) -> Catalogue:
        """Organizations, customers and meters."""
        return self.view.catalogue

    @property
    def clock_ahead_us(self) -> int:
        """Microseconds by which the log's clock is ahead of this machine's; 0 where it is not. Raises Unavailable."""
        return max(0, self.view.newest_stamp_us - microseconds_of(self.now()))

    def decided_at(self) -> datetime:
        """Return the time of a decision that is made now. Raises Unavailable.

        It is later than every time that one of our own processes put on a record, also where the clock was ahead and
        has gone back since. Otherwise a reset would leave usage in its window that was there before it.
        """
        return instant_of(self.view.newest_stamp_us + 1) if self.clock_ahead_us else self.now()

    def settling(self, organization_id: str, customer: str) -> asyncio.Lock:
        """Return the lock for decisions about one customer alone, so that those about others run at the same time."""
        return self._settling.setdefault((organization_id, customer), asyncio.Lock())

    @asynccontextmanager
    async def turn(self, organization_id: str, *customer_ids: str) -> AsyncIterator[None]:
        """Hold what moves the balances of these customers. Whatever moves one takes its turn by the customer's id.

        Locks are taken in one order, so that two who want the same customers do not wait for each other for ever.
        """
        async with AsyncExitStack() as held:
            for id in sorted(set(customer_ids)):
                await held.enter_async_context(self.settling(organization_id, id))
            yield

    @asynccontextmanager
    async def turn_of(self, find: Callable[[], Customer]) -> AsyncIterator[None]:
        """Hold what moves one customer's balance. ``find`` may find another customer after the wait: two became one."""
        is_held = False
        while not is_held:
            customer = find()
            async with self.turn(customer.organization_id, customer.id):
                if is_held := find().id == customer.id:
                    yield

    async def ask(self, token: Token, question: Callable[[Here], T]) -> Reading[T]:
        """Run a store query for the token's organization. Raises Busy, TooLong, TooLarge, Unavailable."""
        return await self.ask_about(token.organization_id, question)

    async def ask_about(self, organization_id: str, question: Callable[[Here], T]) -> Reading[T]:
        """Run a store query for an organization, without a token. Raises Busy, TooLong, TooLarge, Unavailable."""
        return await self._in_line(organization_id, Asking(self.view.read, organization_id, question))

    async def look(self, token: Token, work: Callable[[Patience], T]) -> T:
        """Run long work over memory, under the same limits as a query. Raises Busy, TooLong, Unavailable."""
        return await self._in_line(token.organization_id, Looking(work))

    async def _in_line(self, organization_id: str, asking: _Work[T]) -> T:
        leave = await self._asking.enter(organization_id)
        work = asyncio.get_running_loop().run_in_executor(self._threads, asking.run)
        work.add_done_callback(partial(_ended, leave))  # the thread may outlast the caller
        try:
            await asyncio.wait({work}, timeout=QUERY_S_MAX)
        finally:
            _interrupt(asking, work)  # does nothing unless the time is up or the caller was cancelled
        await asyncio.wait({work})
        return work.result()

    def close(self) -> None:
        """Wait until the last query has ended."""
        self._threads.shutdown()

    async def decide(self, *changes: Change) -> None:
        """Make decisions true, all or none. The caller has held ``deciding`` since before it read the catalogue.

        Without changes, nothing is written to the log.
        """
        if changes:
            await self.view.decide(*changes)

    async def decide_each(self, decisions: Iterable[Sequence[Change]]) -> None:
        """Make many decisions true, each of them all or none. After a failure the earlier ones stay: retry the rest."""
        together: list[Change] = []
        for changes in decisions:
            if together and len(together) + len(changes) > CHANGES_AT_ONCE:
                await self.decide(*together)
                together = []
            together += changes
        if together:
            await self.decide(*together)

    def whose(
        self, token: Token, customer_ids: list[str] | None, external_ids: list[str] | None
    ) -> Callable[[], list[int]] | None:
        """Return what looks up the numbers of the given customers, for a scope; None where no customer is given."""
        if customer_ids is None and external_ids is None:
            return None
        return lambda: self.subjects(token, customer_ids, external_ids) or []

    def subjects(
        self, token: Token, customer_ids: list[str] | None, external_ids: list[str] | None
    ) -> list[int] | None:
        """Return the numbers of the given customers, under every name of each; None where no customer is given."""
        if customer_ids is None and external_ids is None:
            return None
        names = self.catalogue.names(token.organization_id, customer_ids or (), external_ids or ())
        return sorted(self.view.directory.find(token.organization_id, names))
