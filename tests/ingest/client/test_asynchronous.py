"""The client in an event loop: it is never held up, and nothing is lost when the loop ends."""

import asyncio
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ingest.client import AsyncIngestion, EventRefused, Limits
from ingest.client.strategies.delta_time import DeltaTime
from tests.support.servers.faulty_gateway import Bad, FaultServer
from tests.support.waiting import PATIENCE_S, until

QUICK = Limits(linger_s=0.01, backoff_s=0.01, backoff_s_max=0.02, close_s_max=30)


def event(number: int) -> dict[str, Any]:
    """An event with an id of its own."""
    return {"name": "call", "external_customer_id": "u", "external_id": f"e{number}"}


def test_events_are_sent_while_the_loop_goes_on(tmp_path: Path) -> None:
    """From the loop, from strategies in it, until the block ends."""
    async def application(server: FaultServer) -> AsyncIngestion:
        async with AsyncIngestion("token", base_url=server.url, spool=tmp_path, limits=QUICK) as ingestion:
            assert [await ingestion.ingest(event(number)) for number in range(5)] == [f"e{n}" for n in range(5)]
            ingestion.strategy(DeltaTime, "task").start("u", external_id="timed").stop()
            assert await ingestion.flush(20)
            assert ingestion.capture(event(6)) == "e6"
        return ingestion

    with FaultServer() as server:
        ingestion = asyncio.run(application(server))

    assert set(server.taken) == {*(f"e{number}" for number in (0, 1, 2, 3, 4, 6)), "timed"}
    assert ingestion.stats().acknowledged == 7


def test_waiting_for_room_leaves_the_loop_free() -> None:
    """The loop turns while ``ingest`` waits, and the event is taken once there is room."""
    is_away = True
    limits = Limits(linger_s=0.01, backoff_s=0.01, backoff_s_max=0.02, held_bytes_max=300, block_s_max=20)

    async def application(server: FaultServer) -> int:
        nonlocal is_away
        ingestion, turns = AsyncIngestion("token", base_url=server.url, spool=None, limits=limits), 0
        ended = asyncio.gather(*(ingestion.ingest(event(number)) for number in range(5)))
        while not ended.done():
            await asyncio.sleep(0.001)
            turns += 1
            is_away = is_away and turns < 20
        assert await ended == [f"e{number}" for number in range(5)]
        await ingestion.close(20)
        return turns

    with FaultServer(lambda events, number: Bad(503) if is_away else None) as server:
        assert asyncio.run(application(server)) >= 20

    assert len(server.taken) == 5


def test_strict_raises_in_the_coroutine() -> None:
    """As without a loop."""
    async def application(server: FaultServer) -> None:
        async with AsyncIngestion("token", base_url=server.url, spool=None, strict=True) as ingestion:
            with pytest.raises(EventRefused):
                await ingestion.ingest({"name": "call"})

    with FaultServer() as server:
        asyncio.run(application(server))


def test_waiting_for_room_takes_no_thread_of_the_loops_own() -> None:
    """Those serve others meanwhile, look-ups of hosts among them; and the events are taken once there is room."""
    is_away = True
    limits = Limits(linger_s=0.01, backoff_s=0.01, backoff_s_max=0.02, held_bytes_max=300, block_s_max=20)

    async def application(server: FaultServer) -> None:
        nonlocal is_away
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        ingestion = AsyncIngestion("token", base_url=server.url, spool=None, limits=limits)
        ended = asyncio.gather(*(ingestion.ingest(event(number)) for number in range(20)))
        await asyncio.get_running_loop().getaddrinfo("127.0.0.1", 80)
        assert not ended.done()
        is_away = False
        assert await ended == [f"e{number}" for number in range(20)]
        await ingestion.close(20)

    with FaultServer(lambda events, number: Bad(503) if is_away else None) as server:
        asyncio.run(application(server))

    assert len(server.taken) == 20


def test_flushes_that_take_their_time_hold_no_capture_up() -> None:
    """However many there are; and when the client closes all of them end."""
    limits = Limits(linger_s=0.01, backoff_s=0.01, backoff_s_max=0.02, held_bytes_max=1 << 20)

    async def application(server: FaultServer) -> None:
        ingestion = AsyncIngestion("token", base_url=server.url, spool=None, limits=limits)
        ingestion.capture(event(0))
        flushes = asyncio.gather(*(ingestion.flush() for _ in range(20)))
        try:
            assert await asyncio.wait_for(ingestion.ingest(event(1)), PATIENCE_S) == "e1"
            assert not await ingestion.flush(0)
            assert not flushes.done()
        finally:
            await ingestion.close(0)
        assert await flushes == [False] * 20

    with FaultServer(lambda events, number: Bad(503)) as server:
        asyncio.run(application(server))


def test_a_flush_waits_for_what_was_captured_before_it() -> None:
    """And not for what was captured since, or it would never end while there is usage."""
    async def application(server: FaultServer) -> None:
        ingestion = AsyncIngestion("token", base_url=server.url, spool=None, limits=QUICK)
        ingestion.capture(event(0))
        flush = asyncio.create_task(ingestion.flush())
        await until(lambda: bool(server.requests))
        ingestion.capture({**event(1), "metadata": {"is": "late"}})
        server.script = lambda events, number: Bad(503) if events[0]["external_id"] == "e1" else None
        assert await asyncio.wait_for(flush, PATIENCE_S)
        assert ingestion.stats().pending == 1
        await ingestion.close(0)

    with FaultServer(lambda events, number: Bad(503)) as server:
        asyncio.run(application(server))


def test_a_flush_that_was_given_up_does_not_keep_the_process() -> None:
    """Nobody waits for it any more, and the interpreter ends."""
    code = """
import asyncio
from ingest.client import AsyncIngestion, Limits

async def application():
    ingestion = AsyncIngestion("token", base_url="http://127.0.0.1:1", spool=None, limits=Limits(close_s_max=0.1))
    ingestion.capture({"name": "call", "external_customer_id": "u"})
    try:
        await asyncio.wait_for(ingestion.flush(), 0.1)
    except TimeoutError:
        print("given up")

asyncio.run(application())
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert done.stdout == "given up\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_waits_in_threads_of_its_own() -> None:
    """The parent's did not come along."""
    with FaultServer() as server:
        ingestion = AsyncIngestion("token", base_url=server.url, spool=None, limits=QUICK)
        assert asyncio.run(ingestion.flush(20))
        child = os.fork()
        if not child:
            is_right = asyncio.run(asyncio.wait_for(ingestion.flush(10), 20))
            os._exit(0 if is_right else 1)
        assert os.waitpid(child, 0)[1] == 0
        asyncio.run(ingestion.close())
