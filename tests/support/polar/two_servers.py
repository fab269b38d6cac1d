"""Two real servers: ours, and one that plays the Polar organization. A test has an organization of its own on both."""

import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from aggregator.forward.feed_client import Source
from aggregator.forward.planner import Item
from aggregator.forward.state import State
from aggregator.reconcile.polar_check import UpstreamCheck
from aggregator.reconcile.polar_reader import DAY, Reader, Scope, midnight
from aggregator.reconcile.report import Check, Difference, Done, Report, Worth
from deploy.client import Api, Session
from deploy.console import Output
from deploy.reconcile.local import Task
from deploy.reconcile.polar import Range, compare
from deploy.reconcile.run import prove, send_again
from deploy.server.control import Control, new_organization, new_secret, new_token, open_control
from deploy.server.data import DataDirectory
from deploy.settings import Settings, Token
from meters.catalogue.catalogue import OrganizationCreated, TokenCreated
from tests.support.servers.installation import Installation
from tests.support.waiting import eventually

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
        self.books = self.here.data  # where the forwarder keeps how far it got
        self.chosen: dict[str, Any] = {}  # further settings
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
            polar_token=Token(self.there.token), polar_server=self.there.url, polar_organization=self.here.id,
            polar_requests_per_minute=100_000, **self.chosen,
        )  # fmt: skip

    def begin(self, books: DataDirectory, at: datetime) -> None:
        """Forwarding begins behind everything that is counted here now, by a clock that shows this time."""
        self.books = books
        with self._forwarder() as (source, state):
            state.begin("raw", source.end(), int(at.timestamp() * 1_000_000))

    def taken(self, *items: Item) -> None:
        """The forwarder's books say that it took everything that is counted here, and what became of these."""
        with self._forwarder() as (source, state):
            state.mark("raw", items, source.end(), 0)

    @contextlib.contextmanager
    def _forwarder(self) -> Iterator[tuple[Source, State]]:
        source, state = Source(self.here.url, self.here.token), State(self.books.forwarding)
        with contextlib.closing(source), contextlib.closing(state):
            yield source, state

    def watch(self, here: Reader | None = None, there: Reader | None = None) -> Check:
        """Compare through readers of the test's own, as from three days before noon on."""
        now = datetime.now(UTC)
        with contextlib.closing(self.here.data.open_log()) as log:
            catalogue = Control(log).catalogue
        meters = [meter for meter in catalogue.meters_of(self.here.id) if meter.archived_at is None]
        scope = Scope(
            organization_id=self.here.id, since=midnight(NOON) - 3 * DAY, until=midnight(now) + DAY, arrived_before=now,
        )  # fmt: skip
        return UpstreamCheck(
            here or self.here.api, there or self.there.api, scope, meters, Worth(catalogue)
        ).run()

    def check(self, settle: timedelta = timedelta(0), now: datetime | None = None) -> Check:
        """Compare, as if it were this time."""
        range_ = Range(NOON - timedelta(days=3), None, settle)
        with contextlib.closing(self.here.data.open_log()) as log:
            return compare(self.settings, self.books, log, self.here.api, range_, now or datetime.now(UTC))

    def prove(self, repair: str | None = None) -> Report:
        """Compare and, if so asked, repair, as the command does it."""
        report = prove(self.session, msgspec.structs.replace(self.task, repair=repair))
        self.there.send()  # what was sent is visible
        return report

    @property
    def session(self) -> Session:
        """The command's settings."""
        return Session(msgspec.structs.replace(self.settings, data=self.here.data.path), Output.json)

    @property
    def task(self) -> Task:
        """What the command is to do, without a repair."""
        return Task(checks=("upstream",), since=NOON - timedelta(days=3), settle=timedelta(0))

    def only_sums(self) -> None:
        """Archive the meter that counts events."""
        for side in (self.here, self.there):
            side.patch(f"/v1/meters/{side.meter_id('calls')}", {"is_archived": True})

    def repair(self, differences: list[Difference]) -> Done | None:
        """Send what is missing."""
        return send_again(self.settings, self.books, self.here.api, differences)


def call(id: str, tokens: object = 10, *, at: datetime = NOON, customer: str = "ann", **metadata: object) -> Event:
    """An event."""
    return {
        "name": "call", "external_id": id, "external_customer_id": customer, "timestamp": at.isoformat(),
        "metadata": {"tokens": tokens, **metadata},
    }  # fmt: skip


def item(external_id: str, **became: Any) -> Item:
    """An event of Ann's as the forwarder has it."""
    return Item(
        lane="raw", external_id=external_id, who="e:ann", timestamp_us=1, ingested_us=1, body=b"{}", **became
    )


def numbered(count: int) -> Iterator[Event]:
    """Some events of three days and two customers."""
    for number in range(count):
        at = NOON + timedelta(days=number % 3, minutes=number)
        yield call(f"e{number}", number, at=at, customer=("ann", "bob")[number % 2])
