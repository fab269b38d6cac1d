"""Many tenants of one running server: each case has an organization of its own, so that none sees another's events.

What no request can make (organizations, tokens, things with a certain id) is decided in the control stream before the
server starts, as the command line would do it. Everything after that goes through the server's public port.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from deploy.server.control import new_organization, new_secret, new_token, open_control
from deploy.server.data import DataDirectory
from meters import exact
from meters.catalogue.catalogue import Change, Customer, CustomerCreated, OrganizationCreated, TokenCreated
from meters.event import event_id, identity
from tests.support.servers.installation import Installation

WAIT_S = 30  # how long a server lets a read wait, at most, for what was written; it takes milliseconds
Json = Any


def uuid_text() -> str:
    """An id as Polar takes it."""
    return str(uuid4())


class Tenant:
    """An organization, its token, and a client that reads what it wrote."""

    http: httpx.Client  # of the server, once it runs

    def __init__(self, name: str, customers: Iterable[tuple[str, str | None]] = ()) -> None:
        self.organization = new_organization(name)
        self.secret = new_secret()
        self.ids = {symbol: uuid_text() for symbol, _ in customers}
        self._external_ids = dict(customers)

    @property
    def id(self) -> str:
        """Of the organization."""
        return self.organization.id

    def changes(self) -> list[Change]:
        """The decisions that make the organization, its token and its customers."""
        token = new_token(self.organization, "test", self.secret)
        customers = [
            Customer(
                id=id, organization_id=self.id, external_id=self._external_ids[symbol], email=f"{symbol}@example.com",
                created_at=datetime.now(UTC),
            )
            for symbol, id in self.ids.items()
        ]  # fmt: skip
        return [OrganizationCreated(self.organization), TokenCreated(token), *map(CustomerCreated, customers)]

    def ask(self, method: str, path: str, *, body: Json = None, **more: Any) -> httpx.Response:
        """One request; numbers in its body keep their digits. A read waits for what this server took before."""
        headers = {"authorization": f"Bearer {self.secret}", **more.pop("headers", {})}
        if body is not None:
            more["content"] = exact.encode(body)
            headers["content-type"] = "application/json"
        return self.http.request(method, path, headers=headers, **more)

    def read(self, method: str, path: str, *, body: Json = None, **params: Any) -> Json:
        """The JSON, with exact numbers, of a request that succeeds."""
        answer = self.ask(method, path, body=body, params=params)
        assert answer.is_success, f"{answer.status_code} {answer.text}"
        return exact.decode(answer.content)

    def get(self, path: str, **params: Any) -> Json:
        """The JSON of a GET."""
        return self.read("GET", path, **params)

    def send(self, events: Sequence[Json]) -> httpx.Response:
        """Post events."""
        return self.ask("POST", "/v1/events/ingest", body={"events": events})

    def make_meter(self, filter: Json, aggregation: Json) -> str:
        """The id of a new meter."""
        body = {"name": "meter", "filter": filter, "aggregation": aggregation}
        made: str = self.read("POST", "/v1/meters/", body=body)["id"]
        return made

    def public_id(self, external_id: str) -> str:
        """How answers name the event that was sent under this id."""
        return event_id(*identity(self.id, external_id))


class Server:
    """A running installation with its tenants."""

    def __init__(self, path: Path, tenants: Sequence[Tenant], changes: Sequence[Change]) -> None:
        self._installation = Installation(path)
        self._tenants = tenants
        with open_control(DataDirectory(path), create=True) as control:
            control.decide([*(change for tenant in tenants for change in tenant.changes()), *changes])

    def start(self) -> None:
        """Serve, and give every tenant its connection."""
        self._installation.token = self._tenants[0].secret
        self._installation.start()
        self._http = httpx.Client(base_url=self._installation.url, timeout=2 * WAIT_S)
        for tenant in self._tenants:
            tenant.http = self._http

    @property
    def url(self) -> str:
        """Where it answers."""
        return self._installation.url

    def settle(self, position: str) -> None:
        """Let every read from now on wait for what was written up to here."""
        self._http.headers.update({"prefer": f"wait={WAIT_S}", "log-position": position})

    def close(self) -> None:
        """Stop."""
        self._http.close()
        self._installation.close()
