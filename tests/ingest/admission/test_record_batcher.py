"""Requests written together: every line is where its request was told, in order, and no request fails for another."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.admission.batching import GROUP_BYTES_MAX, RECORD_BYTES_MAX, Gather, together
from ingest.log.memory import Disk, MemoryLog
from ingest.log.partitions import Limits
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Record, Refused, TryAgain
from tests.support.waiting import until

PARTITIONS = 3


class Slow(MemoryLog):
    """A log whose appends return only when they may, and that counts those that wait."""

    def __init__(self, disk: Disk, limits: Limits | None = None) -> None:
        super().__init__(disk, lambda: time.time_ns() // 1000, limits or Limits())
        self.may_return = asyncio.Event()
        self.waiting = self.most_waiting = 0

    def submit(self, stream: str, entries: Sequence[Entry]) -> asyncio.Future[list[int]]:
        """See the port."""
        return asyncio.ensure_future(self._append(stream, entries))

    async def _append(self, stream: str, entries: Sequence[Entry]) -> list[int]:
        self.waiting += 1
        self.most_waiting = max(self.waiting, self.most_waiting)
        try:
            await self.may_return.wait()
            return await super().submit(stream, entries)
        finally:
            self.waiting -= 1


def disk() -> Disk:
    """An empty one."""
    return Disk({USAGE_EVENTS: PARTITIONS, USAGE_CONTROL: 1})


def records(log: MemoryLog) -> list[Record]:
    """All of them, by partition."""
    found = [log.read(USAGE_EVENTS, {partition: 0}, bytes_max=1 << 30) for partition in range(PARTITIONS)]
    return [record for some in found for record in some]


async def turns(count: int = 20) -> None:
    """Let everything happen that can."""
    for _ in range(count):
        await asyncio.sleep(0)


ENTRIES = st.lists(
    st.builds(
        lambda partition, lines, organization, distinct: Entry(
            b"\n".join(b'{"n":%d}' % line for line in lines), partition, organization, True, distinct
        ),
        st.integers(0, PARTITIONS - 1), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from("ab"),
        st.booleans(),
    ),
    min_size=1, max_size=3, unique_by=lambda entry: entry.partition,
)  # fmt: skip


@given(st.lists(ENTRIES, max_size=8))
def test_lines_stay_what_they_are_and_in_order(requests: list[list[Entry]]) -> None:
    """By organization and what is known of them, all lines of a partition are there in the order of the requests."""
    waiting = [entry for request in requests for entry in request if entry.partition == 0]
    entries, places = together(waiting) if waiting else ([], [])

    def lines(of: Sequence[Entry]) -> dict[Any, list[bytes]]:
        found: dict[Any, list[bytes]] = {}
        for entry in of:
            kind = entry.partition, entry.organization_id, entry.admitted, entry.distinct_keys
            found.setdefault(kind, []).extend(entry.value.split(b"\n"))
        return found

    assert lines(entries) == lines(waiting)
    assert len(entries) == len(lines(waiting))
    for entry, place in zip(waiting, places, strict=True):
        assert entry.value in entries[place].value


@given(st.lists(ENTRIES, min_size=1, max_size=8))
def test_a_position_is_behind_the_lines_of_its_request(requests: list[list[Entry]]) -> None:
    """Whoever reads up to it has read all of them."""

    async def run() -> None:
        log = MemoryLog(disk(), lambda: 0, Limits())
        gather = Gather(log)
        positions = await asyncio.gather(*map(gather.append, requests))
        assert sum(record.value.count(b"{") for record in records(log)) == sum(
            entry.value.count(b"{") for request in requests for entry in request
        )
        for request, position in zip(requests, positions, strict=True):
            assert position.keys() == {entry.partition for entry in request}
            for entry in request:
                before = log.read(USAGE_EVENTS, {entry.partition: 0}, bytes_max=1 << 30)[: position[entry.partition]]
                assert any(entry.value in record.value for record in before)

    asyncio.run(run())


def test_what_comes_meanwhile_is_one_record() -> None:
    """A request that comes alone is written at once; those that come while it is under way, together."""

    async def run() -> None:
        log = Slow(disk())
        gather = Gather(log)
        asked = []
        for number in range(40):
            asked.append(asyncio.ensure_future(gather.append([Entry(b'{"n":%d}' % number, 0, "a", True)])))
            await turns()
        assert log.most_waiting == 1
        log.may_return.set()
        await asyncio.gather(*asked)
        values = [record.value for record in records(log)]
        assert [value.count(b"{") for value in values] == [1, 39]
        assert b"\n".join(values) == b"\n".join(b'{"n":%d}' % number for number in range(40))

    asyncio.run(run())


def test_much_does_not_wait_for_company() -> None:
    """Beyond so many bytes an append begins whatever is under way; and no record grows beyond its own bound."""

    async def run() -> None:
        log = Slow(disk())
        gather = Gather(log)
        value = b'{"n":"%s"}' % (b"x" * (RECORD_BYTES_MAX // 3))
        count = 4 * GROUP_BYTES_MAX // len(value)
        asked = [asyncio.ensure_future(gather.append([Entry(value, 0, "a", True)])) for _ in range(count)]
        await turns()
        assert log.most_waiting > 1
        log.may_return.set()
        await asyncio.gather(*asked)
        assert sum(record.value.count(b"{") for record in records(log)) == count
        assert max(len(record.value) for record in records(log)) <= RECORD_BYTES_MAX

    asyncio.run(run())


def test_a_log_that_cannot_write_is_told_to_everybody() -> None:
    """And what comes later is written."""

    async def run() -> None:
        there = disk()
        gather = Gather(MemoryLog(there, lambda: 0, Limits()))
        entry = Entry(b"{}", 0, "a", True)
        there.full = True
        outcomes = await asyncio.gather(*(gather.append([entry]) for _ in range(5)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [TryAgain] * 5
        there.full = False
        assert await gather.append([entry]) == {0: 1}

    asyncio.run(run())


def test_a_refusal_is_of_one_request() -> None:
    """Those that were gathered with it are written."""

    async def run() -> None:
        log = MemoryLog(disk(), lambda: 0, Limits(value_bytes_max=100))
        gather = Gather(log)
        small, large = Entry(b"{}", 0, "a", True), Entry(b'"' + b"x" * 200 + b'"', 0, "a", True)
        outcomes = await asyncio.gather(*(gather.append([entry]) for entry in (small, large, small)),
                                        return_exceptions=True)  # fmt: skip
        assert outcomes[0] == {0: 1}
        assert isinstance(outcomes[1], Refused)
        assert outcomes[2] == {0: 2}

    asyncio.run(run())


def test_one_that_does_not_wait_any_more_is_written_all_the_same() -> None:
    """Its line may be in a record with others."""

    async def run() -> None:
        log = Slow(disk())
        gather = Gather(log)
        entries = [Entry(b'{"n":%d}' % number, 0, "a", True) for number in range(9)]
        asked = [asyncio.ensure_future(gather.append([entry])) for entry in entries]
        await turns()
        asked[4].cancel()
        log.may_return.set()
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(outcomes[4], asyncio.CancelledError)
        assert all(outcome == {0: 1} for number, outcome in enumerate(outcomes) if number != 4)

    asyncio.run(run())


@pytest.mark.parametrize("organizations", [("a", "b"), ("a", None)])
def test_organizations_have_records_of_their_own(organizations: tuple[str | None, str | None]) -> None:
    """Whose lines they are stands beside a record, once."""
    entries, places = together([Entry(b"{}", 0, organization, True) for organization in organizations])
    assert [entry.organization_id for entry in entries] == list(organizations)
    assert places == [0, 1]


def test_a_partition_that_stands_still_holds_up_nobody_else() -> None:
    """Requests for others are answered; those that have lines for it, too, wait."""

    class Away(Slow):
        def submit(self, stream: str, entries: Sequence[Entry]) -> asyncio.Future[list[int]]:
            if entries[0].partition == 0:
                return super().submit(stream, entries)
            return MemoryLog.submit(self, stream, entries)

    async def run() -> None:
        log = Away(disk())
        gather = Gather(log)
        entries = [Entry(b"{}", partition, "a", True) for partition in range(2)]
        held = [asyncio.ensure_future(gather.append(of)) for of in ([entries[0]], entries) for _ in range(5)]
        for _ in range(5):
            assert 1 in await gather.append([entries[1]])
        assert not any(task.done() for task in held)
        log.may_return.set()
        assert all(0 in position for position in await asyncio.gather(*held))

    asyncio.run(run())


def test_the_failure_of_a_partition_is_told_to_those_with_lines_for_it() -> None:
    """Of requests that were read as one, the first hears its own position and nothing of the other partition."""
    away = TryAgain("its broker is away")

    class Failing(Slow):
        async def _append(self, stream: str, entries: Sequence[Entry]) -> list[int]:
            if entries[0].partition == 1:
                raise away
            return await MemoryLog.submit(self, stream, entries)

    async def run() -> None:
        told = dict[int, object]()

        def tell(numbers: Sequence[int], outcome: object) -> None:
            told.update(dict.fromkeys(numbers, outcome))

        entries = [Entry(b"{}", partition, "a", True) for partition in range(2)]
        gather = Gather(Failing(disk()))
        gather.put_together(entries, [0b01, 0b10, 0b11], tell)
        await until(lambda: len(told) == 3)
        assert told == {0: {0: 1}, 1: away, 2: away}

    asyncio.run(run())


def test_one_that_cannot_be_told_keeps_nobody_from_it() -> None:
    """Those of its group are told, and what waits behind it is written."""

    async def run() -> None:
        log = Slow(disk())
        gather, told = Gather(log), list[object]()
        entry = Entry(b"{}", 0, "a", True)
        for number in range(9):
            gather.put([entry], told.append if number % 2 else lambda _: 1 // 0)
            await turns()
        log.may_return.set()
        assert await gather.append([entry])
        assert len(told) == 4

    asyncio.run(run())
