"""An API over a real aggregator: events go into the log, questions go over HTTP."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any

import httpx

from aggregator.api import Rules, create_app
from aggregator.consumer import Aggregator
from ingest.log import open_log
from meters.access import SCOPES, digest
from meters.catalogue import Change, Token, TokenCreated
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log, format_position
from tests.aggregator.records import (
    NOW,
    NOW_US,
    ORGANIZATION,
    OTHER_ORGANIZATION,
    SMALL,
    decisions,
    entry,
    line,
    organization,
)

SECRET = "polar_oat_full"
OTHER_SECRET = "polar_oat_other"
READING_SECRET = "polar_oat_reading_meters"
LIMIT_S = 20


def token(secret: str, organization_id: str, scopes: list[str]) -> Change:
    """The decision that makes a token good."""
    made = Token(
        id=f"token {secret}",
        organization_id=organization_id,
        name="test",
        sha256=digest(secret),
        scopes=scopes,
        created_at=NOW,
    )
    return TokenCreated(made)


STARTING = [
    organization(),
    organization(OTHER_ORGANIZATION),
    token(SECRET, ORGANIZATION, list(SCOPES)),
    token(OTHER_SECRET, OTHER_ORGANIZATION, list(SCOPES)),
    token(READING_SECRET, ORGANIZATION, ["meters:read"]),
]


class Served:
    """A client of the API, the log behind it, and the app itself."""

    def __init__(self, log: Log, aggregator: Aggregator, rules: Rules) -> None:
        self._log = log
        self.aggregator = aggregator
        numbers = count(1)
        self.app = create_app(
            aggregator, lambda: NOW, lambda: f"00000000-0000-4000-8000-{next(numbers):012d}",
            aggregator.telemetry.text, rules,
        )  # fmt: skip
        transport = httpx.ASGITransport(app=self.app)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://meterstream.test")

    async def send(self, *lines: bytes, organization_id: str | None = ORGANIZATION, admitted: bool = True) -> str:
        """Put events into the log and wait until they are visible; return the ``Log-Position``."""
        (offset,) = await self._log.append(
            USAGE_EVENTS, [entry(*lines, organization_id=organization_id, admitted=admitted)]
        )
        assert await self.aggregator.wait_for({0: offset + 1}, LIMIT_S)
        return format_position({0: offset + 1})

    async def event(self, external_id: str | None = None, **fields: Any) -> str:
        """Send one event."""
        return await self.send(line(external_id, **fields))

    async def ask(
        self, method: str, path: str, *, secret: str | None = SECRET, headers: dict[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        """One request, with the organization's token unless another (or none) is given."""
        authorization = {"Authorization": f"Bearer {secret}"} if secret else {}
        return await self.http.request(method, path, headers=authorization | (headers or {}), **more)

    async def get(self, path: str, **params: Any) -> Any:
        """The JSON of a GET that succeeds, its fractions exact."""
        response = await self.ask("GET", path, params=params)
        assert response.status_code == 200, response.text
        return exact(response)

    async def post(self, path: str, body: Any) -> Any:
        """The JSON of a POST that succeeds."""
        response = await self.ask("POST", path, json=body)
        assert response.is_success, response.text
        return exact(response)

    async def meter(self, filter: dict[str, Any] | None = None, **aggregation: Any) -> str:
        """Make a meter and return its id."""
        body = {
            "name": "Tokens",
            "filter": filter or {"conjunction": "and", "clauses": []},
            "aggregation": aggregation or {"func": "count"},
        }
        made: str = (await self.post("/v1/meters/", body))["id"]
        return made

    async def refusal(self, method: str, path: str, **more: Any) -> tuple[int, str, list[tuple[str, list[Any]]]]:
        """Status, error and the (type, loc) of each complaint of a request that is refused."""
        response = await self.ask(method, path, **more)
        body = response.json()
        return response.status_code, body["error"], [(entry["type"], entry["loc"]) for entry in body["detail"]]


def exact(response: httpx.Response) -> Any:
    """JSON with its fractions as decimals."""
    return json.loads(response.content, parse_float=Decimal)


@asynccontextmanager
async def serving(path: Path, rules: Rules = Rules()) -> AsyncIterator[Served]:  # noqa: B008 - an immutable value
    """A running API with two organizations and a token each (SECRET, OTHER_SECRET), and nothing else."""
    log = open_log("memory:", clock_us=lambda: NOW_US)
    aggregator = Aggregator(log, path / "store.duckdb", SMALL)
    await log.append(USAGE_CONTROL, decisions(STARTING))
    aggregator.start()
    served = Served(log, aggregator, rules)
    try:
        assert await aggregator._wait(lambda: len(aggregator.catalogue.tokens) == 3, LIMIT_S)
        yield served
    finally:
        await served.http.aclose()
        aggregator.stop()
        log.close()
