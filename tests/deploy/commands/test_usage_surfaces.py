"""One question, one answer: the usage route, the command line, the portal, quantities and lists of events agree.

All are compared with a bookkeeper in plain Python. The command runs in this process, against a real server.
"""

import contextlib
import io
import json
import random
from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
from hypothesis import given, settings

from deploy.app import run
from deploy.settings import Settings
from tests.support.servers.installation import PATIENCE_S, Installation
from tests.support.usage_oracle import Book, Customer, Question, Row, aggregate, questions, rows_of, sample
from tests.support.waiting import eventually

EXAMPLES = 40  # twenty times as many with --long
EVENTS = 300
EVERYTHING = {"conjunction": "and", "clauses": []}
COMPARABLE = {"UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu"}  # Polar's steps begin its units there
POLARS_DAYS = {"hour": 7, "day": 366, "week": 371, "month": 1460, "year": 3650}


class Surfaces:
    """A running server with usage of three customers, and everything that can be asked about it."""

    def __init__(self, place: Installation) -> None:
        self._http = httpx.Client(
            base_url=place.url, headers={"Authorization": f"Bearer {place.token}"}, timeout=PATIENCE_S
        )
        self._settings = Settings(url=place.url).but(token=place.token)
        made = self._sent("POST", "/v1/customers/", {"email": "ann@example.com", "external_id": "ann"})
        customers = [Customer(made["id"], "ann"), Customer(None, "bob"), Customer(None, "eve")]
        self.book = Book(customers, sample(5, EVENTS, len(customers)))
        self.meter = self._sent("POST", "/v1/meters/", {
            "name": "Tokens", "filter": EVERYTHING, "aggregation": {"func": "count"},
        })["id"]  # fmt: skip
        self._sent("POST", f"/v1/customers/{made['id']}/credits", {"meter_id": self.meter, "units": 1})
        session = self._sent("POST", "/v1/customer-sessions/", {"customer_id": made["id"]})["token"]
        self._session = {"Authorization": f"Bearer {session}"}
        events = ",".join(self._event(number) for number in range(EVENTS))
        self._http.post("/v1/events/ingest", content=f'{{"events":[{events}]}}').raise_for_status()
        eventually(lambda: self.get("/v1/events/", limit=1)["pagination"]["total_count"] == EVENTS)

    def close(self) -> None:
        """End the connections."""
        self._http.close()

    def _event(self, number: int) -> str:
        event = self.book.events[number]
        who = self.book.customers[event.who]
        name = "customer_id" if who.id and number % 2 else "external_customer_id"
        return (
            f'{{"name":"{event.name}","{name}":"{who.id if name == "customer_id" else who.external_id}",'
            f'"timestamp":"{event.at.isoformat()}","metadata":{event.json}}}'
        )

    def _sent(self, method: str, path: str, body: object) -> Any:
        response = self._http.request(method, path, json=body)
        assert response.is_success, response.text
        return response.json()

    def define(self, question: Question) -> None:
        """Let the meter count what the question is about."""
        definition = {"filter": question.filter, "aggregation": question.aggregation}
        self._sent("PATCH", f"/v1/meters/{self.meter}", definition)

    def get(self, path: str, headers: dict[str, str] | None = None, **params: Any) -> Any:
        """The JSON of a GET, with fractions as decimals."""
        response = self._http.get(path, params=params, headers=headers)
        assert response.is_success, response.text
        return json.loads(response.content, parse_float=Decimal, parse_int=Decimal)

    def params(self, question: Question) -> dict[str, Any]:
        """The parameters of the usage route; a customer is named in either way."""
        return {"meter_id": self.meter, **question.params(self.book.customers, random.Random(3))}

    def by_command(self, question: Question) -> tuple[list[Row], list[Decimal], Decimal]:
        """What `meterstream usage` prints as JSON; it takes external ids alone, and no metadata."""
        line = ["usage", self.meter, "--output", "json", "--interval", question.interval]
        line += ["--timezone", question.timezone]
        line += ["--start", question.start.isoformat(), "--end", question.end.isoformat()]
        for key in question.group_by:
            line += ["--by", key]
        for place in question.customers or ():
            line += ["--customer", str(self.book.customers[place].external_id)]
        line += [] if question.top is None else ["--top", str(question.top)]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert not run(line, self._settings)
        answer = json.loads(printed.getvalue(), parse_float=Decimal, parse_int=Decimal)
        rows = [
            Row(tuple(one["group"].values()), datetime.fromisoformat(one["timestamp"]),
                datetime.fromisoformat(one["end"]), one["quantity"])
            for one in answer["quantities"]
        ]  # fmt: skip
        return rows, [one["quantity"] for one in answer["remainder"]], answer["total"]

    def by_portal(self, question: Question) -> tuple[list[Row], list[Decimal], Decimal]:
        """What the first customer sees."""
        asked = {"start": question.start.isoformat(), "end": question.end.isoformat()}
        path = "/v1/customer-portal/usage/history"
        answer = self.get(
            path, self._session, **asked, interval=question.interval, timezone=question.timezone, meter_id=self.meter
        )
        return rows_of(answer)

    def by_quantities(self, question: Question, points: list[datetime]) -> tuple[list[Decimal], Decimal]:
        """Polar's quantities of whole units, whose last point is the beginning of the last unit."""
        asked = self.params(question)
        params = {name: asked[name] for name in asked if name not in ("meter_id", "start", "end", "group_by", "top")}
        params |= {"start_timestamp": points[0].isoformat(), "end_timestamp": points[-1].isoformat()}
        answer = self.get(f"/v1/meters/{self.meter}/quantities", **params)
        return [Decimal(one["quantity"]) for one in answer["quantities"]], Decimal(answer["total"])

    def by_events(self, question: Question) -> tuple[int, Decimal]:
        """The events that lists show between ``since`` and ``until``, and what a property of theirs adds up to."""
        asked = self.params(question)
        shared = ("meter_id", "customer_id", "external_customer_id", "metadata")
        params = {name: asked[name] for name in asked if name.startswith(shared)}
        params |= {"since": asked["start"], "until": asked["end"], "limit": 100}
        items: list[Any] = []
        while True:
            page = self.get("/v1/events/", **params, page=len(items) // 100 + 1)
            items += page["items"]
            if len(items) >= page["pagination"]["total_count"]:
                break
        total = Decimal(0)
        for item in items:
            found = item["metadata"].get(question.aggregation.get("property"))
            total += found if isinstance(found, Decimal) else 0
        return len(items), total


@pytest.fixture(scope="module")
def surfaces(running: Installation) -> Iterator[Surfaces]:
    """Events that are sent once."""
    found = Surfaces(running)
    yield found
    found.close()


def whole(question: Question, book: Book) -> tuple[Question, list[datetime]] | None:
    """The question about whole units alone, and where each begins; None where the range has none in its middle."""
    spans = book.spans(question)[1:-1]
    if question.interval == "none" or question.timezone not in COMPARABLE or not spans:
        return None
    asked = question._replace(start=spans[0][0], end=spans[-1][1], group_by=[], top=None)
    is_shown = spans[-1][0] - spans[0][0] < timedelta(days=POLARS_DAYS[question.interval] - 1)
    return (asked, [start for start, _ in spans]) if is_shown else None


def agree(surfaces: Surfaces, question: Question) -> None:
    """Ask everywhere."""
    book = surfaces.book
    surfaces.define(question)
    book.check(question, *rows_of(surfaces.get("/v1/usage", **surfaces.params(question))))

    plain = question._replace(metadata={})
    book.check(plain, *surfaces.by_command(plain))

    own = question._replace(customers=[0], metadata={}, group_by=[], top=None)
    book.check(own, *surfaces.by_portal(own))

    listed = book.counted(question)
    count, total = surfaces.by_events(question)
    assert count == len(listed)
    if question.aggregation["func"] == "sum" and not any(abs(aggregate(question.aggregation, [one])) > 10**15
                                                         for one in listed):  # fmt: skip
        assert total == aggregate(question.aggregation, listed)

    aligned = whole(question, book)
    if aligned is not None:
        asked, points = aligned
        counted = book.counted(asked)
        expected = [aggregate(asked.aggregation, [one for one in counted if start <= one.at < end])
                    for start, end in book.spans(asked)]  # fmt: skip
        assert surfaces.by_quantities(asked, points) == (expected, aggregate(asked.aggregation, counted))


def test_one_question_has_one_answer(surfaces: Surfaces, pytestconfig: pytest.Config) -> None:
    """Whatever is counted, whosever it is, in every zone and over days of 23 and of 25 hours."""

    def check(question: Question) -> None:
        agree(surfaces, question)

    examples = EXAMPLES * (20 if pytestconfig.getoption("long") else 1)
    settings(max_examples=examples, deadline=None)(given(questions(len(surfaces.book.customers)))(check))()


@pytest.mark.parametrize("func", ["count", "sum", "avg", "min", "max", "unique"])
@pytest.mark.parametrize(("day", "hours"), [("2024-03-31T00:00:00+01:00", 23), ("2024-10-27T00:00:00+02:00", 25)])
def test_days_of_changing_clocks_agree_everywhere(surfaces: Surfaces, func: str, day: str, hours: int) -> None:
    """The day and its hours, for every way to count."""
    aggregation = {"func": "count"} if func == "count" else {"func": func, "property": "n"}
    start = datetime.fromisoformat(day)
    for interval in ("day", "hour"):
        question = Question(
            filter=EVERYTHING, aggregation=aggregation, start=start, end=start + timedelta(hours=hours),
            interval=interval, timezone="Europe/Berlin", customers=None, metadata={}, group_by=[], top=None,
        )  # fmt: skip
        assert len(surfaces.book.spans(question)) == (1 if interval == "day" else hours)
        agree(surfaces, question)
