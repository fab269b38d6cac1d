"""How a meter is made and changed."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from meters import exact
from meters.aggregation import Aggregation
from meters.filters import EVERYTHING
from meters.meter import Meter, new_meter, updated_meter

NOW, LATER = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
BODY = {
    "name": "Tokens",
    "filter": {"conjunction": "and", "clauses": []},
    "aggregation": {"func": "sum", "property": "metadata.tokens"},
}


def made(**fields: Any) -> Meter | list[Any]:
    """What comes of a request with these fields; a field of ... is left out."""
    body = {key: value for key, value in (BODY | fields).items() if value is not ...}
    return new_meter(body, id="m", organization_id="o", created_at=NOW)


def changed(body: object, *, meter: Meter | None = None) -> Meter | list[Any]:
    """What comes of a change to the plain meter."""
    before = meter or made()
    assert isinstance(before, Meter)
    return updated_meter(before, body, modified_at=LATER)


def test_a_meter_has_what_was_asked_for_and_defaults() -> None:
    """The unit is scalar where none is named."""
    assert made() == Meter(
        id="m",
        organization_id="o",
        name="Tokens",
        filter=EVERYTHING,
        aggregation=Aggregation("sum", "tokens"),
        created_at=NOW,
        unit="scalar",
        metadata={},
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "abc"},
        {"name": "x" * 5000},
        {"unit": "token", "custom_multiplier": 1000},
        {"unit": "custom", "custom_label": "gigabyte", "custom_multiplier": 1},
        {"custom_label": None, "custom_multiplier": None},
        {"metadata": {str(key): key for key in range(50)}},
        {"metadata": {"k" * 40: "v" * 500, "n": 1, "f": Decimal("1.5"), "b": True}},
        {"unknown": 1},
    ],
)
def test_what_polar_takes_is_taken(fields: dict[str, Any]) -> None:
    """The limits themselves."""
    assert isinstance(made(**fields), Meter)


@pytest.mark.parametrize(
    "sent",
    [
        *("1000", "1000.0", "1e3", "1.5", "9223372036854775807", "99999999999999999999", "1e17", "1e20", "0", "-3.0"),
        *('"1000"', '"1000.00"', '" +1_000 "', '"007"', '"99999999999999999999"', '"0"', '"-3"', '"1_0.0"'),
        *('"1.5"', '"1e3"', '"1."', '".0"', '"+ 5"', '"1__0"', '"_1"', '"0x10"', '""', '"\\u0661"', "[]", "{}"),
        '"abc"',
        *('"' + "9" * 4300 + '"', '"' + "9" * 4301 + '"', '"' + " " * 4301 + '5"'),
    ],
)
def test_a_multiplier_is_read_as_polar_reads_it(sent: str) -> None:
    """In its lax way, which takes 1000.0 and "1000"; what it refuses is refused in its words."""
    ours = made(custom_multiplier=exact.decode(sent))
    try:
        theirs: Any = TypeAdapter(Annotated[int, Field(gt=0)]).validate_python(json.loads(sent))
    except ValidationError as error:
        (refused,) = error.errors()
        assert isinstance(ours, list)
        assert [(one["type"], one["msg"]) for one in ours] == [(refused["type"], refused["msg"])]
    else:
        assert isinstance(ours, Meter)
        assert ours.custom_multiplier == theirs


@pytest.mark.parametrize(
    ("fields", "type", "place"),
    [
        ({"name": ...}, "missing", ("name",)),
        ({"filter": ...}, "missing", ("filter",)),
        ({"aggregation": ...}, "missing", ("aggregation",)),
        ({"name": "ab"}, "string_too_short", ("name",)),
        ({"name": None}, "string_type", ("name",)),
        ({"unit": "byte"}, "enum", ("unit",)),
        ({"unit": ["token"]}, "enum", ("unit",)),
        ({"unit": "custom"}, "value_error", ()),
        ({"unit": "custom", "custom_label": None}, "value_error", ()),
        ({"unit": "token", "custom_label": "x"}, "value_error", ()),
        ({"custom_label": 5}, "string_type", ("custom_label",)),
        ({"custom_multiplier": 0}, "greater_than", ("custom_multiplier",)),
        ({"custom_multiplier": True}, "int_type", ("custom_multiplier",)),
        ({"custom_multiplier": Decimal("1.5")}, "int_from_float", ("custom_multiplier",)),
        ({"custom_multiplier": Decimal("1e400000000")}, "int_parsing_size", ("custom_multiplier",)),
        ({"metadata": []}, "dict_type", ("metadata",)),
        ({"metadata": {str(key): key for key in range(51)}}, "too_long", ("metadata",)),
        ({"metadata": {str(key): key for key in range(100_000)}}, "too_long", ("metadata",)),
        ({"metadata": {"": 1}}, "string_too_short", ("metadata", "", "[key]")),
        ({"metadata": {"k" * 41: 1}}, "string_too_long", ("metadata", "k" * 41, "[key]")),
        ({"metadata": {"k": ""}}, "string_too_short", ("metadata", "k")),
        ({"metadata": {"k": "x" * 501}}, "string_too_long", ("metadata", "k")),
        ({"metadata": {"k": None}}, "string_type", ("metadata", "k")),
        ({"filter": {"conjunction": "and"}}, "missing", ("filter", "clauses")),
        ({"aggregation": {}}, "union_tag_not_found", ("aggregation",)),
    ],
)
def test_what_is_no_meter_is_refused_at_its_place(fields: dict[str, Any], type: str, place: tuple[str, ...]) -> None:
    """One mistake, one complaint."""
    complaints = made(**fields)
    assert isinstance(complaints, list)
    assert [(c["type"], tuple(c["loc"])) for c in complaints] == [(type, ("body", *place))]


@pytest.mark.parametrize("body", [None, [], "x", 5])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    """When it is made and when it is changed."""
    for outcome in (new_meter(body, id="m", organization_id="o", created_at=NOW), changed(body)):
        assert isinstance(outcome, list)
        assert outcome[0]["loc"] == ["body"]


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
        ({"name": "Renamed"}, "name", "Renamed"),
        ({"unit": "custom"}, "unit", "custom"),  # without a label, as with Polar
        ({"custom_label": "x"}, "custom_label", "x"),
        ({"metadata": {"k": 1}}, "metadata", {"k": 1}),
        ({"aggregation": {"func": "count"}}, "aggregation", Aggregation("count")),
        ({"is_archived": True}, "archived_at", LATER),
        ({"is_archived": False}, "archived_at", None),
        ({"name": None, "filter": None, "unit": None, "is_archived": None}, "name", "Tokens"),
        ({}, "modified_at", LATER),
    ],
)
def test_a_change_changes_what_it_names(body: dict[str, Any], field: str, value: Any) -> None:
    """And nothing else."""
    meter = changed(body)
    assert isinstance(meter, Meter)
    assert getattr(meter, field) == value
    assert meter.created_at == NOW


def test_archiving_twice_keeps_the_first_time() -> None:
    """And taking it out of the archive forgets it."""
    archived = changed({"is_archived": True})
    assert isinstance(archived, Meter)
    again = updated_meter(archived, {"is_archived": True}, modified_at=datetime(2027, 1, 1, tzinfo=UTC))
    assert isinstance(again, Meter)
    assert again.archived_at == LATER
    restored = changed({"is_archived": False}, meter=archived)
    assert isinstance(restored, Meter)
    assert restored.archived_at is None


def test_a_label_can_be_cleared() -> None:
    """By null, which leaves other fields as they are."""
    labelled = made(unit="custom", custom_label="gigabyte", custom_multiplier=1000)
    assert isinstance(labelled, Meter)
    cleared = changed({"custom_label": None, "custom_multiplier": None, "name": None}, meter=labelled)
    assert isinstance(cleared, Meter)
    assert (cleared.custom_label, cleared.custom_multiplier, cleared.name) == (None, None, "Tokens")


def test_is_archived_is_a_boolean() -> None:
    """Not the text of one."""
    complaints = changed({"is_archived": "true"})
    assert isinstance(complaints, list)
    assert complaints[0]["type"] == "bool_type"
