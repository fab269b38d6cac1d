"""``meterstream polar``: what came in from Polar.

``deliveries`` lists Polar's webhooks and what became of them. ``waiting`` lists the credits that wait for a linked
meter. ``pull`` imports what exists at Polar. All of them call the API.
"""

from collections import Counter
from typing import Annotated

import typer

from deploy.client import EPILOG, session
from deploy.console import note, show
from deploy.errors import GiveUp

app = typer.Typer(no_args_is_help=True, help="Import from Polar, and see what came in from there.")

DELIVERIES, WAITING = "/v1/webhooks/polar/deliveries", "/v1/webhooks/polar/waiting"
DELIVERY_COLUMNS = ("received_at", "type", "outcome", "delivery_id", "reasons")
PULL_COLUMNS = ("kind", "polar_id", "name", "outcome", "reasons")
WAITING_COLUMNS = ("polar_meter_id", "customers", "credits", "units", "first_at", "last_at")


@app.command(epilog=EPILOG)
def deliveries(context: typer.Context) -> None:
    """List Polar's newest webhooks, newest first, with what became of each and why."""
    here = session(context)
    with here.api() as api:
        rows = [row | {"reasons": "; ".join(row["reasons"])} for row in api.pages(DELIVERIES)]
    show(rows, DELIVERY_COLUMNS, here.output)
    if not rows:
        note("No webhook of Polar's has arrived. Have Polar send them to /webhooks/polar of this server.")


@app.command(epilog=EPILOG)
def waiting(context: typer.Context) -> None:
    """List Polar's meters whose credits wait, because no meter here is linked to them."""
    here = session(context)
    with here.api() as api:
        rows = list(api.pages(WAITING))
    show(rows, WAITING_COLUMNS, here.output)
    if rows:
        note("Credits count once a meter here has polar_meter_id in its metadata.")
    else:
        note("No credits of Polar's wait for a meter.")


@app.command(epilog=EPILOG)
def pull(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and change nothing.")] = False,
) -> None:
    """Import the meters, customers and benefits that exist at Polar.

    Set METERSTREAM_POLAR_TOKEN to a token of the Polar organization that may read them. The command can run again at
    any time, also after an interruption: it changes nothing that exists here already.

    Example: meterstream polar pull --dry-run
    """
    from deploy.polar_pull import pull as pulled
    from deploy.reconcile.polar import connected

    here = session(context)
    with here.api() as api, connected(here.settings, here.data) as there:
        rows = list(pulled(api, there, dry_run=dry_run, tell=note))
    show(rows, PULL_COLUMNS, here.output)
    counts = Counter((row["kind"], row["outcome"]) for row in rows)
    would = "would be " if dry_run else ""
    note("; ".join(f"{kind}s {would}{outcome}: {count}" for (kind, outcome), count in sorted(counts.items())))
    if any(row["outcome"] == "refused" for row in rows):
        raise GiveUp("some objects were refused; the column reasons says why")
