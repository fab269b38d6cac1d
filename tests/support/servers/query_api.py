"""An API over a real aggregator: events go into the log, questions go over HTTP, each test is a tenant of its own."""

import asyncio
import json
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch
from uuid import uuid4

import httpx

from aggregator.api import create_app
from aggregator.engine.supervisor import Aggregator
from aggregator.store.database import Settings
from aggregator.view import Unavailable
from ingest.log import open_log
from meters.catalogue.access import SCOPES, digest
from meters.catalogue.catalogue import Change, Organization, OrganizationCreated, Token, TokenCreated
from meters.event import event_id, identity
from meters.log import USAGE_EVENTS, format_position
from meters.timestamps import microseconds_of
from tests.support.records import NOW, SMALL, entry, line
from tests.support.waiting import PATIENCE_S

T = TypeVar("T")
AT_ONCE = 0.0  # the clock stands while a test asks, so nothing is on its way
Json = Any


def exact(response: httpx.Response) -> Json:
    """JSON with its fractions as decimals."""
    return exact_text(response.content)


def exact_text(text: bytes) -> Json:
    """The same, of any text."""
    return json.loads(text, parse_float=Decimal)


class Server:
    """The app, in this process, with an event loop of its own; ``run`` lets a coroutine run on it."""

    def __init__(self, path: Path, settled_s: float, settings: Settings) -> None:
        self._runner = asyncio.Runner()
        self.now = NOW
        self.log = open_log("memory:", clock_us=lambda: microseconds_of(self.now))
        self._settled_s, self._settings, self._numbers = settled_s, settings, count(1)
        self._open(path / "store.duckdb")

    def _open(self, store: Path) -> None:
        self.aggregator = Aggregator(self.log, store, self._settings)
        self.app = create_app(
            self.aggregator,
            lambda: self.now,
            lambda: f"00000000-0000-4000-8000-{next(self._numbers):012d}",
            self.aggregator.telemetry.text,
            settled_s=self._settled_s,
            private_targets=True,
        )
        transport = httpx.ASGITransport(app=self.app)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://meterstream.test")
        self.aggregator.start()

    def restart(self, store: Path) -> None:
        """Stop, and start on a store: the same one, or another one that is rebuilt from the log."""
        self.run(self.http.aclose())
        self.aggregator.stop()
        self._open(store)
        assert self.run(self.aggregator.informed(PATIENCE_S))
        assert self.run(self.aggregator.present(PATIENCE_S))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the server's loop."""
        return self._runner.run(work)

    def close(self) -> None:
        """Stop everything."""
        self.run(self.http.aclose())
        self.aggregator.stop()
        self.log.close()
        self._runner.close()

    def ask(
        self, method: str, path: str, *, secret: str | None = None, headers: dict[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        """One request, with a token if there is one."""
        authorization = {"Authorization": f"Bearer {secret}"} if secret else {}
        return self.run(self.http.request(method, path, headers=authorization | (headers or {}), **more))

    def decide(self, *changes: Change) -> None:
        """Decisions of the operator, in force when this returns."""
        for change in changes:
            self.run(self.aggregator.decide(change))

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """The next decision is durable, and nobody here hears of it before the one after it is made."""
        decide, unheard = self.aggregator.decide, list[tuple[Change, ...]]()

        async def late(*changes: Change) -> None:
            if not unheard:
                unheard.append(changes)
                raise Unavailable("the decision is durable but not yet applied")
            for decided in (unheard[0], changes):
                await decide(*decided)

        with patch.object(self.aggregator, "decide", late):
            yield

    def tenant(self) -> "Tenant":
        """A new organization with a token that may do everything."""
        tenant = Tenant(self, str(uuid4()))
        self.decide(OrganizationCreated(Organization(tenant.id, "test", NOW)))
        tenant.secret = tenant.token(*SCOPES)
        return tenant


class Tenant:
    """An organization as its administrator and its producers see it."""

    def __init__(self, server: Server, id: str) -> None:
        self.server, self.id = server, id
        self.secret = ""

    def token(self, *scopes: str, expires_at: datetime | None = None) -> str:
        """The secret of a new token."""
        secret = f"polar_oat_{uuid4().hex}"
        made = Token(
            id=str(uuid4()),
            organization_id=self.id,
            name="test",
            sha256=digest(secret),
            scopes=list(scopes),
            created_at=NOW,
            expires_at=expires_at,
        )
        self.server.decide(TokenCreated(made))
        return secret

    def send(self, *lines: bytes, admitted: bool = True) -> str:
        """Put events into the log and wait until they are visible; the ``Log-Position`` of the last."""

        async def sending() -> str:
            record = entry(*lines, organization_id=self.id, admitted=admitted)
            (offset,) = await self.server.log.append(USAGE_EVENTS, [record])
            assert await self.server.aggregator.wait_for({0: offset + 1}, PATIENCE_S)
            return format_position({0: offset + 1})

        return self.server.run(sending())

    def event(self, external_id: str | None = None, **fields: Any) -> str:
        """Send one event and return the id that it has in answers."""
        external_id = external_id or uuid4().hex
        self.send(line(external_id, **fields))
        return self.id_of(external_id)

    def id_of(self, external_id: str) -> str:
        """The public id of an event of this organization."""
        return event_id(*identity(self.id, external_id))

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """One request with the tenant's token, or another ``secret``."""
        return self.server.ask(method, path, **{"secret": self.secret, **more})

    def get(self, path: str, **params: Any) -> Json:
        """The JSON of a GET that succeeds."""
        return self._succeed("GET", path, params=params)

    def post(self, path: str, body: Json) -> Json:
        """The JSON of a POST that succeeds."""
        return self._succeed("POST", path, json=body)

    def patch(self, path: str, body: Json) -> Json:
        """The JSON of a PATCH that succeeds."""
        return self._succeed("PATCH", path, json=body)

    def _succeed(self, method: str, path: str, **more: Any) -> Json:
        response = self.ask(method, path, **more)
        assert response.is_success, response.text
        return exact(response)

    def refusal(self, method: str, path: str, **more: Any) -> tuple[int, str, list[tuple[str, list[Any]]]]:
        """Status, error, and the (type, loc) of each complaint of a request that is refused."""
        response = self.ask(method, path, **more)
        body = response.json()
        details = body["detail"] if isinstance(body["detail"], list) else []
        return response.status_code, body["error"], [(entry["type"], entry["loc"]) for entry in details]

    def meter(self, filter: Json = None, **aggregation: Any) -> str:
        """Make a meter; its id. Everything is counted by default."""
        body = {
            "name": "Tokens",
            "filter": filter or {"conjunction": "and", "clauses": []},
            "aggregation": aggregation or {"func": "count"},
        }
        made: str = self.post("/v1/meters/", body)["id"]
        return made

    def customer(self, **fields: Any) -> str:
        """Make a customer; its id."""
        made: str = self.post("/v1/customers/", {"email": f"{uuid4().hex}@example.com", **fields})["id"]
        return made


@contextmanager
def serving(path: Path, settled_s: float = AT_ONCE, settings: Settings = SMALL) -> Iterator[Server]:
    """A running API without any organization."""
    server = Server(path, settled_s, settings)
    try:
        yield server
    finally:
        server.close()
