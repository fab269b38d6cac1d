"""``meterstream polar``: what came in from Polar.

``deliveries`` lists Polar's webhooks and what became of them. ``waiting`` lists the credits that wait for a linked
meter. Both call the API.
"""

import typer

from deploy.client import EPILOG, session
from deploy.console import note, show

app = typer.Typer(no_args_is_help=True, help="See what came in from Polar.")

DELIVERIES, WAITING = "/v1/webhooks/polar/deliveries", "/v1/webhooks/polar/waiting"
DELIVERY_COLUMNS = ("received_at", "type", "outcome", "delivery_id", "reasons")
WAITING_COLUMNS = ("polar_meter_id", "customers", "credits", "units", "first_at", "last_at")


@app.command(epilog=EPILOG)
def deliveries(context: typer.Context) -> None:
    """List Polar's newest webhooks, newest first, with what became of each and why."""
    here = session(context)
    with here.api() as api:
        rows = [row | {"reasons": "; ".join(row["reasons"])} for row in api.pages(DELIVERIES)]
    show(rows, DELIVERY_COLUMNS, here.output)


@app.command(epilog=EPILOG)
def waiting(context: typer.Context) -> None:
    """List Polar's meters whose credits wait, because no meter here is linked to them."""
    here = session(context)
    with here.api() as api:
        rows = list(api.pages(WAITING))
    show(rows, WAITING_COLUMNS, here.output)
    if rows:
        note("Credits count once a meter here has polar_meter_id in its metadata.")
