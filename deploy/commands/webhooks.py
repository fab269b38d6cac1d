"""``meterstream webhooks``: endpoints that receive webhooks, and sources whose webhooks are received.

The commands create, list, switch and rotate endpoints, and show and repeat their deliveries. ``listen`` adds a
source, such as Polar, whose webhooks change customers, benefits and subscriptions here. All of them call the API.
"""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.client import EPILOG, session
from deploy.console import ids, note, show, show_one
from deploy.errors import USAGE, GiveUp

if TYPE_CHECKING:
    from deploy.client import Api

app = typer.Typer(no_args_is_help=True, help="Tell other systems what changed, and take in what Polar tells.")

ENDPOINTS = "/v1/webhooks/endpoints"
COLUMNS = ("url", "id", "name", "events", "enabled", "disabled_reason", "created_at")
DELIVERY_COLUMNS = ("created_at", "type", "customer_id", "attempt", "outcome", "status", "event_id")

Id = Annotated[str, typer.Argument(help="An endpoint's id or URL.")]


@app.command(epilog=EPILOG)
def create(
    context: typer.Context,
    url: Annotated[str, typer.Argument(help="Where to send to; https, and public unless the server allows others.")],
    event: Annotated[
        list[str] | None, typer.Option(help="A type to be told; repeatable. By default customer.state_changed.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="For display.")] = None,
) -> None:
    """Tell an address what changes. The secret that signs is printed once."""
    from deploy.client import blaming
    from meters.webhooks import EVENT_TYPES

    unknown = [type for type in event or () if type not in EVENT_TYPES]
    if unknown:
        raise GiveUp(f"--event: nothing is called {', '.join(unknown)}; there are {', '.join(EVENT_TYPES)}", USAGE)
    here = session(context)
    body = {"url": url, "name": name} | ({"events": event} if event else {})
    with here.api() as api, blaming({"url": "URL", "events": "--event", "name": "--name"}):
        show_one(api.post(ENDPOINTS, body), here.output)


@app.command(epilog=EPILOG, name="list")
def list_endpoints(context: typer.Context) -> None:
    """Who is told."""
    here = session(context)
    with here.api() as api:
        show(list(api.pages(ENDPOINTS)), COLUMNS, here.output)


@app.command(epilog=EPILOG)
def rotate(context: typer.Context, endpoint: Id) -> None:
    """Make a new secret and print it. The one before goes on signing beside it for a day."""
    here = session(context)
    with here.api() as api:
        id = find_endpoint(api, endpoint)
        show_one(api.patch(f"{ENDPOINTS}/{id}/secret", {}), here.output)


@app.command(epilog=EPILOG)
def enable(context: typer.Context, endpoint: Id) -> None:
    """Tell an endpoint again that was disabled, by hand or because it did not answer."""
    _switch(context, endpoint, True)


@app.command(epilog=EPILOG)
def disable(context: typer.Context, endpoint: Id) -> None:
    """Tell it nothing until it is enabled. What waits is sent then; after 30 days it is given up."""
    _switch(context, endpoint, False)


@app.command(epilog=EPILOG)
def deliveries(
    context: typer.Context,
    endpoint: Annotated[str | None, typer.Option(help="Only those to this endpoint.")] = None,
) -> None:
    """What was sent during the last 30 days, attempt by attempt, newest first."""
    here = session(context)
    with here.api() as api:
        wanted = None if endpoint is None else find_endpoint(api, endpoint)
        rows = [_delivery(row) for row in api.pages("/v1/webhooks/deliveries", endpoint_id=wanted)]
    show(rows, DELIVERY_COLUMNS, here.output)


@app.command(epilog=EPILOG)
def redeliver(context: typer.Context, event: Annotated[str, typer.Argument(help="An event_id of deliveries.")]) -> None:
    """Send something again, word for word and under the same id."""
    from deploy.client import looking_for, segment

    unknown = f"nothing was sent under the id {event}; `meterstream webhooks deliveries` shows them as event_id"
    here = session(context)
    path = f"/v1/webhooks/events/{segment(event, 'EVENT')}/redeliver"
    with here.api() as api, looking_for(unknown):
        show_one(api.post(path, {}), here.output)


@app.command(epilog=EPILOG)
def listen(
    context: typer.Context, name: Annotated[str | None, typer.Option(help="For display.")] = None
) -> None:  # fmt: skip
    """Take in what a Polar organization sends to /webhooks/polar. Its secret is read from standard input."""
    from deploy.client import blaming

    here = session(context)
    note("The secret, as Polar's dashboard shows it:")
    secret = _line_of_input()
    if not secret:
        raise GiveUp("no secret was given on standard input", USAGE)
    with here.api() as api, blaming({"secret": "the secret", "name": "--name"}):
        show_one(api.post("/v1/webhooks/sources", {"secret": secret, "name": name}), here.output)


def find_endpoint(api: "Api", wanted: str, enabled: bool = True) -> str:
    """The id of the endpoint with this id or URL; of several those are preferred that are (not) enabled.

    Raises GiveUp.
    """
    found = [one for one in api.pages(ENDPOINTS) if wanted in (one["id"], one["url"])]
    found = [one for one in found if one["enabled"] is enabled] or found
    if not found:
        raise GiveUp(f"there is no endpoint {wanted!r}; `meterstream webhooks list` shows them", USAGE)
    if len(found) > 1:
        raise GiveUp(f"{len(found)} endpoints have the URL {wanted!r}; give the id of one: {ids(found)}", USAGE)
    return str(found[0]["id"])


def _line_of_input() -> str:
    """The first line of standard input; nothing where that is closed. Raises GiveUp."""
    line = sys.stdin.buffer.readline() if sys.stdin else b""
    try:
        return line.decode().strip()
    except UnicodeDecodeError:
        raise GiveUp("what was given on standard input is no text (UTF-8)", USAGE) from None


def _switch(context: typer.Context, endpoint: str, enabled: bool) -> None:
    here = session(context)
    with here.api() as api:
        path = f"{ENDPOINTS}/{find_endpoint(api, endpoint, enabled=not enabled)}"
        show_one(api.patch(path, {"enabled": enabled}), here.output)


def _delivery(row: dict[str, Any]) -> dict[str, Any]:
    event = row["webhook_event"]
    told = {"type": event["type"], "customer_id": event["customer_id"], "status": event["status"]}
    return row | told | {"event_id": event["id"]}
