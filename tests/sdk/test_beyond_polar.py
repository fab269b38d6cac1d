"""What Polar's own clients make of meters whose filters Polar does not have. README says whom that concerns."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.support.environments import reported
from tests.support.servers.multi_tenant_server import Server, Tenant

READERS = {"0.32.0": "beyond_0_32.py", "1.0.2": "beyond_1_0.py"}
BEYOND: dict[str, tuple[str, Any]] = {
    "in": ("in", ["small", "large"]),
    "no value": ("in", []),
    "exists": ("exists", True),
    "fraction": ("gt", Decimal("0.5")),
}
READ: dict[str, tuple[str, Any]] = {"Polar's": ("gt", 5), "large integer": ("gt", 2**40)}
"""Polar itself takes the first alone; its clients do not mind the second."""
SHOWS_FILTERS = {"meters.list", "meters.get", "meters.update", "customer_meters.list"}


def prepared(tenant: Tenant, operator: str, value: Any) -> list[str]:
    """A tenant's token and the id of its meter, which has a customer."""
    clause = {"property": "k", "operator": operator, "value": value}
    meter = tenant.make_meter({"conjunction": "and", "clauses": [clause]}, {"func": "count"})
    credit = {"meter_id": meter, "units": 5}
    tenant.read("POST", f"/v1/customers/{tenant.ids['ann']}/credits", body=credit)
    return [tenant.secret, meter]


@pytest.mark.timeout(1200)  # it may have to install both clients
def test_clients_of_polar_cannot_read_a_meter_whose_filter_is_beyond_polars(tmp_path: Path) -> None:
    """One such meter, and every list that shows it fails in both generations; states, events, quantities are read."""
    tenants = {kind: Tenant(kind, [("ann", "ann")]) for kind in BEYOND | READ}
    server = Server(tmp_path / "data", list(tenants.values()), [])
    try:
        server.start()
        meters = {kind: prepared(tenants[kind], *clause) for kind, clause in (BEYOND | READ).items()}
        for version, script in READERS.items():
            for kind, outcomes in reported(version, script, [server.url, meters]).items():
                failing = {way for way, outcome in outcomes.items() if outcome == "fails"}
                assert failing == (SHOWS_FILTERS if kind in BEYOND else set()), (version, kind)
    finally:
        server.close()
