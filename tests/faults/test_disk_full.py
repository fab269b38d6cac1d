"""A full disk stops what needs the disk, and only as long as it is full. Nothing is lost, nothing is counted twice."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from aggregator.engine import pipeline, supervisor
from aggregator.engine.supervisor import Aggregator
from aggregator.view import Unavailable
from ingest.log import open_log
from meters.log import USAGE_EVENTS, TryAgain
from tests.support.faults.small_disk import SmallDisk
from tests.support.faults.store_checks import (
    SEED,
    assert_store_tells,
    assert_totals_agree,
    caught_up,
    count,
    ends,
    export,
    usage,
    write_usage,
)
from tests.support.records import SMALL, entry
from tests.support.servers.gateway import RunningGateway
from tests.support.servers.killable_server import Server
from tests.support.waiting import eventually

EVENTS_A_BODY = 100
BODIES_MAX = 400  # a disk that is not full by then is too large for the test
RESTARTS = 3  # on a disk that stays full


def stored(aggregator: Aggregator) -> tuple[int, int] | None:
    """How many events a snapshot holds and how many its tallies count; None when reads are not answered."""
    try:
        with aggregator.read() as snapshot:
            sql = "SELECT (SELECT count(*) FROM events), (SELECT sum(stored)::BIGINT FROM tallies)"
            (counts,) = snapshot.connection.execute(sql).fetchall()
            return counts[0], counts[1]
    except Unavailable:
        return None


def restarts(aggregator: Aggregator) -> int:
    """How often the aggregator started over, as its metrics say."""
    exposition = aggregator.telemetry.text().decode()
    (found,) = re.findall(r"^meterstream_engine_failures_total (\S+)$", exposition, re.MULTILINE)
    return int(float(found))


@pytest.mark.parametrize("rows_between_checkpoints", [pipeline.ROWS_BETWEEN, 300])
def test_a_store_on_a_full_disk_catches_up_when_there_is_room(
    disk: SmallDisk, tmp_path: Path, rows_between_checkpoints: int, monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """Whether a commit or a checkpoint finds the disk full: the log goes on, reads tell the truth or say "later"."""
    monkeypatch.setattr(pipeline, "ROWS_BETWEEN", rows_between_checkpoints)
    monkeypatch.setattr(supervisor, "RESTART_DELAY_S", 0.02)
    monkeypatch.setattr(supervisor, "RESTART_DELAY_MAX_S", 0.1)
    log = open_log(str(tmp_path / "log"))
    aggregator = Aggregator(log, disk.path / "store.duckdb", SMALL)
    aggregator.start()
    answers: list[tuple[int, int] | None] = []
    try:
        write_usage(log, 10, SEED)
        eventually(lambda: caught_up(aggregator, ends(log)))
        disk.fill(leave_kib=300)

        def failed_often() -> bool:
            write_usage(log, 1, SEED + 1 + len(answers), decide=False)  # the log takes it, whatever the store does
            answers.append(stored(aggregator))
            return restarts(aggregator) >= RESTARTS

        eventually(failed_often)
        assert not aggregator.ended.is_set()
        disk.empty()
        eventually(lambda: caught_up(aggregator, ends(log)))
        counted = count(log)
        assert_totals_agree(aggregator, counted)
    finally:
        aggregator.stop()
    told = [answer for answer in answers if answer is not None]
    record_property("figures",
        f"disk full (checkpoint every {rows_between_checkpoints} rows): seed {SEED}, {counted.tallies}, "
        f"{restarts(aggregator)} restarts, {len(told)} of {len(answers)} reads answered meanwhile"
    )
    log.close()

    assert all(events == tallied for events, tallied in told)
    assert_store_tells(export(disk.path / "store.duckdb"), counted)


def test_a_log_on_a_full_disk_asks_to_come_back(disk: SmallDisk) -> None:
    """The gateway answers 503 with Retry-After instead of a yes; with room again it takes everything, once."""
    log = open_log(str(disk.path))
    with RunningGateway(log) as gateway:
        assert gateway.ingest(body(0)).status_code == 200
        disk.fill(leave_kib=500)
        refused, number = until_refused(gateway.ingest)
        ready = gateway.client.get("/readyz").status_code
        with pytest.raises(TryAgain):
            asyncio.run(log.append(USAGE_EVENTS, [entry(usage("direct", tokens="1" * 600_000))]))
        disk.empty()
        again = gateway.ingest(body(number))
        ids = [line.split(b'"external_id":"')[1].split(b'"')[0].decode() for line in gateway.lines()]

    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert ready == 503
    assert again.status_code == 200
    assert ids == [event["external_id"] for place in range(number + 1) for event in body(place)["events"]]


def test_a_whole_server_on_a_full_disk_lives_through_it(disk: SmallDisk, tmp_path: Path) -> None:
    """Log and store on one full disk: no process gives up, answers are 503, and afterwards every number is right."""
    server = Server(disk.path / "data", tmp_path / "server.log")
    try:
        server.start()
        disk.fill(leave_kib=2000)
        refused, number = until_refused(lambda events: server.client.post("/v1/events/ingest", json=events))
        processes = server.children()
        reads = {server.client.get("/v1/events/names").status_code for _ in range(50)}
        survivors = server.children()
        disk.empty()
        eventually(lambda: server.client.post("/v1/events/ingest", json=body(number)).status_code == 200)
        calls = server.calls()
    finally:
        server.close()
    log = open_log(str(server.data))
    assert_store_tells(export(server.data / "store.duckdb"), count(log))
    log.close()

    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert reads <= {200, 503}
    assert survivors == processes
    assert calls == EVENTS_A_BODY * number


def body(number: int) -> dict[str, Any]:
    """A request of some 50 KB."""
    event = {"name": "call", "external_customer_id": "ann", "metadata": {"filler": "x" * 400}}
    return {"events": [event | {"external_id": f"e{number}-{place}"} for place in range(EVENTS_A_BODY)]}


def until_refused(send: Callable[[dict[str, Any]], httpx.Response]) -> tuple[httpx.Response, int]:
    """Send bodies until one is refused; the answer and the body's number."""
    for number in range(1, BODIES_MAX):
        answer = send(body(number))
        if answer.status_code != 200:
            return answer, number
    raise AssertionError("the disk did not become full")
