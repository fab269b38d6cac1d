"""The pure reference gives Polar's answers, save where ``differences.py`` says why not."""

from datetime import timedelta
from decimal import Decimal

from meters import exact
from meters.aggregation import considers, evaluate, is_summable
from meters.catalogue.catalogue import Catalogue, Customer, CustomerCreated
from meters.event import check_event
from meters.filters import Clause, Filter, filter_json, matches, parse_filter
from meters.meter import Selection, quantities
from meters.timestamps import Interval, range_refusal
from tests.conformance.cases import (
    NOW,
    ORGANIZATION,
    Case,
    agree,
    cases,
    clause_of,
    facts_of,
    filled_in,
    instant,
    meter_of,
    named,
    same_number,
)
from tests.conformance.differences import DIFFERENCES


@named("filter")
def test_filters_match_what_polar_matches(case: Case) -> None:
    """A filter lets through exactly the events that Polar's SQL lets through."""
    stated = parse_filter(case["given"]["meter"]["filter"])
    if "error" in case["then"]:
        agree(case, not isinstance(stated, list), stated)
        return
    meter = meter_of(case)
    matched = [event["id"] for event in case["given"]["events"] if matches(meter.filter, facts_of(event))]
    agree(case, matched == case["then"]["matched"], matched)


@named("filter_validation")
def test_filters_are_taken_and_refused_as_polar_does(case: Case) -> None:
    """A clause is taken, and kept with the value that Polar keeps, or refused."""
    parsed = parse_filter({"conjunction": "and", "clauses": [clause_of(case)]})
    accepted = isinstance(parsed, Filter)
    agree(case, accepted is case["then"]["accepted"], parsed)
    if isinstance(parsed, Filter) and "stored_value" in case["then"]:
        kept = parsed.clauses[0]
        assert isinstance(kept, Clause)
        assert (type(kept.value), kept.value) == (type(case["then"]["stored_value"]), case["then"]["stored_value"])
        assert filter_json(parsed)["clauses"][0]["value"] == case["then"]["stored_value"]


@named("aggregation")
def test_aggregations_give_polars_value(case: Case) -> None:
    """The value over the filtered events, which events take part, and what may be added."""
    meter = meter_of(case)
    events = [facts_of(event) for event in case["given"]["events"]]
    match case["when"]["op"]:
        case "aggregate":
            value = evaluate(meter.aggregation, [event for event in events if matches(meter.filter, event)])
            agree(case, same_number(value, case["then"]["value"]), value)
        case "accepts_event":
            agree(case, considers(meter.aggregation, events[0]) is case["then"]["accepted"], events[0])
        case "is_summable":
            agree(case, is_summable(meter.aggregation) is case["then"]["summable"], meter.aggregation)


def catalogue_of(case: Case) -> Catalogue:
    """The customers of a case: those it states, and those its events name by id."""
    stated = {customer["id"]: customer.get("external_id") for customer in case["given"]["customers"]}
    implied = {event["customer"]: None for event in case["given"]["events"] if event["customer"]}
    return Catalogue(
        CustomerCreated(Customer(id=id, organization_id=ORGANIZATION, external_id=external_id, created_at=NOW))
        for id, external_id in (implied | stated).items()
    )


def selection_of(case: Case) -> Selection:
    """Whose usage the case asks for."""
    params = case["when"]["params"]
    ids, externals = params.get("customer_id"), params.get("external_customer_id")
    metadata = {key: [str(value) for value in values] for key, values in params.get("metadata", {}).items()}
    if ids is None and externals is None:
        return Selection(metadata=metadata)
    both = catalogue_of(case).names(ORGANIZATION, ids or (), externals or ())
    return Selection(
        customer_ids=frozenset(both.ids), external_customer_ids=frozenset(both.external_ids), metadata=metadata
    )


@named("quantities")
def test_quantities_are_polars(case: Case) -> None:
    """Every point, every quantity and the total."""
    params = case["when"]["params"]
    ours = quantities(
        meter_of(case),
        [facts_of(event) for event in case["given"]["events"]],
        start=instant(params["start_timestamp"]),
        end=instant(params["end_timestamp"]),
        interval=Interval(params["interval"]),
        timezone=params.get("timezone", "UTC"),
        selection=selection_of(case),
        per_customer=params.get("customer_aggregation_function"),
    )
    then = case["then"]
    assert all(same_number(q.quantity, n) for q, n in zip(ours.quantities, then["quantities"], strict=True)), ours
    points = [quantity.timestamp for quantity in ours.quantities]
    assert points == [instant(text) for text in then.get("timestamps", [])] or "timestamps" not in then
    agree(case, same_number(ours.total, then["total"]), ours)


@named("quantities_limits")
def test_ranges_are_refused_as_polar_does(case: Case) -> None:
    """A range that Polar refuses is refused, with a reason in words."""
    params = case["when"]["params"]
    start, end = instant(params["start_timestamp"]), instant(params["end_timestamp"])
    refusal = range_refusal(start, end, Interval(params["interval"]))
    agree(case, (refusal is not None) is (case["then"]["status"] == 422), refusal)


SYMBOLS = {
    "OWN_CUSTOMER": "992fae2a-2a17-4b7a-8d9e-e287cf90131b",
    "RANDOM_UUID": "992fae2a-2a17-4b7a-8d9e-e287cf90131c",
    "ORG": ORGANIZATION,
    "OWN_ORG": ORGANIZATION,
    "FOREIGN_ORG": "1db1e1a0-0000-4000-8000-000000000001",
    "NOW+1d": (NOW + timedelta(days=1)).isoformat(),
    "NOW-1d": (NOW - timedelta(days=1)).isoformat(),
}


@named("ingest")
def test_events_are_taken_and_refused_as_polar_does(case: Case) -> None:
    """What needs no catalogue to be refused is refused by the event's own rules, and nothing else is."""
    events = [filled_in(event, SYMBOLS) for event in case["when"]["params"]["events"]]
    checked = [check_event(exact.encode(event), now=NOW) for event in events]
    refused = any(isinstance(result, list) for result in checked)
    needs_catalogue = "error_types" in case["then"]
    agree(case, refused is (case["then"]["status"] == 422 and not needs_catalogue), checked)


def test_every_difference_names_a_case_and_a_reason() -> None:
    """No difference is declared for a case that does not exist, or without a word of why."""
    assert DIFFERENCES.keys() <= {case["id"] for case in cases()}
    assert all(len(reason) > 20 for reason in DIFFERENCES.values())


def test_the_tolerance_tells_small_differences_apart() -> None:
    """The tolerance is for the noise of Polar's doubles and nothing larger."""
    assert same_number(Decimal("0.3"), Decimal("0.30000000000000004"))
    assert not same_number(Decimal("1.00000001"), 1)
