"""A webhook as Polar's client 0.32 reads it: body, headers and secret as JSON on standard input."""

import json
import sys

from polar_sdk.webhooks import validate_event

given = json.load(sys.stdin)
event = validate_event(given["body"], given["headers"], given["secret"])
meter = event.data.active_meters[0]
paid = [subscription.product_id for subscription in event.data.active_subscriptions]
print(json.dumps([event.data.external_id, meter.credited_units, meter.balance, paid]))
