"""``meterstream orgs``: the tenants of an installation, on the machine that has its data."""

from typing import Annotated

import msgspec
import typer

from deploy.output import show, show_one
from deploy.session import EPILOG, session

app = typer.Typer(no_args_is_help=True, help="The organizations of this installation (works on --data).")


@app.command(epilog=EPILOG)
def create(context: typer.Context, name: Annotated[str, typer.Argument(help="What to call it.")]) -> None:
    """Create an organization. Give it a token next: `meterstream tokens create`."""
    from deploy.control import new_organization, open_control
    from meters.catalogue import OrganizationCreated

    here = session(context)
    with open_control(here.data) as control:
        organization = new_organization(name)
        control.decide([OrganizationCreated(organization)])
    show_one(msgspec.to_builtins(organization), here.output)


@app.command(epilog=EPILOG, name="list")
def list_organizations(context: typer.Context) -> None:
    """The organizations there are."""
    from deploy.control import open_control

    here = session(context)
    with open_control(here.data) as control:
        rows = [msgspec.to_builtins(one) for one in control.catalogue.organizations.values()]
    show(rows, ("id", "name", "created_at"), here.output)
