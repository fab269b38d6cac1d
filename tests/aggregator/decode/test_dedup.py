"""Reading records and judging rows: what is new, what repeats, what contradicts, what cannot be counted."""

import json
from unittest.mock import patch
from uuid import uuid4

import msgspec
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.decode.decode import CHUNK_EVENTS, decode
from aggregator.decode.dedup import CONFLICT, Effects, Tally, join, judge, nothing, step
from aggregator.decode.directory import Directory
from aggregator.decode.identities import Seen
from meters.event import identity
from meters.log import LATEST_US
from tests.support.random_events import metadata_texts
from tests.support.records import NOW, ORGANIZATION, OTHER_ORGANIZATION, line, record


def decided(*records: object, seen: Seen | None = None) -> Effects:
    """What a round over these records would write into an empty store."""
    batch = decode(records, Directory())  # type: ignore[arg-type]
    if not batch.chunks:
        return nothing(batch)
    table, keys = join(batch)
    index = seen or Seen()
    found, content = index.find(keys.hi, keys.lo)
    return step(batch, judge(table, keys, found, content), pa.table({}))


def test_a_row_carries_what_the_line_says() -> None:
    """Name, ids, time, place and metadata arrive; the identity is the one the domain defines."""
    text = '{"tokens": 12, "big": 12345678901234567890.5}'
    sent = line("r1", name="chat", timestamp="2026-02-01T00:00:00Z", parent_id="p", metadata=text)
    (row,) = decided(record(sent, offset=7)).rows.to_pylist()

    assert (
        row["name"], row["external_id"], row["parent"], row["log_offset"], row["line"]
    ) == ("chat", "r1", "p", 7, 0)
    assert identity(ORGANIZATION, "r1") == (row["id_hi"], row["id_lo"])
    assert row["timestamp"].isoformat() == "2026-02-01T00:00:00"
    assert row["metadata"] == '{"tokens":12,"big":12345678901234567890.5}'
    assert row["awkward"] == '{"/big":"12345678901234567890.5"}'


@settings(max_examples=100, deadline=None)
@given(st.lists(metadata_texts(), min_size=1, max_size=5))
def test_distinct_keys_are_taken_as_they_stand(metadata: list[str]) -> None:
    """A record whose keys are known to be distinct gives the same rows without a look at each key."""
    compact = [msgspec.json.encode(msgspec.json.decode(text, type=dict[str, msgspec.Raw])) for text in metadata]
    sent = record(*(line(f"r{number}", metadata=text.decode()) for number, text in enumerate(compact)))
    plain = msgspec.structs.replace(sent, distinct_keys=True)

    assert decided(plain).rows.equals(decided(sent).rows)


@pytest.mark.parametrize("odd", ["5", "12345678901234567890", '"text"', "[1]", "null"])
def test_metadata_that_is_no_object_is_a_dead_letter(odd: str) -> None:
    """A producer may claim what only gateways know; its line is kept aside, and those around it count."""
    sent = record(line("a"), line("b", metadata=odd), line("c"))
    effects = decided(msgspec.structs.replace(sent, distinct_keys=True))

    assert [(letter["line"], letter["reason"]) for letter in effects.dead.to_pylist()] == [(1, "dict_type")]
    assert [row["external_id"] for row in effects.rows.to_pylist()] == ["a", "c"]


@pytest.mark.parametrize("amount", ["1é", "1111111111111111é", "1é1e5", "1e", "1-2e5", "1111111111111111.2.3"])
def test_a_number_that_is_none_is_kept_as_it_is(amount: str) -> None:
    """Of such a producer nobody has looked at it; it stalls nothing, and a meter of amounts passes it over."""
    sent = record(line("a", metadata=json.dumps({"_cost": {"amount": amount}}, ensure_ascii=False)))
    (row,) = decided(msgspec.structs.replace(sent, distinct_keys=True)).rows.to_pylist()

    assert json.loads(row["metadata"]) == {"_cost": {"amount": amount}}


def test_no_timestamp_means_the_time_of_ingestion() -> None:
    """The record's time is the default."""
    (row,) = decided(record(line("r1"))).rows.to_pylist()

    assert row["timestamp"] == row["ingested_at"]


@pytest.mark.parametrize("admitted", [True, False])
def test_an_organization_that_is_none_makes_dead_letters(admitted: bool) -> None:
    """Whatever a producer puts where the organization belongs, its lines are kept and the partition goes on."""
    effects = decided(
        record(line("a"), line("b"), organization_id="nobody", admitted=admitted),
        record(line("a"), offset=1, organization_id="", admitted=admitted),
        record(line("a"), offset=2, organization_id=ORGANIZATION.upper(), admitted=admitted),
    )

    assert [
        (letter["log_offset"], letter["line"], letter["reason"]) for letter in effects.dead.to_pylist()
    ] == [
        (0, 0, "organization_id"), (0, 1, "organization_id"), (1, 0, "organization_id")
    ]  # fmt: skip
    assert [(row["external_id"], row["log_offset"]) for row in effects.rows.to_pylist()] == [("a", 2)]


def test_each_tenants_rows_are_its_own() -> None:
    """However closely their records follow each other."""
    effects = decided(
        record(line("a")), record(line("a"), offset=1, organization_id=OTHER_ORGANIZATION), record(line("b"), offset=2)
    )

    assert [(row["id_hi"], row["id_lo"]) for row in effects.rows.to_pylist()] == [
        identity(ORGANIZATION, "a"), identity(OTHER_ORGANIZATION, "a"), identity(ORGANIZATION, "b")
    ]  # fmt: skip
    assert effects.rows.column("organization").to_pylist() == [0, 1, 0]


@pytest.mark.parametrize(("timestamp_us", "reasons"), [(LATEST_US - 1, []), (LATEST_US, ["record_time"])])
def test_a_record_from_no_calendar_is_a_dead_letter(timestamp_us: int, reasons: list[str]) -> None:
    """The latest time stands for all that a producer's wrong clock may say."""
    sent = msgspec.structs.replace(record(line("a")), timestamp_us=timestamp_us)

    assert reasons == decided(sent).dead["reason"].to_pylist()


def test_the_same_bytes_again_are_a_duplicate() -> None:
    """In one batch or in two, a repetition is counted and not stored."""
    effects = decided(record(line("a"), line("a")), record(line("a"), line("b"), offset=1))

    assert {0: Tally(stored=2, duplicates=2)} == effects.tallies


@pytest.mark.parametrize(
    ("again", "is_conflict"),
    [
        ({"metadata": '{"b": 2, "a": 1}'}, False),  # other order of keys
        ({"metadata": '{"a": 1, "b": 3}'}, True),  # other value
        ({"metadata": '{"a": 1.0, "b": 2}'}, True),  # another spelling of a number is another value to its sender
        ({"metadata": '{"a": 1, "b": 2}', "name": "other"}, True),
        ({"metadata": '{"a": 1, "b": 2}', "external_customer_id": "bob"}, True),
        ({"metadata": '{"a": 1, "b": 2}', "unknown": 1}, False),  # fields nobody reads
    ],
)
def test_other_content_under_the_same_id_is_a_conflict(again: dict[str, object], is_conflict: bool) -> None:
    """What differs in meaning is kept as a dead letter; what differs in bytes alone is a duplicate."""
    effects = decided(record(line("a", metadata='{"a": 1, "b": 2}'), line("a", **again)))

    assert {0: Tally(1, int(not is_conflict), int(is_conflict), 0)} == effects.tallies
    assert [CONFLICT] * is_conflict == effects.dead["reason"].to_pylist()


def test_another_id_that_meets_a_stored_one_is_a_conflict() -> None:
    """In all 128 bits, and with the same content: it is kept and told, not taken for a repetition."""
    with patch.object(xxhash, "xxh3_128_digest", return_value=bytes(16)):
        effects = decided(record(line("a"), line("b"), line("a")))

    assert {0: Tally(stored=1, duplicates=1, conflicts=1)} == effects.tallies
    assert [(letter["line"], letter["reason"]) for letter in effects.dead.to_pylist()] == [(1, CONFLICT)]


@pytest.mark.parametrize(("one", "other"), [("0.1", '"0.1"'), ("1", "true"), ("0", "false"), ("1", '"1"')])
def test_a_value_of_another_type_is_another_value(one: str, other: str) -> None:
    """Meters tell them apart."""
    effects = decided(record(line("a", metadata=f'{{"a": {one}}}'), line("a", metadata=f'{{"a": {other}}}')))

    assert {0: Tally(stored=1, conflicts=1)} == effects.tallies


@pytest.mark.parametrize("admitted", [True, False])
def test_a_member_is_one_of_its_kind_of_customer(admitted: bool) -> None:
    """Of the other kind it says nothing, whichever way a line is read."""
    customer, member = str(uuid4()), str(uuid4())
    effects = decided(record(
        line("a", member_id=member, external_member_id="m"),
        b'{"name":"call","customer_id":"%s","member_id":"%s","external_member_id":"m","external_id":"b"}'
        % (customer.encode(), member.encode()),
        admitted=admitted,
    ))  # fmt: skip

    members = [(row["member_id"], row["external_member_id"]) for row in effects.rows.to_pylist()]
    assert members == [(None, "m"), (member, None)]


def test_an_unknown_key_may_hold_any_number() -> None:
    """Nobody reads it, and no repetition of it stops anybody."""
    cost = '{"_cost": {"amount": 1, "currency": "usd", "x": %s}}' % ("9" * 5000)
    effects = decided(record(line("a", metadata=cost), line("a", metadata=cost.replace(": 1,", ":  1,"))))

    assert {0: Tally(stored=1, duplicates=1)} == effects.tallies


def test_a_line_that_cannot_be_counted_is_a_dead_letter_and_its_neighbours_count() -> None:
    """Bytes, place and reason are kept."""
    effects = decided(record(line("a"), b"{not json", line("b"), offset=3, admitted=False))

    assert {0: Tally(stored=2, dead=1)} == effects.tallies
    (letter,) = effects.dead.to_pylist()
    assert (
        letter["log_partition"], letter["log_offset"], letter["line"], letter["raw"], letter["ingested_at"]
    ) == (0, 3, 1, b"{not json", NOW.replace(tzinfo=None))
    assert letter["reason"] == "json_invalid"


def test_an_admitted_record_that_does_not_decode_goes_the_careful_way() -> None:
    """Seconds since 1970 are a legal time that the fast way does not read."""
    (row,) = decided(record(line("a", timestamp=1_700_000_000))).rows.to_pylist()

    assert row["timestamp"].isoformat() == "2023-11-14T22:13:20"


def test_a_line_without_an_id_is_known_by_its_place() -> None:
    """A producer that skips the gateway may leave the id out; reading the log again gives the same identity."""
    first, again = (decided(record(line(), line(), offset=5)).rows.to_pylist() for _ in range(2))

    assert [row["external_id"] for row in first] == ["0:5:0", "0:5:1"]
    assert [row["id_hi"] for row in first] == [row["id_hi"] for row in again]


def test_many_lines_make_several_chunks_in_the_order_of_the_log() -> None:
    """Chunking changes nothing."""
    lines = [line(str(number)) for number in range(CHUNK_EVENTS + 10)]
    records = [record(*lines[first : first + 100], offset=first) for first in range(0, len(lines), 100)]
    rows = decided(*records).rows

    assert [str(number) for number in range(CHUNK_EVENTS + 10)] == rows.column("external_id").to_pylist()
