"""Two real servers: ours, and one that plays the Polar organization. A test has an organization of its own on both."""

import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from aggregator.reconcile.report import Check, Difference, Done, Report
from deploy.client import Api
from deploy.control import new_organization, new_secret, new_token, open_control
from deploy.data import DataDirectory
from deploy.output import Output
from deploy.proof import prove
from deploy.reconcile import Task
from deploy.session import Session
from deploy.settings import Secret, Settings
from deploy.upstream_proof import Range, compare, send_again
from meters.catalogue import OrganizationCreated, TokenCreated
from tests.deploy.installation import Installation
from tests.waiting import eventually

NOON = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0) - timedelta(days=3)
Event = dict[str, Any]


class Side:
    """One organization of a running server."""

    def __init__(self, server: Installation) -> None:
        self.data = DataDirectory(server.data)
        self.token = new_secret()
        with open_control(self.data) as control:
            organization = new_organization("test")
            control.decide([OrganizationCreated(organization), TokenCreated(new_token(organization, "t", self.token))])
        self.id = organization.id
        self.api = Api(server.url, self.token)
        self.url = server.url
        eventually(lambda: self.api.send("GET", "/v1/meters/").status_code == 200)
        nothing = b'{"events":[]}'  # until the gateway has heard of the token, too
        eventually(lambda: self.api.send("POST", "/v1/events/ingest", content=nothing).status_code == 200)

    def post(self, path: str, body: object) -> Any:
        """The answer's JSON; what is written is visible afterwards."""
        answer = self.api.send("POST", path, content=json.dumps(body).encode())
        assert answer.is_success, answer.text
        if (position := answer.headers.get("Log-Position")) is not None:
            self.api.send("GET", "/v1/meters/", headers={"Prefer": "wait=20", "Log-Position": position})
        return answer.json()

    def patch(self, path: str, body: object) -> None:
        """A change; it is answered when it is applied."""
        answer = self.api.send("PATCH", path, content=json.dumps(body).encode())
        assert answer.is_success, answer.text

    def meter_id(self, name: str) -> str:
        """Of the meter of this name."""
        return next(str(one["id"]) for one in self.api.pages("/v1/meters/") if one["name"] == name)

    def send(self, *events: Event) -> Any:
        """Ingest."""
        return self.post("/v1/events/ingest", {"events": list(events)})

    def meter(self, name: str, clauses: list[dict[str, Any]] | None = None, **aggregation: str) -> str:
        """Make a meter; its id."""
        filter = {"conjunction": "and", "clauses": clauses or []}
        body = {"name": name, "filter": filter, "aggregation": aggregation or {"func": "count"}}
        return str(self.post("/v1/meters/", body)["id"])


class TwoSides:
    """Ours and theirs, with the same two meters."""

    def __init__(self, ours: Installation, theirs: Installation) -> None:
        self.here, self.there = Side(ours), Side(theirs)
        for side in (self.here, self.there):
            side.meter("calls")
            side.meter("tokens", func="sum", property="tokens")

    def close(self) -> None:
        """Hang up."""
        self.here.api.__exit__()
        self.there.api.__exit__()

    def forward(self, change: Callable[[Event], Event | None] = lambda event: event) -> None:
        """Hand on what was counted here. ``change`` may alter an event, or drop it with None."""
        found = self.here.api.get("/v1/feed/", limit=10_000)["items"]
        events = [change(json.loads(json.dumps(item["event"], default=float))) for item in found]
        self.there.send(*filter(None, events))

    @property
    def settings(self) -> Settings:
        """As a command would have them."""
        return Settings(
            polar_token=Secret(self.there.token), polar_server=self.there.url, polar_organization=self.here.id,
            polar_requests_per_minute=100_000,
        )  # fmt: skip

    def check(self, settle: timedelta = timedelta(0)) -> Check:
        """Compare."""
        range_ = Range(NOON - timedelta(days=3), None, settle)
        with contextlib.closing(self.here.data.open_log()) as log:
            return compare(self.settings, self.here.data, log, self.here.api, range_, datetime.now(UTC))

    def prove(self, repair: str | None = None) -> Report:
        """Compare and, if so asked, repair, as the command does it."""
        settings = msgspec.structs.replace(self.settings, data=self.here.data.path)
        task = Task(checks=("upstream",), since=NOON - timedelta(days=3), repair=repair, settle=timedelta(0))
        report = prove(Session(settings, Output.json), task)
        self.there.send()  # what was sent is visible
        return report

    def only_sums(self) -> None:
        """Archive the meter that counts events."""
        for side in (self.here, self.there):
            side.patch(f"/v1/meters/{side.meter_id('calls')}", {"is_archived": True})

    def repair(self, differences: list[Difference]) -> Done | None:
        """Send what is missing."""
        return send_again(self.settings, self.here.data, self.here.api, differences)


def call(id: str, tokens: object = 10, *, at: datetime = NOON, customer: str = "ann", **metadata: object) -> Event:
    """An event."""
    return {
        "name": "call", "external_id": id, "external_customer_id": customer, "timestamp": at.isoformat(),
        "metadata": {"tokens": tokens, **metadata},
    }  # fmt: skip


def numbered(count: int) -> Iterator[Event]:
    """Some events of three days and two customers."""
    for number in range(count):
        at = NOON + timedelta(days=number % 3, minutes=number)
        yield call(f"e{number}", number, at=at, customer=("ann", "bob")[number % 2])
