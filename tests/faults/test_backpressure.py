"""Whoever is slow is waited for without memory: a store by the log, which takes everything; a log by those who send."""

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from ingest.limits import IN_FLIGHT_BYTES_MAX
from ingest.log import open_log
from tests.support.faults.store_checks import SEED, assert_store_tells, count, export
from tests.support.servers.killable_server import TOKEN, Server
from tests.support.waiting import eventually

BODIES, EVENTS_A_BODY = 200, 40  # 40 MB, in the gateway's hands one after the other
FILLERS, FILLER_BYTES = 10, 250  # few large events, because the gateway remembers a window of recent ids on purpose
WARM_BODIES = 20  # until compiled loops are asked for, and as many again until the allocator has its size
LOADED = "read by compiled loops"  # says the gateway then
HEAVY_BODIES, EVENTS_A_HEAVY_BODY = 120, 200  # 120 MB, twice what the log lets wait; or 1.2 GB
PATIENCE_S = 300.0
HELD_BYTES_MAX = 3 * IN_FLIGHT_BYTES_MAX  # bodies in pieces and whole, lines on their way, what the allocator keeps
GROWTH_BYTES_MAX = 16 << 20  # half of what is sent then; the page cache of the log and the recent ids have their part


def test_a_stopped_aggregator_costs_the_gateway_no_memory(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """While the aggregator is stopped every event is acknowledged, at constant memory; when it goes on it has them."""
    choose = random.Random(SEED)
    server = Server(tmp_path / "data", tmp_path / "server.log")
    try:
        server.start()
        eventually(server.reads)
        gateway, aggregator = server.children()["gateway"], server.children()["aggregate"]
        os.kill(aggregator, signal.SIGSTOP)
        eventually(lambda: Path(f"/proc/{aggregator}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        try:
            sent = memory = 0
            answers = []
            for number in range(BODIES):
                body = content(choose, number)
                sent += len(body)
                answers.append(server.client.post("/v1/events/ingest", content=body).status_code)
                if number == WARM_BODIES:
                    eventually(lambda: LOADED in (tmp_path / "server.log").read_text())
                if number == 2 * WARM_BODIES:
                    memory = resident_bytes(gateway)
                    for _ in range(3):  # readers that give up waiting must not be in anybody's way
                        with pytest.raises(httpx.ReadTimeout):
                            server.client.get("/v1/events/names", timeout=0.2)
            growth = resident_bytes(gateway) - memory
        finally:
            os.kill(aggregator, signal.SIGCONT)
        calls = server.calls()
    finally:
        server.close()
    log = open_log(str(server.data))
    assert_store_tells(export(server.data / "store.duckdb"), count(log))
    log.close()
    record_property("figures",
        f"backpressure: seed {SEED}, {BODIES * EVENTS_A_BODY} events of {sent / 1e6:.0f} MB acknowledged while "
        f"stopped, gateway at {memory / 1e6:.0f} MB grew by {growth / 1e6:.1f} MB, {calls} counted afterwards"
    )

    assert {200} == set(answers)
    assert calls == BODIES * EVENTS_A_BODY
    assert growth < GROWTH_BYTES_MAX


@pytest.mark.timeout(900)  # with --long a lot to send
def test_a_log_that_stands_still_is_waited_for_up_to_a_bound(
    tmp_path: Path, long: bool, record_property: Callable[[str, object], None]
) -> None:
    """Requests wait for the log until its queue is full; others are told 503 at once, and all are taken in the end."""
    server = Server(tmp_path / "data", tmp_path / "server.log")
    fillers = random.Random(SEED)
    one = filler(fillers)
    count = HEAVY_BODIES * (10 if long else 1)
    bodies = [content(fillers, number, EVENTS_A_HEAVY_BODY, one) for number in range(count)]
    try:
        server.start()
        gateway = server.children()["gateway"]
        memory = resident_bytes(gateway)
        refused, peak = asyncio.run(press(server, bodies, lambda: resident_bytes(gateway)))
        calls = server.calls()
    finally:
        server.close()
    sent = sum(map(len, bodies))
    record_property("figures",
        f"backpressure: {sent / 1e6:.0f} MB at once to a log that stood still: {refused} answers 503, gateway at "
        f"{memory / 1e6:.0f} MB grew by {(peak - memory) / 1e6:.0f} MB at most, {calls} events counted afterwards"
    )

    assert refused > 0
    assert calls == len(bodies) * EVENTS_A_HEAVY_BODY
    assert peak - memory < HELD_BYTES_MAX


async def press(server: Server, bodies: list[bytes], memory: Callable[[], int]) -> tuple[int, int]:
    """Send all at once while another process has the log's lock, which ends with the first 503; repeat until taken.

    Returns how often the answer was 503, and the most memory that was seen.
    """
    refused, peak = 0, 0
    full = asyncio.Event()

    async def send(http: httpx.AsyncClient, body: bytes) -> None:
        nonlocal refused, peak
        while True:
            with contextlib.suppress(httpx.TransportError):  # one that was cut for it: again
                answer = await http.post("/v1/events/ingest", content=body)
                peak = max(peak, memory())
                if answer.status_code == 200:
                    return
                if answer.status_code == 408:  # a body that took too long to arrive
                    continue
                assert answer.status_code == 503
                refused += 1
                full.set()
                await asyncio.sleep(int(answer.headers["retry-after"]))  # as long as the answer asks for

    connections = httpx.Limits(max_connections=len(bodies))
    headers = {"authorization": f"Bearer {TOKEN}"}
    http = httpx.AsyncClient(
        base_url=server.client.base_url, headers=headers, timeout=PATIENCE_S, limits=connections
    )
    with contextlib.closing(sqlite3.connect(server.data / "log.sqlite", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        async with http, asyncio.TaskGroup() as group:
            for body in bodies:
                group.create_task(send(http, body))
            await full.wait()
            holder.execute("ROLLBACK")
    return refused, peak


def content(
    choose: random.Random, number: int, events: int = EVENTS_A_BODY, metadata: dict[str, str] | None = None
) -> bytes:
    """A request of 200 KB that does not compress; with more events, of 5 KB each."""
    event: dict[str, Any] = {"name": "call", "external_customer_id": "ann"}
    events_made = [
        event | {"external_id": f"e{number}-{place}", "metadata": metadata or filler(choose)}
        for place in range(events)
    ]
    return httpx.Request("POST", "http://x", json={"events": events_made}).content


def filler(choose: random.Random) -> dict[str, str]:
    """Metadata of 5 KB, in texts as long as they may be."""
    return {f"filler-{number}": choose.randbytes(FILLER_BYTES).hex() for number in range(FILLERS)}


def resident_bytes(pid: int) -> int:
    """The memory that the process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
