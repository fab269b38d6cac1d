"""No question and no body may cost much more than it is worth: what is too much is refused, and briefly."""

from typing import Any

import pytest

from aggregator.api.limits import IDENTIFIERS_MAX, METADATA_KEYS_MAX
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
