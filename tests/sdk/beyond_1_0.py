"""What polar-sdk 1.0 reads where a meter's filter is beyond Polar's: URL and ``{kind: [token, meter id]}`` as JSON."""

import json
import sys
from collections.abc import Callable
from typing import Any

from polar.base import PolarDeserializationError
from polar.v2026_10 import Polar

NEW_YEAR = "2026-01-01T00:00:00Z"
PATIENCE_S = 60  # the client's own five seconds are few on a busy machine


def outcome(ask: Callable[[], Any]) -> str:
    """Whether the client makes something of an answer."""
    try:
        ask()
    except PolarDeserializationError:
        return "fails"
    return "read"


def seen(polar: Polar, meter: str) -> dict[str, str]:
    """Each way to see the meter, and what comes of it."""
    days = {"start_timestamp": NEW_YEAR, "end_timestamp": NEW_YEAR, "interval": "day"}
    return {
        "meters.list": outcome(polar.meters.list),
        "meters.get": outcome(lambda: polar.meters.get(meter)),
        "meters.update": outcome(lambda: polar.meters.update(meter, name="other")),
        "customer_meters.list": outcome(polar.customer_meters.list),
        "customers.get_state_external": outcome(lambda: polar.customers.get_state_external("ann")),
        "events.list": outcome(lambda: polar.events.list(meter_id=meter)),
        "meters.quantities": outcome(lambda: polar.meters.quantities(meter, **days)),
    }


url, tenants = json.load(sys.stdin)
report = {}
for kind, (token, meter) in tenants.items():
    with Polar(token, base_url=url, timeout=PATIENCE_S) as polar:
        report[kind] = seen(polar, meter)
print(json.dumps(report))
