"""Webhook endpoints with polar-sdk 0.32: URL, token and the token of another organization as JSON.

The other organization has an endpoint that is told of what Polar does not have. Prints what the client made of it all.
"""

import json
import sys
from typing import Any

import story
from polar_sdk import Polar
from polar_sdk.models import ResponseValidationError


def plain(model: Any) -> Any:
    """A model of the client as JSON, with the names of the wire."""
    return model.model_dump(mode="json", by_alias=True)


def made(polar: Polar, url: str) -> str:
    """The id of a new endpoint at this address."""
    body = {"url": url, "format": "raw", "events": ["customer.state_changed"]}
    return polar.webhooks.create_webhook_endpoint(request=body).id


def deliveries(polar: Polar, id: str) -> Any:
    """What was sent to an endpoint."""
    return polar.webhooks.list_webhook_deliveries(endpoint_id=id).result.items


def managed(polar: Polar, url: str) -> dict[str, Any]:
    """One endpoint through its whole life."""
    webhooks = polar.webhooks
    new = webhooks.create_webhook_endpoint(
        request={"url": url, "format": "raw", "events": ["customer.state_changed"], "name": "ours"}
    )
    got, listed = webhooks.get_webhook_endpoint(id=new.id), webhooks.list_webhook_endpoints().result.items
    changed = webhooks.update_webhook_endpoint(
        id=new.id, webhook_endpoint_update={"name": "theirs", "enabled": False}
    )
    rotated = webhooks.reset_webhook_endpoint_secret(id=new.id)
    webhooks.delete_webhook_endpoint(id=new.id)
    return {
        "made": story.shown(plain(new), *story.ENDPOINT),
        "secrets": [new.secret != story.MASKED, rotated.secret not in (new.secret, story.MASKED)],
        "found": [plain(one) == plain(new) | {"secret": story.MASKED} for one in (got, *listed)],
        "changed": [changed.name, changed.enabled, changed.secret],
        "left": len(webhooks.list_webhook_endpoints().result.items),
    }


def delivered(polar: Polar, answering: str, silent: str) -> dict[str, Any]:
    """A customer is told of to two endpoints: one refuses, one is not there."""
    ids = [made(polar, answering), made(polar, silent)]
    polar.customers.create(request=story.CUSTOMER)
    story.eventually(lambda: all(deliveries(polar, id) for id in ids))
    refused, lost = (deliveries(polar, id)[-1] for id in ids)
    return {
        "refused": [refused.succeeded, refused.http_code, refused.response],
        "lost": [lost.succeeded, lost.http_code, lost.response],
        "event": story.told_shown(plain(refused.webhook_event)),
        "again": polar.webhooks.redeliver_webhook_event(id=refused.webhook_event.id)["endpoints"],
    }


def beyond(polar: Polar) -> str:
    """What becomes of a list with a type of ours."""
    try:
        polar.webhooks.list_webhook_endpoints()
    except ResponseValidationError:
        return "fails"
    return "read"


server, own, other = json.load(sys.stdin)
with Polar(access_token=own, server_url=server) as here, Polar(access_token=other, server_url=server) as there:
    report = {
        "managed": managed(here, f"{server}/v1/meters/"),
        "delivered": delivered(here, f"{server}/v1/meters/", story.NOWHERE),
        "beyond": beyond(there),
    }
print(json.dumps(report))
