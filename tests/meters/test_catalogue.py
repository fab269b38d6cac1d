"""Decisions, their lines, and what they add up to."""

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from msgspec.structs import replace

from meters import exact
from meters.aggregation import Aggregation
from meters.catalogue.access import reference_refusals
from meters.catalogue.catalogue import (
    Catalogue,
    Change,
    Customer,
    CustomerCreated,
    CustomerDeleted,
    CustomerUpdated,
    DeadLetterReplayed,
    MeterCreated,
    MeterUpdated,
    Names,
    Organization,
    OrganizationCreated,
    Token,
    TokenCreated,
    TokenRevoked,
    decode_change,
    decode_changes,
    encode_change,
    encode_changes,
    meter_from_json,
    meter_json,
)
from meters.event import Event
from meters.filters import Clause, Filter, Operator
from meters.meter import Meter

NOW, LATER = datetime(2026, 1, 1, 0, 0, 0, 123_456, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
ORGANIZATION = Organization("o1", "Acme", NOW)
TOKEN = Token(id="t1", organization_id="o1", name="ingest", sha256="ab", scopes=["events:write"], created_at=NOW)
CUSTOMER = Customer(id="c1", organization_id="o1", external_id="u", metadata={"n": Decimal("0.10")}, created_at=NOW)
METER = Meter(
    id="m1",
    organization_id="o1",
    name="Tokens",
    filter=Filter("or", [Clause("k", Operator.IN, [Decimal("0.1"), "x", True]), Filter("and", [])]),
    aggregation=Aggregation("sum", "tokens"),
    created_at=NOW,
    metadata={"n": Decimal("1.50"), "i": 1, "b": True},
)
PREFIXED = replace(
    METER, id="m2", filter=Filter("and", [Clause("metadata.name", Operator.EQ, "x")]),
    aggregation=Aggregation("sum", "metadata.tokens"),
)  # fmt: skip
CHANGES: list[Change] = [
    OrganizationCreated(ORGANIZATION),
    TokenCreated(TOKEN),
    CustomerCreated(CUSTOMER),
    CustomerUpdated(replace(CUSTOMER, external_id="v", modified_at=LATER)),
    MeterCreated(METER),
    MeterUpdated(replace(METER, name="Renamed", aggregation=Aggregation("count"), modified_at=LATER)),
    MeterCreated(PREFIXED),
    MeterUpdated(replace(PREFIXED, aggregation=Aggregation("sum", "metadata.metadata.tokens"))),
    TokenRevoked("t1", LATER),
    CustomerDeleted("c1", LATER),
    DeadLetterReplayed(0, 7, 3, LATER),
]


def state(catalogue: Catalogue) -> tuple[object, ...]:
    """Everything that can be read of a catalogue."""
    return (
        catalogue.organizations,
        catalogue.tokens,
        catalogue.customers,
        catalogue.meters,
        [catalogue.meters_of(id) for id in catalogue.organizations],
        [catalogue.customer_by_external_id("o1", name) for name in ("u", "v")],
    )


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: type(change).__name__)
def test_a_change_survives_its_line(change: Change) -> None:
    """One line, and the same change to the last digit when it is read."""
    line = encode_change(change)
    assert b"\n" not in line
    again = decode_change(line)
    assert again == change
    assert encode_change(again) == line


def test_what_is_decided_together_is_read_line_by_line() -> None:
    """In its order; types that are not known, and the marker of a transaction, decide nothing."""
    value = encode_changes(CHANGES)
    assert value.split(b"\n") == list(map(encode_change, CHANGES))
    assert decode_changes(value) == list(CHANGES)
    assert decode_changes(encode_change(CHANGES[0])) == [CHANGES[0]]
    assert decode_changes(b'{"type":"moon.eclipsed"}\n' + encode_change(CHANGES[0])) == [CHANGES[0]]
    assert decode_changes(b"") == []


def test_changes_are_read_by_people_and_other_programs() -> None:
    """The form of a line is a promise: a control stream outlives the version that wrote it."""
    assert encode_change(TokenRevoked("t1", LATER)) == (
        b'{"type":"token.revoked","id":"t1","revoked_at":"2026-02-01T00:00:00Z"}'
    )
    assert exact.decode(encode_change(MeterCreated(METER)))["meter"]["filter"] == {
        "conjunction": "or",
        "clauses": [
            {"property": "k", "operator": "in", "value": [Decimal("0.1"), "x", True]},
            {"conjunction": "and", "clauses": []},
        ],
    }


def test_fields_and_types_of_a_newer_version_are_passed_over() -> None:
    """An old process survives a newer one's decisions; what is empty is the marker of a transaction."""
    assert decode_change(b"") is None
    assert decode_change(b'{"type":"moon.eclipsed","units":5}') is None
    line = b'{"type":"token.revoked","id":"t1","revoked_at":"2026-02-01T00:00:00Z","by":"someone"}'
    assert decode_change(line) == TokenRevoked("t1", LATER)


def test_a_customer_of_before_there_were_teams_is_an_individual() -> None:
    """Logs hold decisions without the field."""
    customer = b'{"id":"c","organization_id":"o","created_at":"2026-02-01T00:00:00Z"}'
    change = decode_change(b'{"type":"customer.created","customer":' + customer + b"}")
    assert isinstance(change, CustomerCreated)
    assert change.customer.type == "individual"


@pytest.mark.parametrize(
    "line",
    [b"[]", b"{}", b'{"type":5}', b'{"type":"token.revoked"}', b'{"type":"meter.created","meter":{}}', b"\xff"],
)
def test_a_damaged_line_is_not_passed_over(line: bytes) -> None:
    """The stream has one writer: what it cannot have written is damage, and said to be."""
    with pytest.raises(ValueError):  # noqa: PT011 - any of several kinds, all of them a ValueError
        decode_change(line)


@pytest.mark.parametrize("property", ["plan", "metadata.plan", "metadata.metadata.plan"])
def test_a_meter_survives_its_json(property: str) -> None:
    """Filter and all; a key that is called metadata itself stays in front of a path however often it is written."""
    filter = Filter("and", [Clause(property, Operator.EQ, 1)])
    meter = replace(METER, filter=filter, aggregation=Aggregation("sum", property))

    assert meter_from_json(exact.decode(exact.encode(meter_json(meter)))) == meter


def test_a_meter_of_an_older_log_counts_as_it_did() -> None:
    """There a key that is called metadata was written without what keeps it; every other meter's line is the same."""
    before = decode_change(exact.encode(MeterCreated(PREFIXED)))

    assert isinstance(before, MeterCreated)
    assert before.meter.aggregation == Aggregation("sum", "tokens")
    assert before.meter.filter == Filter("and", [Clause("name", Operator.EQ, "x")])
    assert encode_change(MeterCreated(METER)) == exact.encode(MeterCreated(METER))


def test_changes_applied_again_change_nothing() -> None:
    """Each one at once, and all of them from the middle of a repetition."""
    once = Catalogue(CHANGES)
    doubled = Catalogue(change for change in CHANGES for _ in range(2))
    resumed = Catalogue([*CHANGES, *CHANGES[3:]])
    assert state(once) == state(doubled) == state(resumed)


def test_a_customer_is_found_by_either_name_until_deleted() -> None:
    """A new external id comes beside the old one, which stays the customer's until another one has it."""
    catalogue = Catalogue(CHANGES[:3])
    assert catalogue.customer_by_external_id("o1", "u") == CUSTOMER == catalogue.customer("o1", "c1")
    assert catalogue.customer("o2", "c1") is None
    assert catalogue.customer_by_external_id("o2", "u") is None
    catalogue.apply(CHANGES[3])
    changed = catalogue.customer("o1", "c1")
    assert changed is not None
    assert catalogue.customer_by_external_id("o1", "u") == catalogue.customer_by_external_id("o1", "v") == changed
    assert catalogue.names_of(changed) == Names(("c1",), ("v", "u"))
    catalogue.apply(CustomerCreated(replace(CUSTOMER, id="c2")))
    assert catalogue.names_of(changed) == Names(("c1",), ("v",))
    catalogue.apply(CustomerDeleted("c2", LATER))
    catalogue.apply(CustomerDeleted("c1", LATER))
    assert catalogue.customer_by_external_id("o1", "u") is None
    assert catalogue.customer_by_external_id("o1", "v") is None
    assert catalogue.customer("o1", "c1") is None
    assert catalogue.customers["c1"].deleted_at == LATER


def test_customers_are_listed_in_the_order_of_their_creation_until_deleted() -> None:
    """Changed ones keep their place, and other organizations see none."""
    second = replace(CUSTOMER, id="c2", external_id=None)
    catalogue = Catalogue([CHANGES[2], CustomerCreated(second), CHANGES[3]])
    assert [customer.id for customer in catalogue.customers_of("o1")] == ["c1", "c2"]
    assert catalogue.customers_of("o1")[0] == catalogue.customer("o1", "c1")
    assert catalogue.customers_of("o2") == []
    catalogue.apply(CustomerDeleted("c1", LATER))
    assert catalogue.customers_of("o1") == [second]


def test_an_external_id_taken_over_stays_with_its_new_customer() -> None:
    """What happens later to the one who had it before does not take it away."""
    successor = replace(CUSTOMER, id="c2")
    catalogue = Catalogue([CHANGES[2], CustomerDeleted("c1", LATER), CustomerCreated(successor)])
    catalogue.apply(CustomerDeleted("c1", LATER))
    assert catalogue.customer_by_external_id("o1", "u") == successor


def test_names_draw_in_each_other() -> None:
    """An id brings its external id and the reverse; unknown names stay as they are."""
    catalogue = Catalogue(CHANGES[:3])
    both = Names(("c1",), ("u",))
    assert catalogue.names("o1", ["c1"], []) == catalogue.names("o1", [], ["u"]) == both
    assert catalogue.names("o1", ["x"], ["y"]) == Names(("x",), ("y",))
    assert catalogue.names("o2", ["c1"], []) == Names(("c1",), ())


def test_meters_are_listed_in_the_order_of_their_creation() -> None:
    """Changed ones keep their place, and other organizations see none."""
    second = replace(METER, id="m2")
    catalogue = Catalogue([MeterCreated(METER), MeterCreated(second), CHANGES[5]])
    assert [meter.id for meter in catalogue.meters_of("o1")] == ["m1", "m2"]
    assert catalogue.meters_of("o1")[0].name == "Renamed"
    assert catalogue.meters_of("o2") == []


@pytest.mark.parametrize(
    ("event", "token_organization_id", "types"),
    [
        (Event("a", external_customer_id="nobody knows"), "o1", []),
        (Event("a", customer_id="c1"), "o1", []),
        (Event("a", customer_id="c1", organization_id="o1"), None, []),
        (Event("a", external_customer_id="u", organization_id="o1"), "o1", ["organization_token"]),
        (Event("a", external_customer_id="u"), None, ["missing"]),
        (Event("a", external_customer_id="u", organization_id="o2"), None, ["organization_id"]),
        (Event("a", customer_id="c2"), "o1", ["customer_id"]),
        (Event("a", customer_id="c1"), "o2", ["customer_id"]),
        (Event("a", customer_id="c1", member_id="x"), "o1", ["member_id"]),
        (
            Event("a", customer_id="c2", member_id="x", organization_id="o1"),
            "o1",
            [
                "organization_token",
                "customer_id",
                "member_id",
            ],
        ),
    ],
)
def test_names_that_mean_nothing(event: Event, token_organization_id: str | None, types: list[str]) -> None:
    """Organization first, then customer, then member, each at its place."""
    refusals = reference_refusals(event, Catalogue(CHANGES[:3]), token_organization_id=token_organization_id, index=2)
    assert [refusal.type for refusal in refusals] == types
    assert all(refusal.loc[:3] == ["body", "events", 2] and len(refusal.loc) == 4 for refusal in refusals)
