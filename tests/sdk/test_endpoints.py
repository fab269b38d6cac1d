"""Webhook endpoints and deliveries, managed and read with Polar's own Python clients, of both generations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sdk import story
from tests.support.environments import reported
from tests.support.servers.multi_tenant_server import Server, Tenant

SCRIPTS = {"0.32.0": "hooks_0_32.py", "1.0.2": "hooks_1_0.py"}
TIME_LIMIT = pytest.mark.timeout(1200)  # the first test may have to install both clients
MANAGED = {
    "made": {"format": "raw", "events": ["customer.state_changed"], "enabled": True, "name": "ours"},
    "secrets": [True, True],
    "found": [True, True],
    "changed": ["theirs", False, story.MASKED],
    "left": 0,
}
DELIVERED = {
    "refused": [False, 401, None],
    "lost": [False, None, "no connection: ConnectError"],
    "event": {"type": "customer.state_changed", "skipped": False, "is_archived": False, "told_of": "acme"},
}
MORE: dict[str, tuple[Any, Any]] = {
    "0.32.0": ({}, {"again": 2}),
    "1.0.2": ({"signatures": ["2026-10", True]}, {}),
}
"""What one client alone shows."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, dict[str, list[Tenant]]]]:
    """A server that may tell its own machine, and two organizations for each client."""
    monkeypatch.setenv("METERSTREAM_WEBHOOK_PRIVATE_TARGETS", "true")
    tenants = {version: [Tenant(f"{version} {which}") for which in ("own", "other")] for version in SCRIPTS}
    server = Server(tmp_path / "data", [one for each in tenants.values() for one in each], [])
    try:
        server.start()
        yield server, tenants
    finally:
        server.close()


@TIME_LIMIT
def test_clients_of_polar_manage_endpoints_and_read_deliveries(
    server: tuple[Server, dict[str, list[Tenant]]],
) -> None:
    """All that each insists on is there, and true; only endpoints that ask for a type of ours cannot be listed."""
    here, tenants = server
    for version, (own, other) in tenants.items():
        other.read("POST", "/v1/webhooks/endpoints", body={
            "url": "https://example.com/", "events": ["customer.state_changed", "meter.threshold_reached"],
        })  # fmt: skip
        told = reported(version, SCRIPTS[version], [here.url, own.secret, other.secret])
        managed, delivered = MORE[version]
        assert told == {
            "managed": MANAGED | managed, "delivered": DELIVERED | delivered, "beyond": "fails"
        }, version  # fmt: skip
