"""Webhook endpoints with polar-sdk 1.0: URL, token and the token of another organization as JSON.

The other organization has an endpoint that is told of what Polar does not have. Prints what the client made of it all.
"""

import dataclasses
import json
import sys
from typing import Any

import story
from polar.base import PolarDeserializationError
from polar.v2026_10 import Polar

PATIENCE_S = 60  # the client's own five seconds are few on a busy machine
plain = dataclasses.asdict


def made(polar: Polar, url: str) -> str:
    """The id of a new endpoint at this address."""
    return polar.webhooks.create_webhook_endpoint(url=url, format="raw", events=["customer.state_changed"]).id


def deliveries(polar: Polar, id: str) -> Any:
    """What was sent to an endpoint."""
    return polar.webhooks.list_webhook_deliveries(endpoint_id=id).items


def managed(polar: Polar, url: str) -> dict[str, Any]:
    """One endpoint through its whole life."""
    webhooks = polar.webhooks
    new = webhooks.create_webhook_endpoint(url=url, format="raw", events=["customer.state_changed"], name="ours")
    got, listed = webhooks.get_webhook_endpoint(new.id), webhooks.list_webhook_endpoints().items
    changed = webhooks.update_webhook_endpoint(new.id, name="theirs", enabled=False)
    rotated = webhooks.reset_webhook_endpoint_secret(new.id)
    webhooks.delete_webhook_endpoint(new.id)
    return {
        "made": story.shown(plain(new), *story.ENDPOINT),
        "secrets": [new.secret != story.MASKED, rotated.secret not in (new.secret, story.MASKED)],
        "found": [plain(one) == plain(new) | {"secret": story.MASKED} for one in (got, *listed)],
        "changed": [changed.name, changed.enabled, changed.secret],
        "left": len(webhooks.list_webhook_endpoints().items),
        "signatures": [new.api_version, new.uses_standard_webhook_signature],
    }


def delivered(polar: Polar, answering: str, silent: str) -> dict[str, Any]:
    """A customer is told of to two endpoints: one refuses, one is not there."""
    ids = [made(polar, answering), made(polar, silent)]
    polar.customers.create(**story.CUSTOMER)
    story.eventually(lambda: all(deliveries(polar, id) for id in ids))
    refused, lost = (deliveries(polar, id)[-1] for id in ids)
    polar.webhooks.redeliver_webhook_event(refused.webhook_event.id)
    return {
        "refused": [refused.succeeded, refused.http_code, refused.response],
        "lost": [lost.succeeded, lost.http_code, lost.response],
        "event": story.told_shown(plain(refused.webhook_event)),
    }


def beyond(polar: Polar) -> str:
    """What becomes of a list with a type of ours."""
    try:
        polar.webhooks.list_webhook_endpoints()
    except PolarDeserializationError:
        return "fails"
    return "read"


server, own, other = json.load(sys.stdin)
patience = {"base_url": server, "timeout": PATIENCE_S}
with Polar(own, **patience) as here, Polar(other, **patience) as there:
    report = {
        "managed": managed(here, f"{server}/v1/meters/"),
        "delivered": delivered(here, f"{server}/v1/meters/", story.NOWHERE),
        "beyond": beyond(there),
    }
print(json.dumps(report))
