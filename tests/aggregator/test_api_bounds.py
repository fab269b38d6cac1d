"""No question and no body may cost much more than it is worth: what is too much is refused, and briefly."""

import json
from typing import Any

import pytest

from aggregator.api.limits import ECHO_LENGTH_MAX, IDENTIFIERS_MAX, METADATA_KEYS_MAX
from meters.detail import COMPLAINTS_MAX
from tests.aggregator.serving import Tenant

DAY = {"start_timestamp": "2026-02-01T00:00:00Z", "end_timestamp": "2026-02-02T00:00:00Z", "interval": "day"}


def keys(count: int) -> dict[str, Any]:
    """So many different keys of metadata, a value each."""
    return {f"metadata[k{number}]": "v" for number in range(count)}


@pytest.mark.parametrize("path", ["/v1/events/", "/v1/meters/", "/v1/customers/", "/v1/benefits/", "quantities"])
def test_a_question_names_few_keys_of_metadata(tenant: Tenant, path: str) -> None:
    """Fifty are planned and read; one more is refused at once, and a thousand values of one key are still taken."""
    asked: dict[str, Any] = {}
    if path == "quantities":
        path, asked = f"/v1/meters/{tenant.meter()}/quantities", DAY
    refusal = tenant.refusal("GET", path, params=asked | keys(METADATA_KEYS_MAX + 1))
    assert refusal == (422, "RequestValidationError", [("too_long", ["query", "metadata"])])
    assert tenant.ask("GET", path, params=asked | keys(METADATA_KEYS_MAX)).status_code == 200
    values = {"metadata[k]": [str(number) for number in range(IDENTIFIERS_MAX)]}
    assert tenant.ask("GET", path, params=asked | values).status_code == 200


def filter_of(clauses: list[Any]) -> dict[str, Any]:
    """A filter of all of these."""
    return {"conjunction": "and", "clauses": clauses}


def unfinished_filter() -> dict[str, Any]:
    """Eighteen levels without their conjunction, around a long text."""
    found: dict[str, Any] = {"clauses": [{"property": "p", "operator": "eq", "value": "x" * 200_000}]}
    for _ in range(18):
        found = {"clauses": [found]}
    return found


METER: dict[str, Any] = {"name": "Tokens", "filter": filter_of([]), "aggregation": {"func": "count"}}
MISTAKES = [
    ("/v1/meters/", METER | {"filter": filter_of([filter_of([filter_of([{}] * 100)] * 100)] * 10)}),
    ("/v1/meters/preview", METER | {"filter": filter_of([filter_of([{}] * 100)] * 50)}),
    ("/v1/meters/preview", METER | {"filter": unfinished_filter()}),
    ("/v1/meters/", METER | {"metadata": {str(number): [] for number in range(100_000)}}),
    ("/v1/customers/", {"email": "a@b", "metadata": {str(number): [] for number in range(100_000)}}),
    ("/v1/customers/", {"name": "x" * 1_000_000}),
]


@pytest.mark.parametrize(("path", "body"), MISTAKES, ids=range(len(MISTAKES)))
def test_however_much_is_wrong_the_answer_is_short(tenant: Tenant, path: str, body: Any) -> None:
    """A hundred complaints at the most, and no long input among them: whoever sent it has it."""
    answer = tenant.ask("POST", path, content=json.dumps(body, separators=(",", ":")))
    assert answer.status_code == 422
    details = answer.json()["detail"]
    assert 1 <= len(details) <= COMPLAINTS_MAX
    assert max(len(str(entry["input"])) for entry in details) <= 4 * ECHO_LENGTH_MAX
    assert len(answer.content) < COMPLAINTS_MAX * ECHO_LENGTH_MAX
