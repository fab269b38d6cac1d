"""The SQL of a meter and the reference in ``meters`` give one answer, to the last digit."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import duckdb
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlglot import exp

from aggregator.decode.columns import any_suspicious, awkward_numbers, pointer, suspicious
from aggregator.store.meter_sql import (
    Measured,
    Parameters,
    Stage,
    condition,
    considered,
    measures,
    passed_over,
    stated,
    statement,
    value,
)
from meters.aggregation import FUNCTIONS, Aggregation, Function, considers, evaluate, unique_token
from meters.event import Event
from meters.event_values import NAME, SOURCE, Facts, facts, lookup, path_of
from meters.filters import EVERYTHING, Clause, Filter, Operator, matches
from tests.support.random_events import (
    PATHS,
    aggregations,
    clauses,
    edge_metadata,
    filters,
    json_object,
    metadata_texts,
    texts,
)

INGESTED_AT = datetime(2026, 3, 1, tzinfo=UTC)
BATCH = """CREATE TABLE batch (
    place INTEGER, name VARCHAR, source VARCHAR, timestamp TIMESTAMP, metadata VARCHAR, awkward VARCHAR)"""

instants = st.integers(-(10**13), 10**16).map(lambda us: datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us))


class Sample:
    """One event, as the reference sees it and as a row of the batch."""

    def __init__(self, metadata: str, name: str = "chat", timestamp: datetime = INGESTED_AT) -> None:
        fields = msgspec.json.decode(metadata, type=dict[str, msgspec.Raw])
        self.facts: Facts = facts(Event(name=name, metadata=fields, timestamp=timestamp), INGESTED_AT)
        naive, text = timestamp.astimezone(UTC).replace(tzinfo=None), metadata.encode()
        awkward = awkward_numbers(fields) if any_suspicious(text) and suspicious(text) else None
        self.row = (name, "user", naive, metadata, awkward)


samples = st.lists(st.builds(Sample, metadata_texts(), texts, instants), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    """A database with an empty batch."""
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.execute(BATCH)
        yield connection


EDGES = [Sample(text, "chat" if place % 2 else "50%") for place, text in enumerate(edge_metadata())]


@pytest.fixture(scope="module")
def edges(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    """A database whose batch is one event for every number and text that an engine could take wrongly."""
    other = connection.cursor()
    other.execute("CREATE SCHEMA edges; USE edges;" + BATCH)
    load(other, EDGES)
    return other


def load(connection: duckdb.DuckDBPyConnection, events: list[Sample]) -> None:
    """Make these events the batch."""
    connection.execute("DELETE FROM batch")
    columns = zip(*((place, *event.row) for place, event in enumerate(events)), strict=True)
    connection.execute(f"INSERT INTO batch SELECT {', '.join(['UNNEST(?)'] * 6)}", [list(column) for column in columns])


def select(
    connection: duckdb.DuckDBPyConnection, filter: Filter, aggregation: Aggregation, *columns: exp.Expr
) -> list[tuple[Any, ...]]:
    """Rows of the events that the meter counts; without columns, of their measures."""
    stage, parameters = Stage(), Parameters()
    wanted = columns or measures(aggregation, value(aggregation, stage))
    query = exp.select(*wanted).where(condition(filter, stage, parameters), considered(aggregation, stage))
    query = query.from_(stage.select(exp.to_table("batch"), ["place"], parameters).subquery("stage"))
    return connection.execute(*statement(query, parameters)).fetchall()


def counted(connection: duckdb.DuckDBPyConnection, filter: Filter) -> list[int]:
    """Places of the events that the filter lets through, by DuckDB."""
    return sorted(place for (place,) in select(connection, filter, Aggregation("count"), exp.column("place")))


def expected(events: list[Sample], filter: Filter) -> list[int]:
    """The same by the reference."""
    return [place for place, event in enumerate(events) if matches(filter, event.facts)]


def agree(
    connection: duckdb.DuckDBPyConnection, events: list[Sample], filter: Filter, aggregation: Aggregation
) -> bool:
    """Whether DuckDB's measures of the batch make the reference's value."""
    (row,) = select(connection, filter, aggregation)
    taken = [e.facts for e in events if matches(filter, e.facts) and considers(aggregation, e.facts)]
    return Measured(*row).value(aggregation) == evaluate(aggregation, taken)


@settings(max_examples=150, deadline=None)
@given(clauses())
@example(Clause("tokens", Operator.EQ, Decimal("99999999999999999999999999.999999999999")))
@example(Clause("tokens", Operator.IN, [Decimal("-99999999999999999999999999"), 10**26]))
def test_a_clause_holds_for_the_same_values(edges: duckdb.DuckDBPyConnection, clause: Clause) -> None:
    """Of all the values that could be taken wrongly, DuckDB and the reference let the same ones through."""
    filter = Filter("and", [clause])
    assert counted(edges, filter) == expected(EDGES, filter)


@pytest.mark.parametrize("function", [function for function in FUNCTIONS if function != "count"])
@pytest.mark.parametrize("property", PATHS)
def test_an_aggregation_of_edges_is_exact(edges: duckdb.DuckDBPyConnection, function: Function, property: str) -> None:
    """Every function of every property has the reference's value over numbers at the edge of what can be held."""
    assert agree(edges, EDGES, EVERYTHING, Aggregation(function, property))


@settings(max_examples=120, deadline=None)
@given(samples, filters, aggregations)
def test_a_meter_counts_the_same(
    connection: duckdb.DuckDBPyConnection, events: list[Sample], filter: Filter, aggregation: Aggregation
) -> None:
    """Whatever the events and the meter: the same events pass, and they make the same value."""
    load(connection, events)
    assert counted(connection, filter) == expected(events, filter)
    assert agree(connection, events, filter, aggregation)


@settings(max_examples=120, deadline=None)
@given(samples, filters, aggregations)
def test_what_adds_nothing_is_the_same(
    connection: duckdb.DuckDBPyConnection, events: list[Sample], filter: Filter, aggregation: Aggregation
) -> None:
    """An event that passes the filter either takes part or is passed over, and states something or nothing."""
    load(connection, events)
    stage, parameters = Stage(), Parameters()
    query = exp.select("place", exp.not_(stated(aggregation, stage).is_(exp.null())))
    query = query.where(condition(filter, stage, parameters), passed_over(aggregation, stage))
    query = query.from_(stage.select(exp.to_table("batch"), ["place"], parameters).subquery("stage"))

    rows = connection.execute(*statement(query, parameters)).fetchall()

    assert sorted(rows) == [
        (place, states(aggregation, event.facts))
        for place, event in enumerate(events)
        if matches(filter, event.facts) and not adds(aggregation, event.facts)
    ]


def adds(aggregation: Aggregation, event: Facts) -> bool:
    """By the reference: whether the event changes the value."""
    if aggregation.func == "unique":
        return unique_token(lookup(event.metadata, aggregation.property or "")) is not None
    return considers(aggregation, event)


def states(aggregation: Aggregation, event: Facts) -> bool:
    """By the reference: whether the event has anything at the property; name and source always do."""
    property = aggregation.property or ""
    is_column = aggregation.func != "unique" and property in (NAME, SOURCE)
    return is_column or lookup(event.metadata, property) is not None


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8), texts.filter(bool))
def test_any_key_can_be_read(connection: duckdb.DuckDBPyConnection, key: str, text: str) -> None:
    """A metadata key of any characters, dots and quotes too, is reached by a property."""
    event = Sample(json_object({key: msgspec.json.encode(text).decode()}))
    filter = Filter("and", [Clause(path_of([key]), Operator.EQ, text)])
    load(connection, [event])
    assert counted(connection, filter) == expected([event], filter) == [0]


def test_no_awkward_number_is_passed_over() -> None:
    """Whoever looks at many texts as a whole, or at one, sees that there is something to look for."""
    found = [(text.encode(), msgspec.json.decode(text, type=dict[str, msgspec.Raw])) for text in edge_metadata()]
    awkward = [text for text, fields in found if awkward_numbers(fields) is not None]
    assert [text for text in awkward if not (any_suspicious(text) and suspicious(text))] == []


def test_a_pointer_keeps_slashes_and_tildes_apart() -> None:
    """Keys are escaped as RFC 6901 says, so that no key can be taken for a path."""
    assert pointer(["a/b", "~1", ""]) == "/a~1b/~01/"


def test_wide_and_deep_filters_are_taken(connection: duckdb.DuckDBPyConnection) -> None:
    """The largest filter that can be made is a query that DuckDB takes."""
    wide = Filter("or", [Clause("tokens", Operator.EQ, number) for number in range(1000)])
    deep: Filter = Filter("and", [Clause("tokens", Operator.EQ, 5)])
    for _ in range(19):
        deep = Filter("or", [deep, Clause("absent", Operator.EXISTS, True)])
    load(connection, [Sample('{"tokens":5}')])
    assert counted(connection, wide) == counted(connection, deep) == [0]
