"""An aggregator that does not move: the log takes everything, the gateway keeps nothing, and later all of it counts."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from ingest.log import open_log
from tests.faults.evidence import SEED, assert_store_tells, count, eventually, export
from tests.faults.server import Server

BODIES, EVENTS_A_BODY = 200, 40  # 40 MB, in the gateway's hands one after the other
FILLERS, FILLER_BYTES = 10, 250  # few large events, because the gateway remembers a window of recent ids on purpose
WARM_BODIES = 20  # until the allocator has its size
GROWTH_BYTES_MAX = 16 << 20  # two fifths of what is sent; the page cache of the log and the recent ids have their part


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


def content(choose: random.Random, number: int) -> bytes:
    """A request of 200 KB that does not compress."""
    event: dict[str, Any] = {"name": "call", "external_customer_id": "ann"}
    events = [
        event | {"external_id": f"e{number}-{place}", "metadata": filler(choose)}
        for place in range(EVENTS_A_BODY)
    ]
    return httpx.Request("POST", "http://x", json={"events": events}).content


def filler(choose: random.Random) -> dict[str, str]:
    """Metadata of 5 KB, in texts as long as they may be."""
    return {f"filler-{number}": choose.randbytes(FILLER_BYTES).hex() for number in range(FILLERS)}


def resident_bytes(pid: int) -> int:
    """The memory that the process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
