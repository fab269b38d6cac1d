"""A clock that was ahead: decisions divide the records before them from those after them, whatever it says now."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from aggregator.engine.supervisor import Aggregator
from ingest.log import memory
from tests.support.records import SMALL, line
from tests.support.servers.query_api import Server, Tenant, serving

AHEAD = timedelta(hours=2)
EXTERNAL = {"external_id": "ann"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """An API whose log no other test has put ahead."""
    with serving(tmp_path) as server:
        yield server


def used(tenant: Tenant, count: int) -> None:
    """Put so many events of the customer into the log, and wait until they are counted."""
    tenant.send(*[line(f"{tenant.server.now} {number}") for number in range(count)])


def numbers(tenant: Tenant) -> tuple[int, int, int]:
    """Units consumed and credited, and the balance, of the customer's only meter."""
    [row] = tenant.get("/v1/customer-meters/")["items"]
    return row["consumed_units"], row["credited_units"], row["balance"]


def metric(server: Server) -> float:
    """Seconds by which the log's clock is ahead of this machine's, as the metrics say."""
    lines = server.ask("GET", "/metrics").text.splitlines()
    [value] = [line.split()[1] for line in lines if line.startswith("meterstream_log_clock_ahead_seconds ")]
    return float(value)


@pytest.mark.parametrize("stamped", ["an event", "a decision"])
def test_a_reset_divides_usage_though_the_clock_was_ahead(tenant: Tenant, stamped: str) -> None:
    """What was used before it is gone, and what is used after it is there, for as long as the log's time stands."""
    tenant.meter()
    tenant.server.now += AHEAD
    if stamped == "an event":
        used(tenant, 1)
        customer = None
    else:
        customer = tenant.customer(**EXTERNAL)
    tenant.server.now -= AHEAD
    customer = customer or tenant.customer(**EXTERNAL)
    used(tenant, 10)
    for expected in (1, 2, 3):
        tenant.server.now += timedelta(seconds=1)
        tenant.post(f"/v1/customers/{customer}/resets", {"meter_ids": "all"})
        assert numbers(tenant) == (0, 0, 0)
        used(tenant, expected)
        assert numbers(tenant) == (expected, 0, -expected)


def test_credits_grants_and_cycles_keep_their_order_though_the_clock_was_ahead(tenant: Tenant) -> None:
    """| what is done | credited |, each after the one before."""
    meter, customer = tenant.meter(), tenant.customer(**EXTERNAL)
    tenant.server.now += AHEAD
    used(tenant, 4)
    tenant.server.now -= AHEAD
    tenant.post(f"/v1/customers/{customer}/credits", {"meter_id": meter, "units": 30})
    assert numbers(tenant) == (4, 30, 26)
    tenant.post(f"/v1/customers/{customer}/resets", {"meter_ids": "all"})
    assert numbers(tenant) == (0, 0, 0)
    properties = {"meter_id": meter, "units": 100, "rollover": False}
    made = tenant.post("/v1/benefits/", {"type": "meter_credit", "description": "abc", "properties": properties})
    grant = tenant.post(f"/v1/benefits/{made['id']}/grants", {"customer_id": customer})["id"]
    used(tenant, 7)
    assert numbers(tenant) == (7, 100, 93)
    tenant.server.now += timedelta(minutes=1)
    tenant.post(f"/v1/benefit-grants/{grant}/cycle", {})
    assert numbers(tenant) == (0, 100, 100)
    used(tenant, 8)
    tenant.post(f"/v1/benefit-grants/{grant}/revoke", {})
    assert numbers(tenant) == (8, 0, -8)


def test_the_time_of_another_producer_moves_no_decision(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Kafka producer whose clock is 50 minutes ahead: its event is of the new window, and the reset is of now."""
    monkeypatch.setattr(memory, "next_stamp", lambda stream, now, newest: now)  # as over Kafka, each has its own clock
    tenant.meter()
    customer = tenant.customer(**EXTERNAL)
    used(tenant, 10)
    tenant.server.now += timedelta(minutes=50)
    tenant.send(line("foreign"), admitted=False)
    tenant.server.now -= timedelta(minutes=49)
    made = tenant.post(f"/v1/customers/{customer}/resets", {"meter_ids": "all"})
    assert made["at"] == tenant.server.now.strftime("%Y-%m-%dT%H:%M:%SZ")
    used(tenant, 2)
    assert numbers(tenant) == (3, 0, -3)
    assert tenant.get("/readyz")["log_clock_ahead_s"] == 0


def test_how_far_the_clock_was_ahead_is_said(tenant: Tenant) -> None:
    """By readiness, in seconds of the server's clock, and by a metric, in seconds of the machine's."""
    server = tenant.server
    assert metric(server) == 0
    used(tenant, 1)
    assert tenant.get("/readyz")["log_clock_ahead_s"] == 0
    server.now += AHEAD
    used(tenant, 1)
    server.now -= AHEAD
    assert tenant.get("/readyz")["log_clock_ahead_s"] == AHEAD.total_seconds()
    server.now = datetime.now(UTC) + AHEAD
    used(tenant, 1)
    assert 0 < metric(server) <= AHEAD.total_seconds()


def test_an_aggregator_that_starts_later_knows_the_newest_time(tenant: Tenant, tmp_path: Path) -> None:
    """It asks the log before it decides anything."""
    server = tenant.server
    server.now += AHEAD
    used(tenant, 1)
    server.now -= AHEAD
    before = server.aggregator.newest_stamp_us
    server.aggregator.stop()
    again = Aggregator(server.log, tmp_path / "store.duckdb", SMALL)
    again.start()
    try:
        assert again.newest_stamp_us == before
    finally:
        again.stop()
