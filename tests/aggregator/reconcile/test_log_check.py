"""The log against the store: whatever is planted is found and named, and nothing else."""

import asyncio
import contextlib
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aggregator.decode.dedup import PART_BYTES
from aggregator.reconcile import log_check
from aggregator.reconcile.lines import StoppedStore
from aggregator.reconcile.log_check import LogCheck, Range
from aggregator.reconcile.report import Cause, Worth
from deploy.server.control import Control
from ingest.log import open_log
from meters.errors import LINES_MAX
from meters.event import event_id, identity
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log
from tests.support.faults.store_checks import usage, write_usage
from tests.support.records import ORGANIZATION, decisions, entry, line, organization
from tests.support.servers.stopped_installation import Left

ROOT = "(SELECT seq FROM events WHERE external_id = 'root' LIMIT 1)"


def test_an_untouched_store_is_equal(left: Left) -> None:
    """Every line is accounted for, and every checksum agrees."""
    report = left.report()

    assert report.differences == []
    assert report.is_equal
    log = report.checks[0]
    assert sum(bucket.lines for bucket in log.buckets) == 25
    assert [bucket.log_checksum for bucket in log.buckets] == [bucket.store_checksum for bucket in log.buckets]
    assert len(log.buckets) > 1


@pytest.mark.parametrize("at_once", [log_check.WAITING_MAX, 10])
def test_a_long_log_with_everything_in_it_is_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Repetitions, contradictions, broken lines and awkward numbers in bulk are no differences, in any portions."""
    monkeypatch.setattr(log_check, "WAITING_MAX", at_once)
    monkeypatch.setattr(log_check, "STRETCH_BYTES", 1_000 * at_once)
    left = Left(tmp_path)
    with left.log() as log:
        write_usage(log, records=60, seed=3, lines=50)
        cost = r'{"_cost":{"amount":"1\u00652","currency":"usd"}}'
        asyncio.run(log.append(USAGE_EVENTS, [entry(line("escaped", metadata=cost))]))
    left.count()

    assert left.report().differences == []


def test_a_removed_row_is_lost(left: Left) -> None:
    """A row that is missing is named by its event, with what it was worth."""
    left.spoil(f"DELETE FROM events WHERE seq = {ROOT}")

    (difference,) = left.check("log").differences

    assert difference.cause is Cause.LOST
    assert event_id(*identity(ORGANIZATION, "root")) in difference.where
    assert difference.quantities == {"meter meter-sum": Decimal(-11), "meter meter-count": Decimal(-1)}


def test_a_doubled_row_is_doubled(left: Left) -> None:
    """A row that stands there twice is named once, by both checks."""
    left.spoil(f"INSERT INTO events SELECT * FROM events WHERE seq = {ROOT}")

    report = left.report()

    assert {difference.cause for difference in report.differences} == {Cause.DOUBLED}
    in_log, *in_store = report.differences
    assert "root" in in_log.where
    assert in_log.quantities["meter meter-sum"] == 11
    assert any(event_id(*identity(ORGANIZATION, "root")) in difference.where for difference in in_store)


def test_a_changed_quantity_is_changed(left: Left) -> None:
    """A quantity that was altered is named with both values and the difference."""
    left.spoil(f"UPDATE events SET metadata = '{{\"tokens\":12}}' WHERE seq = {ROOT}")

    (difference,) = left.check("log").differences

    assert difference.cause is Cause.CHANGED
    assert "metadata.tokens: the log says 11, the store has 12" in difference.what
    assert difference.quantities == {"meter meter-sum": Decimal(1)}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("name", "'other'"), ("timestamp", "timestamp + INTERVAL 1 MICROSECOND"), ("subject", "1 - subject"),
        ("external_id", "'elsewhere'"), ("content", "content + 1"), ("parent", "'b'"),
        ("awkward", "'{\"/tokens\":\"1\"}'"), ("id_lo", "id_lo - 1"),
        ("ingested_at", "ingested_at + INTERVAL 1 MICROSECOND"), ("source", "'system'"), ("external_member_id", "'m'"),
    ],
)  # fmt: skip
def test_every_column_is_compared(left: Left, column: str, value: str) -> None:
    """Whatever is changed about a row shows."""
    left.spoil(f"UPDATE events SET {column} = {value} WHERE seq = {ROOT}")

    assert Cause.CHANGED in {difference.cause for difference in left.check("log").differences}


def test_a_missing_hour_is_one_difference(left: Left) -> None:
    """What is lost within an hour is told as that hour."""
    (hour,) = [b for b in left.check("log").buckets if b.stored and b.hour.hour == 11]
    left.spoil("DELETE FROM events WHERE date_trunc('hour', ingested_at) = '2026-03-01 11:00'")

    (difference,) = left.check("log").differences

    assert difference.cause is Cause.LOST
    assert difference.count == hour.stored
    assert difference.window is not None
    assert difference.window[0] == hour.hour
    assert len(difference.events) == hour.stored


def test_a_missing_dead_letter_is_lost(left: Left) -> None:
    """A line that cannot be counted and is not on record either is a difference; so is a contradiction."""
    left.spoil("DELETE FROM dead_letters WHERE number IN (0, 2)")

    causes = [difference.cause for difference in left.check("log").differences]

    assert sorted(causes) == [Cause.CONFLICT, Cause.LOST]


def test_every_part_of_a_large_dead_letter_is_compared(tmp_path: Path) -> None:
    """What the store keeps in parts is the line, from the first to the last of them."""
    left = Left(tmp_path)
    with left.log() as log:
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
        asyncio.run(log.append(USAGE_EVENTS, [entry(b"{broken " + b"x" * 5 * PART_BYTES, b"{small", admitted=False)]))
    left.count()
    assert left.report().differences == []

    left.spoil("DELETE FROM dead_rests WHERE part = 4")

    (difference,) = left.check("log").differences
    assert difference.cause is Cause.CHANGED
    assert "the dead letter has other bytes than the line" in difference.what


def test_a_record_of_too_many_lines_is_one_dead_letter_to_both_sides(tmp_path: Path) -> None:
    """Also where a careful reading would find an event in it; and where nobody has it, it is one line that is lost."""
    left = Left(tmp_path)
    with left.log() as log:
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
        for value in (usage("a"), b"x\n" * LINES_MAX, b"\n" * LINES_MAX + usage("b"), b"\n" * LINES_MAX, usage("c")):
            asyncio.run(log.append(USAGE_EVENTS, [entry(value, admitted=False)]))
    left.count()
    report = left.report()
    assert report.differences == []
    assert sum(bucket.lines for bucket in report.checks[0].buckets) == 4

    left.spoil("DELETE FROM dead_letters")

    (difference,) = left.check("log").differences
    assert (difference.cause, difference.count) == (Cause.LOST, 2)


def test_a_missing_event_is_lost_once_however_often_it_came(tmp_path: Path) -> None:
    """Its repetitions are not lost as well."""
    left = Left(tmp_path)
    with left.log() as log:
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
        asyncio.run(log.append(USAGE_EVENTS, [entry(usage("a"), usage("b")), entry(usage("a"), usage("a"))]))
    left.count()
    left.spoil("DELETE FROM events WHERE external_id = 'a'")

    (difference,) = left.check("log").differences

    assert (difference.cause, difference.count) == (Cause.LOST, 1)


def test_a_repetition_in_other_words_is_one_whatever_numbers_it_has(tmp_path: Path) -> None:
    """Also where a key that no meter reads holds more digits than Python reads as a number."""
    usage = '"vendor":"v","model":"m","input_tokens":1,"output_tokens":2,"total_tokens":3'
    said = line("a", metadata=f'{{"_llm":{{{usage},"unknown":{"9" * 5_000}}},"zero":-0}}')
    left = Left(tmp_path)
    with left.log() as log:
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
        asyncio.run(log.append(USAGE_EVENTS, [entry(said, said.replace(b'"name": ', b'"name":'))]))
    left.count()

    check = left.check("log")

    assert check.differences == []
    assert sum(bucket.duplicates for bucket in check.buckets) == 1


@pytest.mark.parametrize(("first", "second"), [("1.0", '"1.0"'), ("0", "-0"), ("1.0", "1.00"), ("1", "1.0")])
def test_numbers_that_were_sent_otherwise_are_a_contradiction(tmp_path: Path, first: str, second: str) -> None:
    """To both sides: whoever takes away the dead letter that the store made of it is found out."""
    left = Left(tmp_path)
    with left.log() as log:
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
        said = [line("a", metadata=f'{{"n":{number}}}') for number in (first, second)]
        asyncio.run(log.append(USAGE_EVENTS, [entry(*said)]))
    left.count()
    assert left.check("log").differences == []

    left.spoil("DELETE FROM dead_letters")

    (difference,) = left.check("log").differences
    assert difference.cause is Cause.CONFLICT


def test_a_row_that_no_line_says_is_unfounded(left: Left) -> None:
    """A row without a line behind it is called so."""
    left.spoil(f"INSERT INTO events SELECT * REPLACE (900 AS line, 5 AS id_hi) FROM events WHERE seq = {ROOT}")

    (difference,) = left.check("log").differences

    assert difference.cause is Cause.UNFOUNDED


def test_a_store_that_is_behind_is_not_different(left: Left) -> None:
    """What was not read yet is a note, not a difference."""
    with left.log() as log:
        write_usage(log, records=2, seed=1, decide=False)

    check = left.check("log")

    assert check.differences == []
    assert check.notes == ["partition 0: 2 records are not in the store yet"]


class Trimmed:
    """A log from which its retention takes records once somebody has asked where it begins."""

    def __init__(self, log: Log, until: datetime) -> None:
        self._log, self._until = log, until

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def starts(self, stream: str) -> dict[int, int]:
        """As it was before."""
        before = self._log.starts(stream)
        self._log.trim(stream, int(self._until.timestamp() * 1_000_000))
        return before


def test_what_retention_takes_away_meanwhile_is_no_damage(left: Left) -> None:
    """The comparison goes on where the log begins now and says what it left out; what differs there is found."""
    left.spoil("DELETE FROM events WHERE date_trunc('hour', ingested_at) = '2026-03-01 11:00'")
    with left.log() as log, contextlib.closing(StoppedStore(left.data.store)) as store:
        trimmed: Any = Trimmed(log, datetime(2026, 3, 1, 11, tzinfo=UTC))
        check = LogCheck(trimmed, store, Worth(Control(log).catalogue), Range()).run()

    assert [(one.cause, one.window and one.window[0].hour) for one in check.differences] == [(Cause.LOST, 11)]
    (note,) = check.notes
    assert note.startswith("partition 0: offsets 0 to ")
    assert note.endswith(" left the log while it was read, and are not compared")


def test_a_range_of_time_is_compared_alone(left: Left) -> None:
    """Only records of the range take part, on both sides; its end belongs to the next."""
    left.spoil("DELETE FROM events WHERE date_trunc('hour', ingested_at) = '2026-03-01 11:00'")
    hours = [datetime(2026, 3, 1, hour, tzinfo=UTC) for hour in (10, 11, 12)]

    before, during = (left.between(*hours[start : start + 2]) for start in (0, 1))

    assert before.differences == []
    assert {bucket.hour for bucket in before.buckets} == {hours[0]}
    assert [difference.cause for difference in during.differences] == [Cause.LOST]


def test_partitions_are_compared_one_by_one(tmp_path: Path) -> None:
    """An event that is repeated in another partition is stored once; a row that is lost is named with its partition."""
    left = Left(tmp_path)
    partitions = {USAGE_EVENTS: 2, USAGE_CONTROL: 1}
    with contextlib.closing(open_log(str(tmp_path), partitions=partitions)) as log:
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
        for partition, ids in ((0, "ab"), (1, "bc")):
            written = entry(*(usage(id) for id in ids))
            asyncio.run(log.append(USAGE_EVENTS, [msgspec.structs.replace(written, partition=partition)]))
    left.count()
    assert left.report().differences == []

    left.spoil("DELETE FROM events WHERE external_id = 'c'")

    (difference,) = left.check("log").differences
    assert (difference.cause, difference.count) == (Cause.LOST, 1)
    assert {bucket.partition: bucket.lines for bucket in left.check("log").buckets} == {0: 2, 1: 2}


def test_other_words_for_the_same_are_no_difference(tmp_path: Path) -> None:
    """Offsets, seconds since 1970, upper case ids, keys given twice, exponents: all of it agrees, checksums too."""
    id = "4F0E6D0C-52A3-4B7E-9D55-0D6C1E3F7A21"
    bodies = [
        '{"name":"a","external_customer_id":"x","external_id":"1","timestamp":"2026-03-01T10:00:00+02:00"}',
        '{"name":"a","external_customer_id":"x","external_id":"2","timestamp":1767225600}',
        '{"name":"a","external_customer_id":"x","external_id":"3","timestamp":"20260301T100000Z"}',
        f'{{"name":"a","customer_id":"{id}","external_id":"4"}}',
        '{"name":"a","external_customer_id":"x","external_id":null,"external_id":"5"}',
        '{"name":"a","external_customer_id":"x","external_id":"6","metadata":{"n":1e2,"m":0.30000000000000004}}',
        '{"name":"\\u00e9","external_customer_id":"x","external_id":"7","metadata":{ "k" : "\\/" , "n" : 1.50 }}',
        '{"name":"a","external_customer_id":"x"}',
    ]
    left = Left(tmp_path)
    with left.log() as log:
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
        asyncio.run(log.append(USAGE_EVENTS, [entry(*(body.encode() for body in bodies), admitted=False)]))
    left.count()

    check = left.check("log")

    assert check.differences == []
    (bucket,) = check.buckets
    assert bucket.log_checksum == bucket.store_checksum
    assert bucket.stored + bucket.dead == len(bodies)
