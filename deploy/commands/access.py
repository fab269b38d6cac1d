"""``meterstream orgs`` and ``meterstream tokens``: organizations and their credentials.

Both work on the machine that has the installation's data, with or without a running server
(``deploy.server.control``). A token's secret is shown once, when it is created.
"""

from datetime import UTC, datetime, timedelta
from typing import Annotated

import msgspec
import typer

from deploy.client import EPILOG, session
from deploy.console import Output, note, show, show_one
from deploy.errors import USAGE, GiveUp
from meters.catalogue.access import AUDIT, SCOPES

# Organizations.

organization_app = typer.Typer(
    no_args_is_help=True, help="The organizations of this installation (works on --data, over Kafka on --log)."
)


@organization_app.command("create", epilog=EPILOG)
def create_organization(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What to call it.")],
    id: Annotated[str | None, typer.Option(help="Its id, where producers name one already; a UUID.")] = None,
    same_name: Annotated[bool, typer.Option("--same-name", help="Allow a name that another organization has.")] = False,
) -> None:
    """Create an organization. Give it a token next: `meterstream tokens create`."""
    from deploy.server.control import new_organization, open_control
    from meters.catalogue.catalogue import OrganizationCreated

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


@organization_app.command(epilog=EPILOG, name="list")
def list_organizations(context: typer.Context) -> None:
    """The organizations there are."""
    from deploy.server.control import open_control

    here = session(context)
    with open_control(here.data) as control:
        rows = [msgspec.to_builtins(one) for one in control.catalogue.organizations.values()]
    show(rows, ("id", "name", "created_at"), here.output)


# Tokens.

token_app = typer.Typer(
    no_args_is_help=True, help="Access tokens of the organizations (works on --data, over Kafka on --log)."
)

COLUMNS = ("id", "organization", "name", "scopes", "created_at", "expires_at", "revoked_at")
DAYS_MAX = 36_500  # a century; whoever wants more gives none
SCOPE_HELP = (
    f"What it may do; repeatable; by default everything but {AUDIT}, which reconciling from elsewhere needs: "
    f"{', '.join(SCOPES)}, {AUDIT}."
)
Organization = Annotated[str | None, typer.Option(help="Its id or name; not needed where there is only one.")]


@token_app.command("create", epilog=EPILOG)
def create_token(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="What the token is for.")] = "command line",
    organization: Organization = None,
    scope: Annotated[list[str] | None, typer.Option(help=SCOPE_HELP)] = None,
    days: Annotated[
        int | None, typer.Option(min=1, max=DAYS_MAX, help="How long it is good; for ever by default.")
    ] = None,
) -> None:
    """Create a token and show its secret, this once."""
    from deploy.server.control import new_secret, new_token, open_control, shown
    from meters.catalogue.catalogue import TokenCreated

    unknown = set(scope or ()) - {*SCOPES, AUDIT}
    if unknown:
        raise GiveUp(f"there is no scope {', '.join(sorted(unknown))}; there are {', '.join((*SCOPES, AUDIT))}", USAGE)
    here = session(context)
    expires_at = datetime.now(UTC) + timedelta(days=days) if days else None
    secret = new_secret()
    with open_control(here.data) as control:
        token = new_token(control.organization(organization), name, secret, scope or SCOPES, expires_at)
        control.decide([TokenCreated(token)])
        row = shown(token, control.catalogue)
    show_one({"token": secret, **msgspec.to_builtins(row)}, here.output)
    note("Keep the token now: only its digest is stored.")


@token_app.command(epilog=EPILOG, name="list")
def list_tokens(context: typer.Context, organization: Organization = None) -> None:
    """The tokens there are, without their secrets."""
    from deploy.server.control import open_control, shown

    here = session(context)
    with open_control(here.data) as control:
        owner = control.organization(organization).id if organization else None
        tokens = [one for one in control.catalogue.tokens.values() if owner in (None, one.organization_id)]
        rows = [msgspec.to_builtins(shown(token, control.catalogue)) for token in tokens]
    if here.output is Output.table:
        rows = [{**row, "scopes": _in_words(row["scopes"])} for row in rows]
    show(rows, COLUMNS, here.output)


def _in_words(scopes: list[str]) -> str:
    """Scopes for a table, where the two dozen that most tokens have would fill a page."""
    return f"all but {AUDIT}" if set(scopes) == set(SCOPES) else ", ".join(scopes)


@token_app.command(epilog=EPILOG)
def revoke(context: typer.Context, id: Annotated[str, typer.Argument(help="The token's id, from the list.")]) -> None:
    """Take a token back. A running server refuses it within moments."""
    from deploy.server.control import open_control, revoked, shown

    here = session(context)
    with open_control(here.data) as control:
        found = [token for token in control.catalogue.tokens.values() if token.id == id]
        if not found:
            raise GiveUp(f"there is no token {id}; `meterstream tokens list` shows the ids", USAGE)
        if found[0].revoked_at is None:
            control.decide([revoked(found[0])])
        row = shown(control.catalogue.tokens[found[0].sha256], control.catalogue)
    show_one(msgspec.to_builtins(row), here.output)
