"""An independent bookkeeper of usage: plain Python with ``Decimal`` and ``zoneinfo``, and none of the product's code.

``Sent`` is an event as it was sent, ``Question`` what is asked, and ``Book`` answers it. The calendar is found by
walking through a range in quarter hours and looking at the local clock. ``questions`` draws what is asked.
"""

import json
import operator
import random
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from hypothesis import strategies as st

Json = Any
Group = tuple[str | None, ...]
EXACT = Context(prec=200, rounding=ROUND_HALF_EVEN)
QUANTUM = Decimal("1e-12")
QUARTER = timedelta(minutes=15)
BEGINNING = datetime(2024, 1, 1, tzinfo=UTC)
DAYS = 800
NUMBERS = ["0", "1", "5", "5.0", "0.1", "-2.5", "1e2", "0.000000000001", "9007199254740993", "123456789012.3456789"]
NUMBERS += ["-99999999999999999999999999", "99999999999999999999999999.999999999999"]
VALUES = [*NUMBERS, '"5"', '"5.0"', '"free"', '"t"', "true", "false"]
NAMES = ["call", "embed"]
MODELS = ['"a"', '"b"', "5", "true"]
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe", "America/Santiago"]
ZONES += ["Africa/Cairo", "America/Scoresbysund"]
CHANGES = [
    datetime.fromisoformat(f"{hour}:00Z")
    for hour in ("2024-03-31T01", "2024-10-27T01", "2025-03-09T07", "2025-04-06T03")
]
LONGEST = {"hour": 3, "day": 40, "week": 120, "month": 400, "year": 700, "none": 800}  # days


class Sent(NamedTuple):
    """An event: when, what, of whom (an index of customers), and metadata as JSON texts by key."""

    at: datetime
    name: str
    who: int
    metadata: dict[str, str]

    @property
    def json(self) -> str:
        """The metadata as it is sent."""
        return "{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in self.metadata.items()) + "}"


class Customer(NamedTuple):
    """Somebody who uses: by an id of ours, by the application's own, or by both."""

    id: str | None
    external_id: str | None


class Question(NamedTuple):
    """What is asked. ``customers`` are indexes, None for everybody; ``metadata`` asks for texts by key."""

    filter: Json
    aggregation: Json
    start: datetime
    end: datetime
    interval: str
    timezone: str
    customers: list[int] | None
    metadata: dict[str, list[str]]
    group_by: list[str]
    top: int | None

    def params(self, customers: Sequence[Customer], names: random.Random) -> dict[str, Any]:
        """The query, in which each customer is named by one of the names that it has."""
        ids, externals = [], []
        for customer in () if self.customers is None else (customers[place] for place in self.customers):
            if customer.id and (customer.external_id is None or names.random() < 0.5):
                ids.append(customer.id)
            else:
                externals.append(customer.external_id)
        asked = {
            "start": self.start.isoformat(), "end": self.end.isoformat(), "interval": self.interval,
            "timezone": self.timezone, "customer_id": ids, "external_customer_id": externals,
            "group_by": self.group_by, "top": self.top,
            **{f"metadata[{key}]": texts for key, texts in self.metadata.items()},
        }  # fmt: skip
        return {name: value for name, value in asked.items() if value not in (None, [])}


class Row(NamedTuple):
    """One row of an answer."""

    group: Group
    start: datetime
    end: datetime
    value: Decimal


def sample(seed: int, count: int, customers: int) -> list[Sent]:
    """Events of two years, thickest where clocks change; some at exactly midnight or on the hour."""
    choose = random.Random(seed)
    found = []
    for _ in range(count):
        anywhere = BEGINNING + timedelta(seconds=choose.randrange(DAYS * 86_400))
        near = choose.choice(CHANGES) + timedelta(seconds=choose.randrange(-100_000, 100_000))
        at = choose.choice([anywhere, near, near.replace(minute=0, second=0), near.replace(hour=0, minute=0, second=0)])
        metadata = {"n": choose.choice(VALUES), "model": choose.choice(MODELS), "rare": choose.choice(VALUES)}
        for key in list(metadata):
            if choose.random() < 0.15:
                del metadata[key]
        found.append(Sent(at, choose.choice(NAMES), choose.randrange(customers), metadata))
    return found


# The meaning of filters and aggregations, by the type of what stands in the event.

class Number(NamedTuple):
    """A JSON number: its amount, of at most 12 decimals, and its text."""

    amount: Decimal
    text: str


def _value(event: Sent, key: str) -> str | bool | Number | None:
    if key not in event.metadata:
        return None
    token = event.metadata[key]
    if token in ("true", "false"):
        return token == "true"
    if token.startswith('"'):
        text: str = json.loads(token)
        return text
    amount = Decimal(token).quantize(QUANTUM, context=EXACT)
    plain = _plain(amount)
    return Number(amount, token if re.fullmatch(r"-?\d+", token) else plain if "." in plain else f"{plain}.0")


def _plain(amount: Decimal) -> str:
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _text(value: str | bool | Number | None) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.text if isinstance(value, Number) else value


def _asked_text(value: object) -> str:
    return ("t" if value else "f") if isinstance(value, bool) else str(value)


COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le,
}  # fmt: skip


def lets_through(filter: Json, event: Sent) -> bool:
    """Whether the event passes a filter, or one clause of it."""
    if "clauses" in filter:
        parts = [lets_through(part, event) for part in filter["clauses"]]
        return not parts or (all(parts) if filter["conjunction"] == "and" else any(parts))
    asked, sign = filter["value"], filter["operator"]
    found = event.name if filter["property"] == "name" else _value(event, filter["property"])
    if sign == "exists":
        return (found is not None) == asked
    if found is None:
        return False
    if sign in ("like", "not_like"):
        return (_asked_text(asked) in (_text(found) or "")) == (sign == "like")
    if sign == "in":
        return any(_compares(operator.eq, found, one) for one in asked)
    return _compares(COMPARE[sign], found, asked)


def _compares(compare: Callable[[Any, Any], bool], found: str | bool | Number, asked: object) -> bool:
    if isinstance(found, str):
        return compare(found, _asked_text(asked))
    if isinstance(found, bool):
        return isinstance(asked, bool) and compare(found, asked)
    return not isinstance(asked, str) and compare(found.amount, int(asked) if isinstance(asked, bool) else asked)


def aggregate(aggregation: Json, events: Sequence[Sent]) -> Decimal:
    """The value over events that a filter let through; 0 of none."""
    func, key = aggregation["func"], aggregation.get("property", "")
    if func == "count":
        return Decimal(len(events))
    values = [_value(event, key) for event in events]
    if func == "unique":
        return Decimal(len({(type(one), getattr(one, "amount", one)) for one in values if one is not None}))
    amounts = [one.amount for one in values if isinstance(one, Number)]
    if not amounts:
        return Decimal(0)
    if func in ("min", "max"):
        return min(amounts) if func == "min" else max(amounts)
    total = Decimal(0)
    for amount in amounts:
        total = EXACT.add(total, amount)
    return total if func == "sum" else EXACT.divide(total, len(amounts)).quantize(QUANTUM, context=EXACT)


def takes_part(aggregation: Json, event: Sent) -> bool:
    """Whether a numeric function has a number of the event to read."""
    is_numeric = aggregation["func"] not in ("count", "unique")
    return not is_numeric or isinstance(_value(event, aggregation["property"]), Number)


# The calendar.

def units(start: datetime, end: datetime, interval: str, timezone: str) -> Iterator[tuple[datetime, datetime]]:
    """The parts of a range that lie in different calendar units of the local clock."""
    if interval == "none":
        yield start, end
        return
    zone, begins = ZoneInfo(timezone), start
    tick = start.replace(minute=start.minute // 15 * 15, second=0, microsecond=0)
    here = _unit(tick, interval, zone)
    while (tick := tick + QUARTER) < end:
        there = _unit(tick, interval, zone)
        if there != here:
            yield begins, tick
            begins, here = tick, there
    yield begins, end


def _unit(instant: datetime, interval: str, zone: ZoneInfo) -> tuple[object, ...]:
    local = instant.astimezone(zone)
    if interval == "hour":
        return local.date(), local.hour, local.utcoffset()
    if interval == "day":
        return (local.date(),)
    if interval == "week":
        return tuple(local.isocalendar()[:2])
    return (local.year, local.month) if interval == "month" else (local.year,)


class Book:
    """All events and customers of one organization."""

    def __init__(self, customers: Sequence[Customer], events: Sequence[Sent]) -> None:
        self.customers, self.events = customers, events

    def counted(self, question: Question) -> list[Sent]:
        """The events that the answer is made of."""
        return [
            event for event in self.events
            if question.start <= event.at < question.end
            and (question.customers is None or event.who in question.customers)
            and all(_text(_value(event, key)) in texts for key, texts in question.metadata.items())
            and lets_through(question.filter, event)
            and takes_part(question.aggregation, event)
        ]  # fmt: skip

    def group(self, question: Question, event: Sent) -> Group:
        """The values of the question's keys."""
        who = self.customers[event.who]
        known = {"name": event.name, "customer_id": who.id, "external_customer_id": who.external_id}
        return tuple(
            known[key] if key in known else _text(_value(event, key.removeprefix("metadata.")))
            for key in question.group_by
        )

    def check(self, question: Question, rows: Sequence[Row], rest: Sequence[Decimal], total: Decimal) -> None:
        """Compare an answer. Groups whose values are the same double may be in any order."""
        counted = self.counted(question)
        assert total == aggregate(question.aggregation, counted)
        groups: dict[Group, list[Sent]] = {} if question.group_by else {(): []}
        for event in counted:
            groups.setdefault(self.group(question, event), []).append(event)
        shown = list(dict.fromkeys(row.group for row in rows))
        assert len(shown) == min(len(groups), question.top or len(groups))
        expected = [
            Row(group, start, end, self._of(question, groups[group], start, end))
            for group in shown for start, end in self.spans(question)
        ]  # fmt: skip
        assert list(rows) == expected
        others = [event for group, events in groups.items() if group not in shown for event in events]
        assert list(rest) == [
            self._of(question, others, start, end) for start, end in self.spans(question) if question.top is not None
        ]
        sizes = {group: float(aggregate(question.aggregation, events)) for group, events in groups.items()}
        hidden = [size for group, size in sizes.items() if group not in shown]
        order = [sizes[group] for group in shown]
        assert order == sorted(order, reverse=True)
        assert not hidden or order[-1] >= max(hidden)

    def spans(self, question: Question) -> list[tuple[datetime, datetime]]:
        """The rows of each group."""
        return list(units(question.start, question.end, question.interval, question.timezone))

    def _of(self, question: Question, events: Sequence[Sent], start: datetime, end: datetime) -> Decimal:
        return aggregate(question.aggregation, [event for event in events if start <= event.at < end])


def rows_of(answer: Json) -> tuple[list[Row], list[Decimal], Decimal]:
    """The rows, the remainder and the total of one meter, each of whose values has to be plain text."""
    for one in (*answer["rows"], *answer["remainder"], *answer["totals"]):
        assert re.fullmatch(r"-?\d+(\.\d*[1-9])?", one["value"]), one
    (total,) = answer["totals"]
    rows = [
        Row(tuple(row["group"].values()), _moment(row["start"]), _moment(row["end"]), Decimal(row["value"]))
        for row in answer["rows"]
    ]
    return rows, [Decimal(one["value"]) for one in answer["remainder"]], Decimal(total["value"])


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


# Questions.

scalars = st.sampled_from([5, 0, 1, -3, 100, "5", "free", "t", "a", True, False])
KEYS = ["n", "model", "rare", "absent", "name"]


@st.composite
def clauses(draw: st.DrawFn) -> Json:
    """A clause that can be made."""
    sign = draw(st.sampled_from([*COMPARE, "like", "not_like", "in", "exists"]))
    value: Any = scalars
    if sign in ("gt", "gte", "lt", "lte"):
        value = scalars.filter(lambda one: not isinstance(one, bool))
    elif sign == "in":
        value = st.lists(scalars, min_size=1, max_size=3)
    elif sign == "exists":
        value = st.booleans()
    key = draw(st.sampled_from(KEYS))
    if key == "name":
        return {"property": "name", "operator": draw(st.sampled_from(["eq", "ne", "like"])), "value": "call"}
    return {"property": key, "operator": sign, "value": draw(value)}


def _joined(parts: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries(
        {"conjunction": st.sampled_from(["and", "or"]), "clauses": st.lists(parts, max_size=3)}
    )


filters = _joined(st.recursive(clauses(), _joined, max_leaves=4))
aggregations = st.one_of(
    st.just({"func": "count"}),
    st.fixed_dictionaries({
        "func": st.sampled_from(["sum", "avg", "min", "max", "unique"]), "property": st.sampled_from(["n", "rare"]),
    }),
)  # fmt: skip


@st.composite
def questions(draw: st.DrawFn, customers: int, *, grouped: bool = True) -> Question:
    """Any question, whose range begins and ends anywhere, often where a clock changes or on a round hour."""
    interval = draw(st.sampled_from(list(LONGEST)))
    anywhere = st.integers(0, DAYS * 86_400).map(lambda second: BEGINNING + timedelta(seconds=second))
    near = st.builds(
        lambda change, hours: change + timedelta(hours=hours), st.sampled_from(CHANGES), st.integers(-60, 30)
    )
    start = draw(st.one_of(anywhere, near))
    longest = LONGEST[interval] * 86_400
    length = draw(st.one_of(st.integers(1, longest), st.integers(1, longest // 3600).map(lambda hours: hours * 3600)))
    keys = st.sampled_from(["name", "customer_id", "external_customer_id", "metadata.model", "metadata.rare"])
    group_by = draw(st.lists(keys, max_size=3, unique=True)) if grouped else []
    return Question(
        filter=draw(st.one_of(st.just({"conjunction": "and", "clauses": []}), filters)),
        aggregation=draw(aggregations), start=start, end=start + timedelta(seconds=length), interval=interval,
        timezone=draw(st.sampled_from(ZONES)),
        customers=draw(st.one_of(st.none(), st.lists(st.integers(0, customers - 1), min_size=1, unique=True))),
        metadata=draw(st.sampled_from([{}, {}, {"model": ["a", "5"]}, {"rare": ["5", "true", "100.0"]}])),
        group_by=group_by, top=draw(st.one_of(st.none(), st.integers(1, 4))) if group_by else None,
    )  # fmt: skip
