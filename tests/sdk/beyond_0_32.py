"""What polar-sdk 0.32 reads where a meter's filter is beyond Polar's: URL and ``{kind: [token, meter id]}`` as JSON."""

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from polar_sdk import Polar
from polar_sdk.models import ResponseValidationError

NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)


def outcome(ask: Callable[[], Any]) -> str:
    """Whether the client makes something of an answer."""
    try:
        ask()
    except ResponseValidationError:
        return "fails"
    return "read"


def seen(polar: Polar, meter: str) -> dict[str, str]:
    """Each way to see the meter, and what comes of it."""
    days = {"start_timestamp": NEW_YEAR, "end_timestamp": NEW_YEAR, "interval": "day"}
    return {
        "meters.list": outcome(polar.meters.list),
        "meters.get": outcome(lambda: polar.meters.get(id=meter)),
        "meters.update": outcome(lambda: polar.meters.update(id=meter, meter_update={"name": "other"})),
        "customer_meters.list": outcome(polar.customer_meters.list),
        "customers.get_state_external": outcome(lambda: polar.customers.get_state_external(external_id="ann")),
        "events.list": outcome(lambda: polar.events.list(meter_id=meter)),
        "meters.quantities": outcome(lambda: polar.meters.quantities(id=meter, **days)),
    }


url, tenants = json.load(sys.stdin)
report = {}
for kind, (token, meter) in tenants.items():
    with Polar(access_token=token, server_url=url) as polar:
        report[kind] = seen(polar, meter)
print(json.dumps(report))
