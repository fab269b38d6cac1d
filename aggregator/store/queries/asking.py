"""Putting a question to the store, or long work to memory: in a thread, against one snapshot, and not for ever."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Generic, NamedTuple, TypeVar

import duckdb
from msgspec.structs import replace

from aggregator.store.queries.events import Listing
from aggregator.store.queries.feed import Wanted
from aggregator.store.queries.scope import Scope, organization_number
from aggregator.store.queries.usage import Question
from aggregator.view import Snapshot

T = TypeVar("T")
Asked = TypeVar("Asked", Question, Listing, Wanted)


class TooLong(Exception):
    """The question took longer than it may."""


class TooLarge(Exception):
    """The question needs more memory than the store may use."""


class Patience:
    """How long somebody waits for a thread, which has to look for itself."""

    def __init__(self) -> None:
        self.is_over = False

    def each(self, things: Iterable[T]) -> Iterator[T]:
        """The things, one by one, while there is patience. Raises TooLong."""
        for thing in things:
            if self.is_over:
                raise TooLong
            yield thing


class Here(NamedTuple):
    """Where a question is put: a connection that reads one snapshot, and the number of who asks."""

    connection: duckdb.DuckDBPyConnection
    organization: int
    patience: Patience

    def within(self, scope: Scope) -> Scope:
        """The scope, in the organization of who asks: its number is known here and not before."""
        return replace(scope, organization=self.organization)

    def about(self, asked: Asked) -> Asked:
        """What is asked, in the organization of who asks."""
        return replace(asked, scope=self.within(asked.scope))


class Reading(NamedTuple, Generic[T]):
    """An answer, and the ``usage.events`` positions that it is true for."""

    answer: T
    as_of: Mapping[int, int]


class Asking(Generic[T]):
    """One question on its way. ``run`` blocks and belongs to a thread; ``interrupt`` may come from any other."""

    def __init__(
        self, read: Callable[[], AbstractContextManager[Snapshot]], organization_id: str, question: Callable[[Here], T]
    ) -> None:
        self._read, self._organization_id, self._question = read, organization_id, question
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._patience = Patience()

    def run(self) -> Reading[T]:
        """The answer. Raises TooLong, TooLarge, Unavailable."""
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
        """Have ``run`` raise TooLong soon, if it still runs."""
        self._patience.is_over = True
        connection = self._connection
        if connection is not None:
            connection.interrupt()


class Looking(Generic[T]):
    """The same where memory has it all: there is no snapshot, for which a store that is closed would wait."""

    def __init__(self, work: Callable[[Patience], T]) -> None:
        self._work, self._patience = work, Patience()

    def run(self) -> T:
        """What is found. Raises TooLong."""
        return self._work(self._patience)

    def interrupt(self) -> None:
        """Have ``run`` raise TooLong soon, if it still runs."""
        self._patience.is_over = True
