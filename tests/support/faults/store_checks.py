"""What every fault test compares: a log that has one of everything, an independent count of it, an export of a store.

The log is written with one record a round in mind: customers and tenants that appear, repetitions, contradictions,
broken lines, children before their parents, meters made before, with and after the events they count, a dead letter
that is settled. The count reads the log with the careful reader of ``meters`` and nothing of the aggregator.
"""

import asyncio
import contextlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from aggregator.engine.supervisor import Aggregator
from aggregator.store.meter_sql import Measured
from aggregator.view import Unavailable
from meters.aggregation import considers, evaluate
from meters.catalogue.catalogue import Change, DeadLetterReplayed, Names
from meters.event import Event, check_line
from meters.event_values import Facts, facts
from meters.filters import matches
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log, Record, TryAgain, lines_of
from meters.meter import Meter
from tests.support.records import (
    NOW,
    ORGANIZATION,
    OTHER_ORGANIZATION,
    created,
    decisions,
    entry,
    line,
    meter,
    organization,
)
from tests.support.waiting import eventually

SEED = int(os.environ.get("SEED", "20261121"))  # printed by every test that draws; SEED=n repeats it
METERS = {"sum": "tokens", "count": None, "max": "tokens", "avg": "tokens"}  # function, property
CUSTOMERS = ("ann", "bob", "eve")
Tables = dict[str, list[tuple[Any, ...]]]


def metered() -> list[Meter]:
    """The meters of the test organization."""
    return [
        meter(f"meter-{func}", func=func, **({"property": property} if property else {}))
        for func, property in METERS.items()
    ]


def usage(id: str, customer: str = "ann", tokens: object = 1, **fields: Any) -> bytes:
    """An event with an amount."""
    return line(id, external_customer_id=customer, metadata=f'{{"tokens":{tokens}}}', **fields)


def write_sample(log: Log) -> None:
    """A small log with one of everything: fifteen records of events, eight decisions."""
    sum_, count, max_, avg = metered()
    repeated = usage("a", tokens=5)
    events = [
        entry(repeated, usage("b", "bob", 7), usage("leaf", tokens="0.000000000001", parent_id="child")),
        entry(repeated, usage("b", "bob", 8), b"{broken", usage("child", "eve", 2, parent_id="root"), admitted=False),
        entry(usage("other", tokens=1000), organization_id=OTHER_ORGANIZATION),
        entry(usage("root", tokens=11), usage("c", "bob", "99999999999999.5")),
        entry(b"\xff\xfe", b"[]", admitted=False),
        entry(usage("mended", "eve", 13), usage("a", tokens=6), repeated),
        entry(line(external_customer_id="eve", metadata={"tokens": 1}), usage("d", "eve", -3), admitted=False),
        *(entry(usage(f"late-{number}", tokens=number)) for number in range(8)),
    ]
    settled = DeadLetterReplayed(0, 1, 2, NOW)
    changes: list[Change] = [
        organization(), *created(sum_, count), organization(OTHER_ORGANIZATION), *created(max_), settled, *created(avg),
    ]
    asyncio.run(log.append(USAGE_CONTROL, decisions(changes)))
    for each in events:
        asyncio.run(log.append(USAGE_EVENTS, [each]))


def write_usage(log: Log, records: int, seed: int, *, lines: int = 20, decide: bool = True) -> None:
    """A longer log: random usage with a tenth of repetitions, a few contradictions and broken lines."""
    choose = random.Random(seed)
    if decide:
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization(), *created(*metered())])))
    sent: list[bytes] = [usage("first")]
    for record in range(records):
        written = []
        for number in range(lines):
            die = choose.random()
            if die < 0.1:
                written.append(choose.choice(sent))
            elif die < 0.12:
                written.append(b"{broken")
            elif die < 0.14:
                written.append(usage("first", tokens=choose.randrange(2, 1000)))
            else:
                parent = {"parent_id": f"{seed}-{record}-{number - 1}"} if number and die < 0.3 else {}
                id, tokens = f"{seed}-{record}-{number}", f"{choose.randrange(10**6)}.{choose.randrange(10**12):012d}"
                written.append(usage(id, choose.choice(CUSTOMERS), tokens, **parent))
                sent.append(written[-1])
        asyncio.run(log.append(USAGE_EVENTS, [entry(*written, admitted=choose.random() < 0.5)]))


class Ends(NamedTuple):
    """Where a log ends, and so where a view has everything."""

    events: dict[int, int]
    control: int


class Counted(NamedTuple):
    """What a log says, counted line by line."""

    stored: dict[tuple[str, str], Facts]
    places: set[tuple[int, int, int]]  # of the stored
    dead: set[tuple[int, int, int]]  # contradictions among them
    tallies: dict[str, int]


def every(log: Log, since: Mapping[int, int] | None = None) -> Iterator[Record]:
    """Every record, or from these positions on. One question may be answered in part: brokers take their time."""
    ends = ends_of(log)
    position = dict.fromkeys(ends, 0) | dict(since or {})
    while any(position[partition] < end for partition, end in ends.items()):
        found = log.read(USAGE_EVENTS, position, bytes_max=1 << 40, wait_s=5.0)
        if not found:
            return  # nothing but the marks of transactions
        for record in found:
            position[record.partition] = record.offset + 1
            yield record


def ends_of(log: Log) -> dict[int, int]:
    """Where the events end, once the log says so: a broker that has just come back may not lead yet."""
    def asked() -> dict[int, int]:
        with contextlib.suppress(TryAgain):
            return log.ends(USAGE_EVENTS)
        return {}

    found: dict[int, int] = eventually(asked)
    return found


def count(log: Log, until: Mapping[int, int] | None = None, gone: Sequence[Record] = ()) -> Counted:
    """Read the log, one line at a time: first write wins, the same bytes again repeat it, others contradict.

    ``until`` are the positions to stop at, by partition; None reads all. ``gone`` are records that the log had at its
    beginning and has no more, counted as if it had them; whatever else is missing there was never read by anybody.
    """
    counted = Counted({}, set(), set(), dict.fromkeys(("stored", "duplicates", "conflicts", "dead"), 0))
    first: dict[tuple[str, str], bytes] = {}
    for record in chain(gone, every(log, log.starts(USAGE_EVENTS) if gone else None)):
        if until is not None and record.offset >= until.get(record.partition, 0):
            continue
        for number, raw in enumerate(lines_of(record.value)):
            if not raw.strip():  # a line without anything is none
                continue
            place = record.partition, record.offset, number
            ingested = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=record.timestamp_us)
            event = check_line(raw, organization_id=record.organization_id, now=ingested)
            if b"\n" in raw or not isinstance(event, Event):  # more lines than a record may have are one that is none
                counted.dead.add(place)
                counted.tallies["dead"] += 1
                continue
            id = event.external_id or "{}:{}:{}".format(*place)
            key = record.organization_id or event.organization_id or "", id
            if key not in first:
                first[key] = raw
                counted.stored[key] = facts(event, ingested)
                counted.places.add(place)
                counted.tallies["stored"] += 1
            elif first[key] == raw:
                counted.tallies["duplicates"] += 1
            else:
                counted.dead.add(place)
                counted.tallies["conflicts"] += 1
    return counted


def export(store: Path | duckdb.DuckDBPyConnection) -> Tables:
    """Every row of every table that is derived from the log, in order. The writer's epoch and the like are not."""
    connection = duckdb.connect(str(store)) if isinstance(store, Path) else store
    try:
        names = [row[0] for row in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()]
        kept = sorted({*names, "tallies"} - {"about", "streams"}) if names else []
        return {name: connection.execute(f"SELECT * FROM {name} ORDER BY ALL").fetchall() for name in kept}
    finally:
        if isinstance(store, Path):
            connection.close()


def positions(tables: Tables, stream: str = USAGE_EVENTS) -> dict[int, int]:
    """Where an exported store is."""
    return {row[1]: row[2] for row in tables.get("positions", []) if row[0] == stream}


def assert_store_tells(tables: Tables, counted: Counted) -> None:
    """I1 to I3: every line counted is a stored event, a repetition, or a dead letter, once; numbers have no gaps."""
    places = [(row[1], row[2], row[3]) for row in tables["events"]]
    assert sorted(counted.places) == sorted(places)
    identities = [(row[4], row[5]) for row in tables["events"]]
    assert len(set(identities)) == len(identities)
    assert [row[0] for row in tables["events"]] == list(range(len(places)))
    assert sorted(counted.dead) == sorted((row[1], row[2], row[3]) for row in tables["dead_letters"])
    assert [row[0] for row in tables["dead_letters"]] == list(range(len(counted.dead)))
    assert [row[0] for row in tables["control"]] == list(range(positions(tables, USAGE_CONTROL).get(0, 0)))
    tallies = [row[1:] for row in tables["tallies"]]
    for column, counted_lines in enumerate(counted.tallies.values()):
        assert sum(row[column] for row in tallies) == counted_lines


def ends(log: Log) -> Ends:
    """Where both streams end."""
    return Ends(log.ends(USAGE_EVENTS), log.ends(USAGE_CONTROL)[0])


def caught_up(aggregator: Aggregator, ends: Ends) -> bool:
    """Whether the view has everything that is in the log, and the history of every meter is counted."""
    try:
        engine = aggregator._now
        complete = all(meter.complete.is_set() for meter in list(engine.totals._meters.values()))
        return complete and ends == Ends(dict(aggregator.as_of), engine.control_position)
    except Unavailable:
        return False


def assert_totals_agree(aggregator: Aggregator, counted: Counted) -> None:
    """I4: the running totals are the reference's evaluation over the counted lines, to the last digit."""
    events = [event for (tenant, _), event in counted.stored.items() if tenant == ORGANIZATION]
    for made in metered():
        for customer in CUSTOMERS:
            total = aggregator.totals.total(made, aggregator.directory.find(ORGANIZATION, Names((), (customer,))))
            assert total is not None
            measured = Measured(total.count, total.sum, None, total.min, total.max)
            taken = [event for event in events if event.external_customer_id == customer]
            taken = [event for event in taken if matches(made.filter, event) and considers(made.aggregation, event)]

            assert evaluate(made.aggregation, taken) == measured.value(made.aggregation)
