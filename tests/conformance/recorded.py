"""Requests that Polar's Python clients were recorded sending, the 0.x line and the 1.x line alike."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from meters.catalogue.catalogue import Change, Customer, CustomerCreated, MeterCreated
from meters.meter import Meter, new_meter
from tests.support.servers.multi_tenant_server import Tenant

METER = "00000000-0000-4000-8000-000000000001"
CUSTOMER = "00000000-0000-4000-8000-000000000003"
UNKNOWN = METER, CUSTOMER, "00000000-0000-4000-8000-000000000004"
RECORDED_ON = b"2026-11-21T"
BEFORE = b"2025-11-21T"  # the clock of whoever runs this may be behind the recording's
LEFT_TO_THE_CLIENT = {"authorization", "connection"}
REPLACED_ERROR = "/__fail"  # the recorder's own paths, which made a client see an error


class Recorded:
    """One request."""

    def __init__(self, line: bytes) -> None:
        stated: dict[str, Any] = json.loads(line)
        self.method, self.query, self._body = stated["method"], stated["query"], stated["body"]
        path: str = stated["path"]
        self.path = "/" + path.split("/", 2)[2] if path.startswith(REPLACED_ERROR) else path
        self.headers = {k: v for k, v in stated["headers"].items() if k not in LEFT_TO_THE_CLIENT}
        self.headers.pop("content-length", None)

    @property
    def events(self) -> list[dict[str, Any]]:
        """What it would ingest."""
        return self._body["events"] if self._body and "events" in self._body else []

    @property
    def route(self) -> str:
        """What it is, for a person: the method, and the path with its ids taken out."""
        path = self.path
        for id in UNKNOWN:
            path = path.replace(id, "{id}")
        return f"{self.method} {path}"

    @property
    def content(self) -> bytes | None:
        """The body's bytes."""
        return None if self._body is None else json.dumps(self._body).encode()

    @property
    def target(self) -> str:
        """Path and query as they were sent."""
        return f"{self.path}?{self.query}" if self.query else self.path


def recorded() -> list[Recorded]:
    """All of them, in the order of the recording."""
    text = (Path(__file__).parent / "sdk-requests.jsonl").read_bytes()
    return [Recorded(line) for line in text.replace(RECORDED_ON, BEFORE).splitlines()]


def named_things(tenant: Tenant) -> list[Change]:
    """The customer and the meter that the requests name by their ids, as things of this tenant."""
    now = datetime.now(UTC)
    customer = Customer(
        id=CUSTOMER, organization_id=tenant.id, external_id="u1", email="u1@example.com", created_at=now
    )
    body = {"name": "recorded", "filter": {"conjunction": "and", "clauses": []}, "aggregation": {"func": "count"}}
    meter = new_meter(body, id=METER, organization_id=tenant.id, created_at=now)
    assert isinstance(meter, Meter)
    return [CustomerCreated(customer), MeterCreated(meter)]
