"""A request's lines become one record for each partition, and each customer has one partition."""

import json
from datetime import UTC, datetime

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from ingest.admission.partitioner import Spread
from ingest.admission.validate import Admitted, Plain
from meters.catalogue.catalogue import Catalogue, Customer, CustomerCreated
from meters.log import partition_key, partition_of

ORGANIZATION = "6f8b1f9e-0f4e-4b8e-9a53-3f6f4f1d2c10"
NAMED = "0e1d7f2a-6f63-4c6c-8a53-111111111111"  # a customer with an external id
NAMELESS = "0e1d7f2a-6f63-4c6c-8a53-222222222222"
NAME = "ada"


def catalogue() -> Catalogue:
    """Two customers, one of which has an external id."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    customers = [
        Customer(id=id, organization_id=ORGANIZATION, external_id=name, email="a@b.c", name=None, metadata={},
                 created_at=now)
        for id, name in ((NAMED, NAME), (NAMELESS, None))
    ]  # fmt: skip
    return Catalogue([CustomerCreated(customer) for customer in customers])


def admitted(events: list[dict[str, str]], *, parsed: bool = False) -> Admitted:
    """The events as admission hands them on."""
    lines = [json.dumps(event).encode() for event in events]
    found = Admitted(lines, ["x"] * len(lines), range(len(lines)), False, [])
    plains = [msgspec.convert({"name": "n"} | event, Plain) for event in events]
    return msgspec.structs.replace(found, plains=plains) if parsed else found


def customer_of(event: dict[str, str]) -> str:
    """The customer's part of the key, by the rule."""
    named = {NAMED: NAME, NAMED.upper(): NAME, NAMELESS: NAMELESS}
    return event.get("external_customer_id") or named[event["customer_id"]]


EVENTS = st.lists(
    st.one_of(
        st.text("abcé", max_size=3).filter(bool).map(lambda name: {"external_customer_id": name}),
        st.sampled_from([NAMED, NAMED.upper(), NAMELESS]).map(lambda id: {"customer_id": id}),
        st.just({"external_customer_id": NAME, "customer_id": NAMELESS}),
    ),
    min_size=1, max_size=30,
)  # fmt: skip


@given(st.lists(EVENTS, min_size=1, max_size=3), st.integers(1, 13), st.booleans())
def test_every_line_goes_to_its_customers_partition(
    requests: list[list[dict[str, str]]], partitions: int, parsed: bool
) -> None:
    """Each line is in one record, that of the partition of its customer's key, in the order of the request."""
    spread, known = Spread(), catalogue()
    for events in requests:
        entries = spread.entries(admitted(events, parsed=parsed), ORGANIZATION, known, partitions)
        found = {entry.partition: [json.loads(line) for line in entry.value.split(b"\n")] for entry in entries}

        expected: dict[int, list[dict[str, str]]] = {}
        for event in events:
            place = partition_of(partition_key(ORGANIZATION, customer_of(event)), partitions)
            expected.setdefault(place, []).append(event)
        assert found == expected
        assert len(entries) == len(found)
        assert all(entry.admitted and entry.organization_id == ORGANIZATION for entry in entries)


def test_more_partitions_than_before_are_used() -> None:
    """What is remembered of a customer is forgotten when the number of partitions changes."""
    spread, known = Spread(), catalogue()
    one = admitted([{"external_customer_id": NAME}])
    for partitions in (12, 7, 12):
        [entry] = spread.entries(one, ORGANIZATION, known, partitions)
        assert entry.partition == partition_of(partition_key(ORGANIZATION, NAME), partitions)


def test_a_field_that_does_not_count_may_be_anything() -> None:
    """Admission passes over the field that another one overrules, and over all but the last of a repeated key."""
    lines = [
        b'{"name":"n","external_customer_id":"ada","customer_id":123}',
        b'{"name":"n","external_customer_id":1,"external_customer_id":"ada"}',
        b'{"name":"n","external_customer_id":"ada","customer_id":{"a":[1]}}',
        b'{"name":"n","external_customer_id":"%s"}' % (b"x" * 10_000),
    ]
    found = Admitted(lines, ["x"] * len(lines), range(len(lines)), False, [])
    entries = Spread().entries(found, ORGANIZATION, catalogue(), 12)
    place = partition_of(partition_key(ORGANIZATION, NAME), 12)

    assert sorted(line for entry in entries for line in entry.value.split(b"\n")) == sorted(lines)
    assert [entry.partition for entry in entries if lines[0] in entry.value] == [place]
