"""What direct producers name that is nobody's: organizations without a decision, customers that were never made."""

import re
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from meters.catalogue.access import SCOPES
from meters.catalogue.catalogue import Organization, OrganizationCreated
from meters.log import USAGE_EVENTS
from tests.support.records import NOW, Running, entry, line, organization
from tests.support.servers.query_api import Server, Tenant, serving
from tests.support.waiting import PATIENCE_S


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of its own, because what belongs to nobody is seen by the first organization there is."""
    with serving(tmp_path) as server:
        yield server


def send(server: Server, *lines: bytes, organization_id: str | None) -> None:
    """A record of a direct producer, counted when this returns."""

    async def sending() -> None:
        record = entry(*lines, organization_id=organization_id, admitted=False)
        (offset,) = await server.log.append(USAGE_EVENTS, [record])
        assert await server.aggregator.wait_for({0: offset + 1}, PATIENCE_S)

    server.run(sending())


def unknown(server: Server) -> int:
    """The metric."""
    text = server.aggregator.telemetry.text().decode()
    found = re.search(r"^meterstream_unknown_organization_events (\S+)$", text, re.MULTILINE)
    assert found, "no such metric"
    return int(float(found.group(1)))


def test_events_of_organizations_that_nobody_made_are_counted_in_a_metric(server: Server) -> None:
    """Named in the header or in the line; a decision that comes later makes them an organization's like any others."""
    known, late, never = server.tenant(), str(uuid4()), str(uuid4())
    known.send(line("known"))
    assert unknown(server) == 0
    send(server, line("a"), line("b"), organization_id=late.upper())
    send(server, line("c", organization_id=never), line("d", organization_id=known.id), organization_id=None)
    send(server, line("a"), organization_id=late)  # repeated, so not stored
    assert unknown(server) == 3
    assert known.get("/v1/dead-letters/")["items"] == []

    server.decide(OrganizationCreated(Organization(late, "late", NOW)))
    tenant = Tenant(server, late)
    tenant.secret = tenant.token(*SCOPES)
    assert unknown(server) == 1
    assert [item["name"] for item in tenant.get("/v1/events/")["items"]] == ["call", "call"]
    send(server, line("e"), organization_id=late)
    assert unknown(server) == 1


def test_the_metric_survives_a_restart(server: Server, tmp_path: Path) -> None:
    """The next life counts them in the store, once."""
    ids = [str(uuid4()) for _ in range(2)]
    for organization_id in ids:
        send(server, line("a"), line("b"), organization_id=organization_id)
    server.decide(organization(ids[0]))
    with Running(server.log, tmp_path / "again.duckdb") as running:
        assert running.catch_up().strangers.events == 2
    with Running(server.log, tmp_path / "again.duckdb") as running:
        assert running.engine.strangers.events == 2


def test_a_customer_that_nobody_made_is_stored_for_a_direct_producer(server: Server) -> None:
    """Where HTTP refuses it: the line may have been written before the customer's decision was read."""
    tenant, nobody = server.tenant(), str(uuid4())
    fields = {"external_customer_id": None, "customer_id": nobody}
    send(server, line("a", **fields), organization_id=tenant.id)
    (item,) = tenant.get("/v1/events/")["items"]
    assert (item["customer_id"], item["customer"]) == (nobody, None)
    assert tenant.get("/v1/dead-letters/")["items"] == []
