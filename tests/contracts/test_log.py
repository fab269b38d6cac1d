"""What every log promises (``meters.log``), held against every implementation in ``log_worlds.WORLDS``."""

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Log, PositionLost, Record, Refused, TryAgain, newest_stamp_us
from tests.contracts.log_implementations import LIMITS, PARTITIONS, WORLDS, World
from tests.support.waiting import eventually

PROCESSES = 3
APPENDS_A_PROCESS = 40
PLENTY = 1 << 30


@pytest.fixture(params=WORLDS, ids=lambda kind: kind.__name__)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """A fresh world of each kind."""
    made: World = request.param(tmp_path)
    yield made
    made.close()


def append(log: Log, *values: bytes, partition: int = 0, stream: str = USAGE_EVENTS) -> list[int]:
    """Append the values in one call."""
    return asyncio.run(log.append(stream, [Entry(value, partition) for value in values]))


def read(log: Log, position: int = 0, partition: int = 0, bytes_max: int = PLENTY) -> list[Record]:
    """What there is in one partition from the position on, without waiting."""
    return log.read(USAGE_EVENTS, {partition: position}, bytes_max=bytes_max)


def read_if_it_can(log: Log) -> list[Record]:
    """As ``read``; nothing where it is to be tried again."""
    with contextlib.suppress(TryAgain):
        return read(log)
    return []


def values(records: list[Record]) -> list[bytes]:
    """The values alone."""
    return [record.value for record in records]


def test_offsets_are_dense_and_in_order(world: World) -> None:
    """Offsets start at 0, grow by one, and are returned in the order of the entries."""
    log = world.open()

    assert append(log, b"a") == [0]
    assert append(log, b"b", b"c", b"d") == [1, 2, 3]
    assert values(read(log)) == [b"a", b"b", b"c", b"d"]
    assert [record.offset for record in read(log)] == [0, 1, 2, 3]


def test_nothing_to_append_is_nothing(world: World) -> None:
    """An append without entries returns without offsets and changes nothing."""
    log = world.open()

    assert append(log) == []
    assert log.ends(USAGE_EVENTS) == {0: 0, 1: 0, 2: 0}


def test_every_waiter_gets_its_own_offset(world: World) -> None:
    """Of many tasks that append at once, each is told where its own value went."""
    log = world.open()

    async def all_at_once() -> list[list[int]]:
        entries = [[Entry(b"%d.%d" % (task, part)) for part in range(task % 4)] for task in range(200)]
        return await asyncio.gather(*[log.append(USAGE_EVENTS, each) for each in entries])

    told = {b"%d.%d" % (task, part): offset
            for task, offsets in enumerate(asyncio.run(all_at_once())) for part, offset in enumerate(offsets)}

    assert told == {record.value: record.offset for record in read(log)}
    assert sorted(told.values()) == list(range(len(told)))


def test_a_cancelled_waiter_disturbs_nobody(world: World) -> None:
    """A task that gives up waiting takes no other task's answer with it."""
    log = world.open()

    async def one_gives_up() -> list[int]:
        impatient = asyncio.create_task(log.append(USAGE_EVENTS, [Entry(b"impatient")]))
        patient = asyncio.create_task(log.append(USAGE_EVENTS, [Entry(b"patient")]))
        await asyncio.sleep(0)
        impatient.cancel()
        return await patient

    [offset] = asyncio.run(one_gives_up())

    assert read(log, offset)[0].value == b"patient"


def test_partitions_and_streams_are_apart(world: World) -> None:
    """Each partition of each stream counts for itself, in one call of append too."""
    log = world.open()

    told = asyncio.run(log.append(USAGE_EVENTS, [Entry(b"a", 0), Entry(b"b", 2), Entry(b"c", 0), Entry(b"d", 2)]))
    append(log, b"decision", stream=USAGE_CONTROL)

    assert told == [0, 0, 1, 1]
    assert log.ends(USAGE_EVENTS) == {0: 2, 1: 0, 2: 2}
    assert log.ends(USAGE_CONTROL) == {0: 1}
    assert {p: values(read(log, partition=p)) for p in range(3)} == {0: [b"a", b"c"], 1: [], 2: [b"b", b"d"]}


def test_another_opener_sees_what_was_acknowledged(world: World) -> None:
    """An acknowledged record is there for everyone: for a log opened before, after, and after the writer closed."""
    before, writer = world.open(), world.open()
    append(writer, b"a", b"b")
    after = world.open()
    writer.close()

    assert [b"a", b"b"] == values(read(before)) == values(read(after)) == values(read(world.open()))


def test_two_openers_share_one_sequence(world: World) -> None:
    """Whoever appends, the offsets are one sequence."""
    first, second = world.open(), world.open()

    assert [append(first, b"a"), append(second, b"b"), append(first, b"c")] == [[0], [1], [2]]


def test_processes_append_side_by_side(world: World) -> None:
    """Records of several processes are all there, each once, where its process was told."""
    if world.url is None:
        pytest.skip("this log lives in one process")
    log = world.open()
    command = [sys.executable, "-m", "tests.contracts.appending_process", world.url]
    processes = [
        subprocess.Popen([*command, str(number), str(APPENDS_A_PROCESS)], stdout=subprocess.PIPE, text=True)
        for number in range(PROCESSES)
    ]
    outputs = [process.communicate()[0] for process in processes]
    told = {(partition, offset): value.encode() for text in outputs for value, partition, offset in json.loads(text)}

    found = {(record.partition, record.offset): record.value
             for record in log.read(USAGE_EVENTS, {0: 0, 1: 0}, bytes_max=PLENTY)}
    assert len(told) == PROCESSES * APPENDS_A_PROCESS
    assert told == found


@pytest.mark.parametrize("kind", WORLDS, ids=lambda kind: kind.__name__)
def test_reading_in_pieces_gives_the_whole(kind: type[World]) -> None:
    """From any position, reads of any size give every record once; more than the bytes only for a single record."""

    @settings(max_examples=kind.examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(0, 1000))
    def holds(sizes: list[int], bytes_max: int) -> None:
        _read_in_pieces(kind, sizes, bytes_max)

    holds()


def _read_in_pieces(kind: type[World], sizes: list[int], bytes_max: int) -> None:
    written = [bytes([number]) * size for number, size in enumerate(sizes)]
    with tempfile.TemporaryDirectory() as directory:
        world = kind(Path(directory))
        log = world.open()
        append(log, *written)
        for start in {0, len(written) // 2}:
            position, found = start, []
            while piece := read(log, position, bytes_max=bytes_max):
                assert len(piece) == 1 or sum(map(len, values(piece))) <= bytes_max
                position += len(piece)
                found += values(piece)
            assert written[start:] == found
        world.close()


def test_every_byte_is_kept(world: World) -> None:
    """Values come back as they were given: empty, with zero bytes, no text at all, or megabytes long."""
    log = world.open()
    awkward = [b"", b"\0", b"a\0b", b"\xff\xfe", "é\n".encode(), b"", bytes(range(256))]
    awkward.append(random.Random(1).randbytes(5 << 20))
    append(log, *awkward)

    assert awkward == values(read(log))


def test_a_record_says_whose_it_is(world: World) -> None:
    """Organization, admission and partition come back with the value."""
    log = world.open()
    organizations = [None, "", "null", 'a "quoted", \\ one', "ü\n", "6f8b1f9e-0f4e-4b8e-9a53-3f6f4f1d2c10"]
    said = [(False, False), (True, False), (True, True)]
    entries = [Entry(b"v", 1, name, *flags) for name in organizations for flags in said]
    asyncio.run(log.append(USAGE_EVENTS, entries))

    found = read(log, partition=1)
    assert [(e.partition, e.organization_id, e.admitted, e.distinct_keys) for e in entries] == [
        (record.partition, record.organization_id, record.admitted, record.distinct_keys) for record in found
    ]
    assert {bool} == {type(record.admitted) for record in found}


def test_time_is_ingestion_and_never_goes_back(world: World) -> None:
    """A record's time is the clock's. Where all share one, it never goes back, across openers too."""
    clock, start_us, step_us = world.clock, world.clock.now_us, world.time_step_us
    for steps in (0, 5, -3_600_000, 7):
        clock.now_us = start_us + steps * step_us
        append(world.open(), b"v")

    set_back = 5 if world.one_clock else -3_600_000
    found = [record.timestamp_us - start_us for record in read(world.open())]
    assert found == [steps * step_us for steps in (0, 5, set_back, 7)]


def test_decisions_and_what_follows_them_are_later_than_what_was_read(world: World) -> None:
    """Our own processes hear of the newest time by reading, whatever their clocks say after one of them was ahead."""
    clock, right_us = world.clock, world.clock.now_us

    def stamped(log: Log, stream: str, partition: int = 0) -> int:
        """The time of another record; one that this log has read."""
        [offset] = asyncio.run(log.append(stream, [Entry(b"v", partition, admitted=True)]))
        [record] = log.read(stream, {partition: offset}, bytes_max=PLENTY)
        return record.timestamp_us

    clock.now_us += 50 * 60_000_000  # brokers refuse times more than an hour ahead
    ahead_us = stamped(world.open(), USAGE_EVENTS, 1)
    clock.now_us = right_us
    aggregator, gateway = world.open(), world.open()
    assert newest_stamp_us(aggregator) == ahead_us
    decided_us = stamped(aggregator, USAGE_CONTROL)
    assert ahead_us < decided_us < ahead_us + 3_600_000_000
    assert len(gateway.read(USAGE_CONTROL, {0: 0}, bytes_max=PLENTY)) == 1
    assert stamped(gateway, USAGE_EVENTS, 2) >= decided_us
    assert stamped(aggregator, USAGE_CONTROL) > decided_us


def test_reading_at_the_end_is_empty(world: World) -> None:
    """The end is a position like any other; there is nothing there yet."""
    log = world.open()
    append(log, b"a")

    assert read(log, 1) == []
    assert log.read(USAGE_EVENTS, {0: 1, 1: 0}, bytes_max=PLENTY, wait_s=0.01) == []


def test_a_waiting_reader_wakes_up(world: World) -> None:
    """A reader that waits at the end gets the next record soon after another opener appended it."""
    reader, writer = world.open(), world.open()
    found: list[Record] = []
    progress = threading.Semaphore(0)

    def follow() -> None:
        while len(found) < 10:
            found.extend(reader.read(USAGE_EVENTS, {0: len(found)}, bytes_max=PLENTY, wait_s=60.0))
            progress.release()

    thread = threading.Thread(target=follow)
    thread.start()
    for number in range(10):
        append(writer, b"other", stream=USAGE_CONTROL)
        append(writer, b"%d" % number)
        progress.acquire()
    thread.join()
    assert [b"%d" % number for number in range(10)] == values(found)


@pytest.mark.parametrize("bytes_max", [1, 700, PLENTY])
def test_partitions_are_read_as_they_were_written(world: World, bytes_max: int) -> None:
    """By time, however much is read at once and however late: a store that is made again decides what the first did."""
    log = world.open()
    written = [(partition, b"%d" % number * 100) for number, partition in enumerate((0, 2, 2, 1, 0, 1, 2, 0, 0, 1))]
    for partition, value in written:
        append(log, value, partition=partition)
        world.clock.now_us += world.time_step_us
    positions = dict.fromkeys(range(3), 0)
    while sum(positions.values()) < len(written):
        for record in log.read(USAGE_EVENTS, positions, bytes_max=bytes_max):
            assert (record.partition, record.value) == written[sum(positions.values())]
            positions[record.partition] += 1


def test_starts_and_ends_tell_what_is_held(world: World) -> None:
    """Starts is the oldest record, ends the next offset, and both are 0 in the beginning."""
    log = world.open()
    assert {0: 0, 1: 0, 2: 0} == log.starts(USAGE_EVENTS) == log.ends(USAGE_EVENTS)
    append(log, b"a", b"b", partition=1)
    assert log.starts(USAGE_EVENTS) == {0: 0, 1: 0, 2: 0}
    assert log.ends(USAGE_EVENTS) == {0: 0, 1: 2, 2: 0}


def test_retention_removes_the_oldest(world: World) -> None:
    """What is older than the instant goes, the newest record stays, and offsets and time go on from it."""
    log, start_us, step_us = world.open(), world.clock.now_us, world.time_step_us
    for number in range(600):
        world.clock.now_us = start_us + number // 2 * step_us
        append(log, b"%d" % number)

    assert world.trim(log, USAGE_EVENTS, start_us + 250 * step_us) == 500
    assert world.trim(log, USAGE_EVENTS, start_us + 250 * step_us) == 0
    assert log.starts(USAGE_EVENTS) == {0: 500, 1: 0, 2: 0}
    assert read(log, 500)[0].value == b"500"
    with pytest.raises(PositionLost):
        read(log, 499)

    assert world.trim(log, USAGE_EVENTS, start_us + 1_000_000 * step_us) == 99
    world.clock.now_us = start_us
    assert append(world.open(), b"600") == [600]
    last = 299 if world.one_clock else 0
    found = [(record.offset, record.timestamp_us - start_us) for record in read(log, 599)]
    assert found == [(599, 299 * step_us), (600, last * step_us)]


def test_identity_stays_until_the_stream_is_replaced(world: World) -> None:
    """Every opener sees the same identity; a stream that was deleted and made again has another one."""
    log = world.open()
    before = {stream: log.identity(stream) for stream in PARTITIONS}
    append(log, b"a")
    log.close()
    assert before == {stream: world.open().identity(stream) for stream in PARTITIONS}
    world.close()

    world.replace()

    after = {stream: world.open().identity(stream) for stream in PARTITIONS}
    assert len({*before.values(), *after.values()}) == 4


def test_a_position_of_another_stream_is_lost(world: World) -> None:
    """Beyond the end there is nothing to wait for: who asks has seen records that this stream never had."""
    log = world.open()
    append(log, b"a", b"b", b"c")
    world.close()
    world.replace()
    log = world.open()
    append(log, b"z")

    with pytest.raises(PositionLost):
        log.read(USAGE_EVENTS, {0: 3}, bytes_max=PLENTY, wait_s=60.0)


def test_what_can_never_be_taken_is_refused(world: World) -> None:
    """Too large, no such stream, no such partition: Refused, and nothing of the same call is written."""
    log = world.open()
    good = Entry(b"good")

    for stream, bad in [
        (USAGE_EVENTS, Entry(bytes(LIMITS.value_bytes_max + 1))),
        (USAGE_EVENTS, Entry(b"v", partition=3)),
        (USAGE_EVENTS, Entry(b"v", partition=-1)),
        (USAGE_CONTROL, Entry(b"v", partition=1)),
        ("usage.other", Entry(b"v")),
    ]:
        with pytest.raises(Refused):
            asyncio.run(log.append(stream, [good, bad]))

    assert read(log) == []


def test_no_such_place_to_read(world: World) -> None:
    """Questions about streams and partitions that are not there are Refused."""
    log = world.open()

    with pytest.raises(Refused):
        log.read(USAGE_EVENTS, {3: 0}, bytes_max=PLENTY)
    for question in (log.starts, log.ends, log.identity):
        with pytest.raises(Refused):
            question("usage.other")


def test_a_full_log_says_try_again(world: World) -> None:
    """While nothing can be written, appends are TryAgain; afterwards they go on, and the offsets are dense."""
    log, hasty = world.open(), world.open_hasty()
    append(log, b"before")

    with world.full():
        for _ in range(3):
            with pytest.raises(TryAgain) as refusal:
                append(hasty, b"meanwhile")
            assert refusal.value.retry_after_s > 0

    [offset] = append(log, b"after")
    found: list[Record] = eventually(lambda: read_if_it_can(log))  # who leads may have changed
    assert [record.offset for record in found] == list(range(len(found)))
    assert (found[0].value, found[offset].value) == (b"before", b"after")


def test_a_closed_log_says_try_again(world: World) -> None:
    """After close every question is TryAgain, and closing again does nothing."""
    log = world.open()
    append(log, b"a")
    log.close()
    log.close()

    with pytest.raises(TryAgain):
        append(log, b"b")
    with pytest.raises(TryAgain):
        read(log)
    for question in (log.starts, log.ends, log.identity):
        with pytest.raises(TryAgain):
            question(USAGE_EVENTS)


def test_closing_finishes_what_was_begun(world: World) -> None:
    """Close answers every append that it found waiting, and what was acknowledged is there."""
    log = world.open()

    async def close_meanwhile() -> list[list[int] | BaseException]:
        tasks = [asyncio.create_task(log.append(USAGE_EVENTS, [Entry(b"%d" % number)])) for number in range(100)]
        await asyncio.sleep(0)
        log.close()
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = asyncio.run(close_meanwhile())
    acknowledged = [offset for outcome in outcomes if isinstance(outcome, list) for offset in outcome]

    assert acknowledged == [record.offset for record in read(world.open())]
    assert len(acknowledged) == 100
