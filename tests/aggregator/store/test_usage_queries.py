"""Quantities from the store and from the reference are the same numbers, in every zone and for every selection."""

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import duckdb
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.decode.columns import awkward_numbers
from aggregator.store import database
from aggregator.store.queries import usage
from aggregator.store.queries.scope import Scope
from meters.aggregation import FUNCTIONS, Aggregation, Function
from meters.event import Event
from meters.event_values import Facts, facts
from meters.filters import EVERYTHING, Clause, Filter, Operator
from meters.meter import Meter, Selection, quantities
from meters.timestamps import Interval, bucket, series, zone_names
from tests.support.random_events import NUMBERS

YEARS_START = datetime(2024, 1, 1, tzinfo=UTC)
WHO = [("external", "ann"), ("external", "bob"), ("customer", "c1"), ("customer", "c2")]  # ann is c1 under two names
PLANS = ['"free"', '"pro"', "5", "5.0", "true"]
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe", "Africa/Casablanca"]
ZONES += ["Pacific/Apia", "America/Scoresbysund", "Antarctica/Troll"]
WIDEST = {"hour": 7, "day": 60, "week": 200, "month": 400, "year": 800}


def sample() -> list[tuple[int, datetime, dict[str, msgspec.Raw]]]:
    """Events of four customers over two years, thickest where European and American clocks change."""
    choose = random.Random(7)
    changes = [datetime(2024, 3, 31, tzinfo=UTC), datetime(2024, 11, 3, tzinfo=UTC), datetime(2025, 1, 1, tzinfo=UTC)]
    events = []
    for _ in range(600):
        near = choose.choice(changes) + timedelta(seconds=choose.randrange(-200_000, 200_000))
        anywhere = YEARS_START + timedelta(seconds=choose.randrange(0, 730 * 86_400))
        instant = choose.choice([near, anywhere, near.replace(minute=0, second=0, microsecond=0)])
        text = f'{{"tokens":{choose.choice(NUMBERS)},"plan":{choose.choice(PLANS)},"a.b":"x"}}'
        fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        events.append((choose.randrange(len(WHO)), instant, fields))
    return events


EVENTS = sample()


def as_facts(subject: int, instant: datetime, metadata: dict[str, msgspec.Raw]) -> Facts:
    """The event as the reference reads it."""
    kind, text = WHO[subject]
    who = {"customer_id": text} if kind == "customer" else {"external_customer_id": text}
    return facts(Event(name="call", metadata=metadata, timestamp=instant, **who), instant)


@pytest.fixture(scope="module")
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    """A store with the sample in it."""
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.execute(database.TABLES)
        rows = [
            (subject, instant.replace(tzinfo=None), msgspec.json.encode(metadata).decode(), awkward_numbers(metadata))
            for subject, instant, metadata in EVENTS
        ]
        columns = [list(column) for column in zip(*rows, strict=True)]
        connection.execute(
            """INSERT INTO events (organization, name, source, subject, timestamp, metadata, awkward)
               SELECT 0, 'call', 'user', UNNEST(?), UNNEST(?), UNNEST(?), UNNEST(?)""",
            columns,
        )
        yield connection


meters = st.builds(
    Meter,
    id=st.just("m"),
    organization_id=st.just("o"),
    name=st.just("meter"),
    created_at=st.just(YEARS_START),
    filter=st.sampled_from([EVERYTHING, Filter("and", [Clause("plan", Operator.NE, "free")])]),
    aggregation=st.sampled_from(
        [Aggregation("count"), *(Aggregation(name, "tokens") for name in FUNCTIONS if name != "count")]
    ),
)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[datetime, datetime, Interval]:
    """A range that begins and ends anywhere, of few enough buckets."""
    interval = draw(st.sampled_from(Interval))
    start = YEARS_START + timedelta(minutes=draw(st.integers(0, 700 * 1440)))
    return start, start + timedelta(hours=draw(st.integers(0, WIDEST[interval] * 24))), interval


selections = st.builds(
    Selection,
    customer_ids=st.sampled_from([None, frozenset({"c1"}), frozenset({"c1", "nobody"})]),
    external_customer_ids=st.sampled_from([None, frozenset({"ann"}), frozenset({"ann", "bob"})]),
    metadata=st.sampled_from([{}, {"plan": ["5", "true"]}, {"plan": ["5.0"], "a.b": ["x"]}, {"a": ["x"]}]),
)


def subjects(selection: Selection) -> list[int] | None:
    """The customer numbers that a selection means."""
    if selection.customer_ids is None and selection.external_customer_ids is None:
        return None
    named = {("customer", text) for text in selection.customer_ids or ()}
    named |= {("external", text) for text in selection.external_customer_ids or ()}
    return [number for number, who in enumerate(WHO) if who in named]


@settings(max_examples=120, deadline=None)
@given(meters, ranges(), st.sampled_from(ZONES), selections, st.sampled_from([None, *FUNCTIONS]))
def test_quantities_are_those_of_the_reference(
    connection: duckdb.DuckDBPyConnection,
    meter: Meter,
    when: tuple[datetime, datetime, Interval],
    timezone: str,
    selection: Selection,
    per_customer: Function | None,
) -> None:
    """Whatever is asked, the store answers with the reference's points, quantities and total."""
    start, end, interval = when
    scope = Scope(organization=0, subjects=subjects(selection), metadata=selection.metadata)
    question = usage.Question(
        filter=meter.filter, aggregation=meter.aggregation, scope=scope, per_customer=per_customer
    )
    answer = usage.quantities(connection, question, start=start, end=end, interval=interval, timezone=timezone)
    assert answer == quantities(
        meter,
        [as_facts(*event) for event in EVENTS],
        start=start,
        end=end,
        interval=interval,
        timezone=timezone,
        selection=selection,
        per_customer=per_customer,
    )


def test_every_bucket_begins_on_a_quarter_hour() -> None:
    """Events find their bucket by their quarter hour, so no zone may have an hour that begins within one."""
    starts = [
        bucket(point, Interval.HOUR, timezone)[0]
        for timezone in zone_names()
        for point in series(YEARS_START, YEARS_START + timedelta(days=1400), Interval.MONTH, timezone)
    ]
    assert all(start.minute % 15 == start.second == start.microsecond == 0 for start in starts)


def test_the_value_over_everything_is_the_sum_of_its_parts(connection: duckdb.DuckDBPyConnection) -> None:
    """Asked for everything at once, the store says what the one bucket that holds everything says."""
    question = usage.Question(filter=EVERYTHING, aggregation=Aggregation("sum", "tokens"), scope=Scope(organization=0))
    whole = usage.value_of(connection, question)
    answer = usage.by_bucket(
        connection, question, [(datetime(2023, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC))]
    )
    assert whole.total == answer.total
