"""A model of the whole: what a log and an aggregator must say after any story of deliveries and restarts.

A story is told to three listeners at once: a real log, an aggregator that follows it in lives cut at any moment, and
a dictionary. Ids are few, so that repetitions and contradictions come by themselves; lines are delivered again,
in another order and in records of another size; some are no events at all. The dictionary knows one rule, first
write wins, and the reference of ``meters`` evaluates what is in it.
"""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st

from aggregator.engine.supervisor import Aggregator
from meters.event import Event, check_line
from meters.event_values import Facts, facts
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Log
from tests.support.faults.store_checks import (
    CUSTOMERS,
    Counted,
    assert_store_tells,
    assert_totals_agree,
    caught_up,
    count,
    ends,
    export,
    metered,
    usage,
)
from tests.support.records import NOW, ORGANIZATION, SMALL, created, decisions, organization
from tests.support.waiting import eventually

IDS = 12
TOKENS = ("1", "2", "0.000000000001", "-3", "99999999999999.5")
BROKEN = (b"{broken", b"\xff\xfe", b"[]", b'{"name":"nameless"}', b'{"name":"call","metadata":{"n":1e999}}')


class Deliver(NamedTuple):
    """Lines, in so many records for each partition."""

    lines: tuple[tuple[int, str], ...]  # number of the id, tokens
    records: int


class Repeat(NamedTuple):
    """Lines that were delivered before, by their place in the story (wrapped around)."""

    places: tuple[int, ...]
    records: int


class Break(NamedTuple):
    """A record that holds no event, or an event among garbage."""

    raw: bytes
    customer: int


class Restart(NamedTuple):
    """The aggregator ends wherever it is, and another one takes its place."""


class Look(NamedTuple):
    """Everybody catches up, and is compared."""


Step = Deliver | Repeat | Break | Restart | Look
_lines = st.tuples(st.integers(0, IDS - 1), st.sampled_from(TOKENS))
_some = st.integers(1, 3)
steps: st.SearchStrategy[Step] = st.one_of(
    st.builds(Deliver, st.lists(_lines, min_size=1, max_size=8).map(tuple), _some),
    st.builds(Repeat, st.lists(st.integers(0, 40), min_size=1, max_size=10).map(tuple), _some),
    st.builds(Break, st.sampled_from(BROKEN), st.integers(0, len(CUSTOMERS) - 1)),
    st.just(Restart()),
    st.just(Look()),
)
stories = st.lists(steps, min_size=4, max_size=14)


class World:
    """The three listeners. ``place`` gives a customer's partition; ``open_log`` another opener of the same log."""

    def __init__(self, open_log: Callable[[], Log], store: Path, place: Callable[[str], int]) -> None:
        self._open_log, self._store, self._place = open_log, store, place
        self.log = open_log()
        asyncio.run(self.log.append(USAGE_CONTROL, decisions([organization(), *created(*metered())])))
        self._delivered: list[bytes] = []
        self._first: dict[str, bytes] = {}
        self._lines = 0
        self._aggregator = self._started()

    def _started(self) -> Aggregator:
        aggregator = Aggregator(self.log, self._store, SMALL)
        aggregator.start()
        return aggregator

    def tell(self, step: Step) -> None:
        """One step of the story."""
        if isinstance(step, Deliver):
            ids = [(f"e{number}", CUSTOMERS[number % len(CUSTOMERS)], tokens) for number, tokens in step.lines]
            lines = [usage(id, customer, tokens) for id, customer, tokens in ids]
            for (id, _, _), line in zip(ids, lines, strict=True):
                self._first.setdefault(id, line)
            self._deliver(lines, step.records)
            self._delivered += lines
        elif isinstance(step, Repeat) and self._delivered:
            self._deliver([self._delivered[place % len(self._delivered)] for place in step.places], step.records)
        elif isinstance(step, Break):
            self._append(self._place(CUSTOMERS[step.customer]), [step.raw])
        elif isinstance(step, Restart):
            self._aggregator.stop()
            assert self._aggregator.failure is None
            self.log.close()
            self.log = self._open_log()
            self._aggregator = self._started()
        elif isinstance(step, Look):
            self._compare()

    def _deliver(self, lines: list[bytes], records: int) -> None:
        by_partition: dict[int, list[bytes]] = {}
        for line in lines:
            event = check_line(line, organization_id=ORGANIZATION, now=NOW)
            assert isinstance(event, Event)
            by_partition.setdefault(self._place(event.external_customer_id or ""), []).append(line)
        for partition, group in by_partition.items():
            size = -(-len(group) // records)
            for start in range(0, len(group), size):
                self._append(partition, group[start : start + size])

    def _append(self, partition: int, lines: list[bytes]) -> None:
        value = b"\n".join(lines)
        asyncio.run(self.log.append(USAGE_EVENTS, [Entry(value, partition, ORGANIZATION)]))
        self._lines += len(lines)

    def _expected(self) -> Mapping[tuple[str, str], Facts]:
        events = {id: check_line(line, organization_id=ORGANIZATION, now=NOW) for id, line in self._first.items()}
        return {(ORGANIZATION, id): facts(event, NOW) for id, event in events.items() if isinstance(event, Event)}

    def _compare(self) -> Counted:
        eventually(lambda: caught_up(self._aggregator, ends(self.log)))
        counted = count(self.log)
        assert sum(counted.tallies.values()) == self._lines
        assert set(counted.stored) == set(self._expected())
        for made in (counted._replace(stored=dict(self._expected())), counted):
            assert_totals_agree(self._aggregator, made)
        return counted

    def end(self) -> None:
        """The last comparison, and of every row of the store."""
        counted = self._compare()
        self.close()
        assert_store_tells(export(self._store), counted)

    def close(self) -> None:
        """Stop what runs."""
        self._aggregator.stop()
        self.log.close()
