"""``meterstream orgs``: the tenants of an installation, on the machine that has its data."""

from typing import Annotated

import msgspec
import typer

from deploy.giving_up import USAGE, GiveUp
from deploy.output import show, show_one
from deploy.session import EPILOG, session

app = typer.Typer(
    no_args_is_help=True, help="The organizations of this installation (works on --data, over Kafka on --log)."
)


@app.command(epilog=EPILOG)
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What to call it.")],
    id: Annotated[str | None, typer.Option(help="Its id, where producers name one already; a UUID.")] = None,
    same_name: Annotated[bool, typer.Option("--same-name", help="Even if another one is called so.")] = False,
) -> None:
    """Create an organization. Give it a token next: `meterstream tokens create`."""
    from deploy.control import new_organization, open_control
    from meters.catalogue import OrganizationCreated

    here = session(context)
    wanted = None if id is None else _parse_id(id)
    with open_control(here.data) as control:
        if wanted in control.catalogue.organizations:
            raise GiveUp(f"there is an organization {wanted} already", USAGE)
        twins = [one.id for one in control.catalogue.organizations.values() if one.name == name]
        if twins and not same_name:
            raise GiveUp(
                f"an organization called {name!r} is there already ({', '.join(twins)}); with --same-name there is "
                "another one, and commands need their ids from then on", USAGE,
            )
        organization = new_organization(name, wanted)
        control.decide([OrganizationCreated(organization)])
    show_one(msgspec.to_builtins(organization), here.output)


def _parse_id(text: str) -> str:
    from meters.event import parse_uuid4

    id = parse_uuid4(text)
    if not isinstance(id, str):
        raise GiveUp(f"--id {text} is no id of an organization: give a UUID of version 4", USAGE)
    return id


@app.command(epilog=EPILOG, name="list")
def list_organizations(context: typer.Context) -> None:
    """The organizations there are."""
    from deploy.control import open_control

    here = session(context)
    with open_control(here.data) as control:
        rows = [msgspec.to_builtins(one) for one in control.catalogue.organizations.values()]
    show(rows, ("id", "name", "created_at"), here.output)
