"""The conformance cases: what Polar does, case by case, restated independently of its code.

``polar-cases.json`` explains its own form. Numbers are decoded exactly, because 5 and 5.0 are different tokens and the
difference shows. A case in ``differences.py`` states what Polar does and this product, on purpose, does not.
"""

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meters import exact
from meters.aggregation import parse_aggregation
from meters.event import Event
from meters.event_values import Facts, facts
from meters.filters import Filter, parse_filter
from meters.meter import Meter
from meters.timestamps import parse_timestamp
from tests.conformance.differences import DIFFERENCES

TOLERANCE = Decimal("1e-9")  # relative; the file's own, since Polar's numbers are doubles
ORGANIZATION = "1db1e1a0-0000-4000-8000-000000000000"
NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)

Case = dict[str, Any]


def cases(*groups: str) -> list[Case]:
    """The cases of some groups (of all groups when none is named), in the order of the file."""
    document = exact.decode((Path(__file__).parent / "polar-cases.json").read_bytes())
    return [case for case in document["cases"] if not groups or case["group"] in groups]


def named(*groups: str) -> pytest.MarkDecorator:
    """Parametrize a test over the cases of some groups."""
    chosen = cases(*groups)
    return pytest.mark.parametrize("case", chosen, ids=[case["id"] for case in chosen])


def agree(case: Case, same: bool, ours: object) -> None:
    """The answer is Polar's if and only if no difference is declared."""
    declared = DIFFERENCES.get(case["id"])
    assert same is (declared is None), f"ours: {ours}; Polar's: {case['then']}; declared difference: {declared}"


def same_number(ours: Decimal, theirs: Decimal | int) -> bool:
    """Whether a number of ours is the double that Polar answers."""
    expected = Decimal(theirs)
    return abs(ours - expected) <= TOLERANCE * max(abs(expected), abs(ours))


def instant(text: str) -> datetime:
    """A timestamp of the file."""
    parsed = parse_timestamp(text)
    assert isinstance(parsed, datetime)
    return parsed


def clause_of(case: Case) -> dict[str, Any]:
    """The clause of a case of filter_validation; long texts are written as a repetition."""
    clause = dict(case["when"]["params"]["clause"])
    if repeat := clause.pop("value_repeat", None):
        clause["value"] = repeat["char"] * repeat["count"]
    return clause


def meter_of(case: Case) -> Meter:
    """The case's meter."""
    stated = case["given"]["meter"]
    filter, aggregation = parse_filter(stated["filter"]), parse_aggregation(stated["aggregation"], ())
    assert isinstance(filter, Filter), filter
    assert not isinstance(aggregation, list), aggregation
    return Meter(
        id="m1", organization_id=ORGANIZATION, name="m1", filter=filter, aggregation=aggregation, created_at=NOW
    )


def facts_of(event: Case) -> Facts:
    """An event of the file, through the tokens that its metadata would have on the wire."""
    sent = Event(
        name=event["name"],
        timestamp=instant(event["timestamp"]),
        metadata={key: msgspec.Raw(exact.encode(value)) for key, value in event["metadata"].items()},
        customer_id=event["customer"],
        external_customer_id=event.get("external_customer_id"),
    )
    return facts(sent, NOW, source=event["source"])


def filled_in(value: Any, symbols: dict[str, str]) -> Any:
    """A value of an ingest case as it would be sent: symbols replaced, long texts written out."""
    if isinstance(value, dict) and "repeat_char" in value:
        return value["repeat_char"] * value["count"]
    if isinstance(value, dict):
        return {key: filled_in(item, symbols) for key, item in value.items()}
    return symbols.get(value, value) if isinstance(value, str) else value
