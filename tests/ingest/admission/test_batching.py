"""Requests that are taken together are answered and written as if each were alone."""

import asyncio
import functools
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest import catalogue_follower
from ingest.admission.batching import NO_PREFERENCES, TURN_BYTES_MAX, Opened
from ingest.admission.intake import Intake
from ingest.admission.kernels import BodyReader
from ingest.catalogue_follower import CatalogueTail
from ingest.limits import InFlight
from ingest.log.memory import Disk, MemoryLog
from ingest.log.partitions import Limits
from ingest.responses import Answer
from meters.catalogue.catalogue import Token
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, partition_key, partition_of
from tests.ingest.admission.test_compiled_parsing import bodies
from tests.support.admission import ORGANIZATION, UNKNOWN, written

MADE_ID = re.compile(rb'"external_id":"[0-9a-f]{32}"}')
BODY_MAX = 10_000_000
Request = tuple[str, bytes]  # an organization, a body


def log_of(partitions: int, limits: Limits | None = None) -> MemoryLog:
    """An empty one."""
    return MemoryLog(Disk({USAGE_EVENTS: partitions, USAGE_CONTROL: 1}), lambda: 0, limits or Limits())


def opened(organization_id: str) -> Opened:
    """What a request of the organization that asks for nothing special may send."""
    token = Token(id="t", organization_id=organization_id, name="t", sha256="", scopes=[], created_at=datetime.now(UTC))
    return Opened(token, "", NO_PREFERENCES)


def intake_on(log: MemoryLog, known: CatalogueTail, *, swift: bool = True) -> Intake:
    """One that has its loops, or none."""
    intake = Intake(log, known, InFlight(), BODY_MAX)
    intake.learn(log.ends(USAGE_EVENTS))
    if swift:
        intake._quick.loader.loops = BodyReader()
    return intake


async def on_intake(log: MemoryLog, ask: Callable[[Intake], Any], *, swift: bool = True) -> Any:
    """What a coroutine finds that has an intake whose catalogue is read."""
    known = CatalogueTail(log)
    following = asyncio.ensure_future(known.run())
    await known.wait_until_loaded(10)
    intake = intake_on(log, known, swift=swift)
    try:
        return await ask(intake)
    finally:
        intake.close()
        known.stop()
        await following


async def at_once(requests: Sequence[Request], intake: Intake) -> list[Answer]:
    """The answers to requests that come in the same round of the loop."""
    answers = [asyncio.get_running_loop().create_future() for _ in requests]
    for (organization_id, body), told in zip(requests, answers, strict=True):
        intake.take(opened(organization_id), body, told.set_result)  # which raises if told twice
    return await asyncio.gather(*answers)


async def one_by_one(requests: Sequence[Request], intake: Intake) -> list[Answer]:
    """The answers to requests of which each waits for the one before."""
    return [await intake.taken(opened(organization_id), body) for organization_id, body in requests]


def lines_in(log: MemoryLog) -> dict[tuple[str | None, int], list[bytes]]:
    """By organization and partition, in order, without the ids that were made."""
    found: dict[tuple[str | None, int], list[bytes]] = {}
    for partition in log.ends(USAGE_EVENTS):
        for record in log.read(USAGE_EVENTS, {partition: 0}, bytes_max=1 << 30):
            lines = [MADE_ID.sub(b"}", line) for line in record.value.split(b"\n")]
            found.setdefault((record.organization_id, partition), []).extend(lines)
    return found


def counts(answer: Answer) -> tuple[int, Any]:
    """The status, and how many events were taken or what was wrong."""
    said = msgspec.json.decode(answer.body)
    return answer.status, said["inserted"] + said["duplicates"] if answer.status == 200 else said


@patch.object(catalogue_follower, "WAIT_S", 0.002)  # how long its thread goes on after the end
@settings(max_examples=250, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([ORGANIZATION, UNKNOWN]), bodies()), min_size=1, max_size=8),
       st.sampled_from([1, 12, 70]))  # fmt: skip
def test_answers_and_lines_are_those_of_each_alone(requests: list[Request], partitions: int) -> None:
    """Whatever is odd among them, and whose they are; a request that waits for names may be written later."""
    together, alone = log_of(partitions), log_of(partitions)
    found = asyncio.run(on_intake(together, functools.partial(at_once, requests)))
    wanted = asyncio.run(on_intake(alone, functools.partial(one_by_one, requests), swift=False))
    assert list(map(counts, found)) == list(map(counts, wanted))
    assert {place: sorted(lines) for place, lines in lines_in(together).items()} == {
        place: sorted(lines) for place, lines in lines_in(alone).items()
    }


def body_of(*numbers: int, customer: str = "u", more: str = "") -> bytes:
    """An ordinary body of events with these numbers in their ids."""
    events = [written(external_id=f"x-{number}", external_customer_id=customer) for number in numbers]
    return ('{"events":[' + ",".join(events) + "]}" + more).encode()


def test_each_hears_of_its_own_events() -> None:
    """What comes twice is a duplicate where it comes second; all are one record, behind which all positions are."""
    requests = [(ORGANIZATION, body_of(*numbers)) for numbers in ((1,), (2, 3), (3, 4, 1), (5,))]
    log = log_of(1)
    found = asyncio.run(on_intake(log, functools.partial(at_once, requests)))
    said = [msgspec.json.decode(answer.body) for answer in found]
    assert said == [{"inserted": of, "duplicates": known} for of, known in ((1, 0), (2, 0), (1, 2), (1, 0))]
    assert {dict(answer.headers)[b"log-position"] for answer in found} == {b"0:1"}


def test_an_odd_body_is_alone_and_the_others_are_not() -> None:
    """Those before it and those behind it are written as they came."""
    odd = b'{"events":[{"name":"odd","external_customer_id":"u","external_id":"\\u0041"}]}'
    requests = [(ORGANIZATION, body) for body in (body_of(1), body_of(2), odd, b"no JSON", body_of(3), body_of(4))]
    log = log_of(1)
    found = asyncio.run(on_intake(log, functools.partial(at_once, requests)))
    assert [answer.status for answer in found] == [200, 200, 200, 422, 200, 200]
    [[*lines]] = lines_in(log).values()
    assert sorted(line.count(b"x-") for line in lines) == [0, 1, 1, 1, 1]


def test_more_than_a_turn_may_have_waits_for_the_next() -> None:
    """Between two turns the loop looks at its sockets; each request is answered all the same."""

    async def ask(intake: Intake) -> list[Answer]:
        rounds = 0

        def one_more() -> None:
            nonlocal rounds
            rounds += 1
            asyncio.get_running_loop().call_soon(one_more)

        one_more()
        read = list[int]()
        put = intake.gather.put_together

        def note(entries: Sequence[Entry], masks: Sequence[int], tell: Any) -> None:
            read.append(rounds)
            put(entries, masks, tell)

        intake.gather.put_together = note  # type: ignore[method-assign]
        body = body_of(*range(100))
        found = await at_once([(ORGANIZATION, body)] * (5 * TURN_BYTES_MAX // len(body)), intake)
        assert len(read) == len(set(read)) >= 5
        return found

    found = asyncio.run(on_intake(log_of(1), ask))
    assert {answer.status for answer in found} == {200}


class Away(MemoryLog):
    """One partition of it takes nothing until it may."""

    held: asyncio.Event

    def submit(self, stream: str, entries: Sequence[Entry]) -> asyncio.Future[list[int]]:
        """See the port."""
        return asyncio.ensure_future(self._append(stream, entries))

    async def _append(self, stream: str, entries: Sequence[Entry]) -> list[int]:
        if entries[0].partition == 0:
            await self.held.wait()
        return await super().submit(stream, entries)


def test_a_partition_that_is_away_keeps_nobody_without_lines_for_it() -> None:
    """Requests that were read together are answered apart."""
    log = Away(Disk({USAGE_EVENTS: 2, USAGE_CONTROL: 1}), lambda: 0, Limits())

    names = [f"customer-{number}" for number in range(40)]
    held = [name for name in names if partition_of(partition_key(ORGANIZATION, name), 2) == 0]
    assert 0 < len(held) < len(names)

    async def ask(intake: Intake) -> None:
        log.held = asyncio.Event()
        told: dict[str, asyncio.Future[Answer]] = {}
        for number, name in enumerate(names):
            told[name] = asyncio.get_running_loop().create_future()
            intake.take(opened(ORGANIZATION), body_of(number, customer=name), told[name].set_result)
        told["both"] = asyncio.get_running_loop().create_future()
        events = ",".join(written(external_customer_id=name) for name in names)
        intake.take(opened(ORGANIZATION), f'{{"events":[{events}]}}'.encode(), told["both"].set_result)
        await asyncio.gather(*(told[name] for name in names if name not in held))
        assert not any(told[name].done() for name in [*held, "both"])
        log.held.set()
        assert {answer.status for answer in await asyncio.gather(*told.values())} == {200}

    asyncio.run(on_intake(log, ask))


@pytest.mark.parametrize("partitions", [1, 3])
def test_a_common_record_that_is_too_large_is_written_apart(partitions: int) -> None:
    """One that is too large by itself is refused, as it is alone."""
    requests = [(ORGANIZATION, body_of(number)) for number in range(9)]
    requests.append((ORGANIZATION, body_of(9, 10, 11, 12)))
    limit = len(requests[0][1])
    log = log_of(partitions, Limits(value_bytes_max=limit))
    found = asyncio.run(on_intake(log, functools.partial(at_once, requests)))
    assert [answer.status for answer in found] == [200] * 9 + [413]
    assert sum(len(lines) for lines in lines_in(log).values()) == 9


def test_a_log_that_cannot_write_is_told_to_each() -> None:
    """And what comes later is taken."""
    disk = Disk({USAGE_EVENTS: 1, USAGE_CONTROL: 1})
    log = MemoryLog(disk, lambda: 0, Limits())

    async def ask(intake: Intake) -> None:
        requests = [(ORGANIZATION, body_of(number)) for number in range(9)]
        disk.full = True
        assert {answer.status for answer in await at_once(requests, intake)} == {503}
        assert not intake.writable
        disk.full = False
        assert {answer.status for answer in await at_once(requests, intake)} == {200}

    asyncio.run(on_intake(log, ask))


def test_one_that_cannot_be_told_keeps_nobody_from_it() -> None:
    """The others that were taken with it hear their answers."""

    async def ask(intake: Intake) -> None:
        answers = [asyncio.get_running_loop().create_future() for _ in range(9)]
        for number, told in enumerate(answers):
            intake.take(opened(ORGANIZATION), body_of(number), told.set_result if number % 2 else lambda _: 1 // 0)
        assert {answer.status for answer in await asyncio.gather(*answers[1::2])} == {200}

    asyncio.run(on_intake(log_of(1), ask))


ODD = b'{"events":[{"name":"odd","external_customer_id":"u","external_id":"\\u0041"}]}'


@pytest.mark.parametrize("partitions", [1, 70])
def test_odd_bodies_are_not_looked_at_again_and_again(partitions: int) -> None:
    """However many wait behind them: what many odd bodies cost is what each does."""
    offered = 0

    async def ask(intake: Intake) -> None:
        nonlocal offered
        read = intake._quick.read

        def note(bodies: Sequence[bytes], *others: Any) -> Any:
            nonlocal offered
            offered += len(bodies)
            return read(bodies, *others)

        intake._quick.read = note  # type: ignore[method-assign]
        requests = [(ORGANIZATION, ODD if number % 3 else body_of(number)) for number in range(600)]
        assert {answer.status for answer in await at_once(requests, intake)} == {200}

    asyncio.run(on_intake(log_of(partitions), ask))
    assert offered < 4 * 600


def test_a_position_is_that_of_ones_own_lines() -> None:
    """Requests that were written together hear of no partition but those that their own lines are in."""
    names = [f"customer-{number}" for number in range(30)]
    requests = [(ORGANIZATION, body_of(number, customer=name)) for number, name in enumerate(names)]
    found = asyncio.run(on_intake(log_of(12), functools.partial(at_once, requests)))
    for name, answer in zip(names, found, strict=True):
        place = partition_of(partition_key(ORGANIZATION, name), 12)
        assert dict(answer.headers)[b"log-position"] == b"%d:1" % place


def test_one_that_cannot_be_taken_keeps_nobody_behind_it() -> None:
    """Whatever happens to it."""

    async def ask(intake: Intake) -> None:
        intake.take_alone = lambda *_: 1 // 0  # type: ignore[method-assign,assignment]
        answers = [asyncio.get_running_loop().create_future() for _ in range(4)]
        for number, told in enumerate(answers):
            intake.take(opened(ORGANIZATION), ODD if number == 1 else body_of(number), told.set_result)
        assert {answer.status for answer in await asyncio.gather(answers[0], *answers[2:])} == {200}

    asyncio.run(on_intake(log_of(1), ask))
