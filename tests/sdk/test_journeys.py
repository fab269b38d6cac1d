"""Polar's own Python clients, two generations of them, against a running server: the same story, the same answers."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sdk import story
from tests.support.environments import interpreter
from tests.support.servers.multi_tenant_server import Server, Tenant

JOURNEYS = {"0.32.0": "journey_0_32.py", "1.0.2": "journey_1_0.py"}
HELPED = "0.32.0"  # the generation with the ingestion helper
JOURNEY_S_MAX = 100
TIME_LIMIT = pytest.mark.timeout(1200)  # the first test may have to install both clients


class Journeys:
    """What each client printed, and the tenant whose token it had."""

    def __init__(self, server: Server, tenants: dict[str, Tenant]) -> None:
        self.tenants = tenants
        here = Path(__file__).parent
        running = {
            version: subprocess.Popen(
                [interpreter(version), here / script, server.url, tenants[version].secret],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for version, script in JOURNEYS.items()
        }  # fmt: skip
        try:
            self.done = {version: process.communicate(timeout=JOURNEY_S_MAX) for version, process in running.items()}
        finally:
            for process in running.values():
                process.kill()  # nothing, unless one did not come to its end
                process.communicate()

    def told(self, version: str) -> Any:
        """What the journey printed."""
        printed, complaints = self.done[version]
        assert complaints == ""
        return json.loads(printed)


@pytest.fixture(scope="module")
def journeys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journeys]:
    """Both journeys, side by side, each as a tenant of its own."""
    for version in JOURNEYS:
        interpreter(version)
    tenants = {version: Tenant(version) for version in JOURNEYS}
    server = Server(tmp_path_factory.mktemp("journeys") / "data", list(tenants.values()), [])
    try:
        server.start()
        yield Journeys(server, tenants)
    finally:
        server.close()


CHANGED_METER = story.METER | story.CHANGED
POINTS = ("2026-01-10T00:00:00Z", "2026-01-11T00:00:00Z", "2026-01-12T00:00:00Z")
EXPECTED: dict[str, Any] = {
    "customers": {"made": story.CUSTOMER | {"type": "individual", "deleted_at": None}, "found": [True, True, True]},
    "ingestion": {
        "batch": {"inserted": 5, "duplicates": 0},
        "again": {"inserted": 0, "duplicates": 1},
        "nothing": {"inserted": 0, "duplicates": 0},
    },
    "meters": {
        "made": story.METER | {"unit": "scalar", "metadata": {}},
        "found": [True, True],
        "changed": CHANGED_METER,
        "is_modified": True,
    },
    "quantities": {
        "all": {
            "quantities": [{"timestamp": at, "quantity": n} for at, n in zip(POINTS, (822, 188, 0), strict=True)],
            "total": 1010,
        },
        "acme": 1010,
        "globex": 0,
        "small": 188,
        "largest_customer": 1010,
        "berlin": list(POINTS),
    },
    "metrics": {
        "periods": [
            dict(zip(("timestamp", *story.METRICS), values, strict=True))
            for values in (
                (POINTS[0], 0.0425, 0.0425, 1, 0.0425),
                (POINTS[1], 1.25, 1.2925, 1, 1.25),
                (POINTS[2], 0, 1.2925, 1, 0),
            )
        ],
        "totals": dict(zip(story.METRICS, (1.2925, 1.2925, 2, 0.64625), strict=True)),  # acme, by two names, and globex
        "kinds": dict.fromkeys(story.METRICS, "currency_sub_cent") | {"active_user_by_event": "scalar"},
        "limits": {
            "min_date": "2023-01-01",
            "intervals": {
                "hour": {"min_days": 0, "max_days": 7},
                "day": {"min_days": 0, "max_days": 366},
                "week": {"min_days": 14, "max_days": 371},
                "month": {"min_days": 60, "max_days": 1460},
                "year": {"min_days": 366, "max_days": 3650},
            },
        },
        "told_of_all": sorted(["timestamp", *story.METRICS]),  # asked for every metric that the client knows
    },
    "balances": {
        "benefit": True,
        "states": True,
        "grants": [{"benefit_type": "meter_credit", "benefit_metadata": {"plan": "pro"}}],
        "state": [[1010, 2000, 990]],
        "customer_meters": [[1010, 2000, 990], [1010, 2000, 990]],
        "names": ["ann@example.com", "All tokens"],
        "session": ["polar_cst_", True],
        "myself": [True, "ann@example.com", "Ann", "individual", {}, None],
        "listed": [["ann@example.com", "2,000 tokens"]],
        "own": [["2,000 tokens", False]],
        "export": [["Email", "Name", "Metadata"], ["ann@example.com", "Ann", '{"plan":"pro","seats":3}']],
        "portal": [[1010, 2000, 990, "All tokens"]],
    },
    "refusals": {
        "unknown": [404, "ResourceNotFound", "Not found"],
        "malformed": [422, True],
        "stranger": [401, "invalid_token"],
    },
}


def events_of(tenant: Tenant) -> dict[str, Any]:
    """What lists of events must show; the server names an event after its external id."""
    root, step, by_id = map(tenant.public_id, ("run-1", "step-1", "step-2"))
    acme = {"label": "chat.completion", "name": "chat.completion", "source": "user", "customer": "ann@example.com",
            "external_customer_id": "acme", "is_by_id": False, "parent_id": None, "child_count": 0}  # fmt: skip
    names = {"api.request": 1, "chat.completion": 2, "chat.session": 1, "ping": 1}
    return {
        "chats": [
            acme | {"id": root, "timestamp": story.ROOT["timestamp"], "metadata": story.ROOT["metadata"],
                    "name": "chat.session", "label": "chat.session", "child_count": 1},
            acme | {"id": step, "timestamp": "2026-01-10T09:01:00.250000Z", "parent_id": root,
                    "metadata": {**story.STEP["metadata"], "_cost": {"amount": "0.0425", "currency": "usd"}}},
            acme | {"id": by_id, "timestamp": story.BY_ID["timestamp"], "external_customer_id": None, "is_by_id": True,
                    "metadata": {**story.BY_ID["metadata"], "_cost": {"amount": "1.25", "currency": "usd"}}},
        ],
        "pages": {"total_count": 3, "max_page": 1},
        "one": True,
        "filter": [step],
        "metadata": [root, step],
        "external_customer_id": [root, step, by_id],
        "customer_id": [root, step, by_id],
        "meter_id": [root, step, by_id],
        "roots": [root, by_id],
        "below": [step],
        "between": [step],
        "second_page": 2,
        "names": [{"name": name, "label": name, "source": "user", "occurrences": n} for name, n in names.items()],
    }  # fmt: skip


@TIME_LIMIT
@pytest.mark.parametrize("section", [*EXPECTED, "events"])
@pytest.mark.parametrize("version", JOURNEYS)
def test_a_client_of_polar_reads_what_it_wrote(journeys: Journeys, version: str, section: str) -> None:
    """Each part of the story has the same end with either client, to the last digit, and neither complains."""
    expected = events_of(journeys.tenants[version]) if section == "events" else EXPECTED[section]
    assert journeys.told(version)[section] == expected


@TIME_LIMIT
def test_the_ingestion_helper_delivers_everything(journeys: Journeys) -> None:
    """What was queued arrives, in batches and with the rest at the end, and nothing arrives twice."""
    assert journeys.told(HELPED)["helper"] == {"numbers": [0, 1, 2, 3, 4]}
