"""``meterstream meters``: what is counted."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.giving_up import MISMATCH, USAGE, GiveUp
from deploy.output import as_json, note, show, show_one
from deploy.session import EPILOG, session

if TYPE_CHECKING:
    from deploy.client import Api

app = typer.Typer(no_args_is_help=True, help="Say what is counted: meters, their filters and aggregations.")

COLUMNS = ("name", "id", "aggregation", "filter", "unit", "archived_at")
PATH = "/v1/meters/"

Filter = Annotated[str | None, typer.Option("--filter", help="The filter as JSON.")]
Where = Annotated[list[str] | None, typer.Option("--where", help="A clause, such as model=gpt-4; repeatable.")]
Count = Annotated[bool, typer.Option("--count", help="Count events.")]
Property = Annotated[str | None, typer.Option(metavar="PROPERTY")]


@app.command(epilog=EPILOG, name="list")
def list_meters(context: typer.Context) -> None:
    """The organization's meters."""
    here = session(context)
    with here.api() as api:
        show(list(api.pages(PATH)), COLUMNS, here.output)


@app.command(epilog=EPILOG)
def create(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="At least three characters.")],
    filter: Filter = None,
    where: Where = None,
    count: Count = False,
    sum: Property = None,
    avg: Property = None,
    min: Property = None,
    max: Property = None,
    unique: Property = None,
    unit: Annotated[str, typer.Option(help="scalar, token or custom; for display.")] = "scalar",
) -> None:
    """Create a meter. It counts every stored event that matches, from the first one on."""
    here = session(context)
    functions = {"sum": sum, "avg": avg, "min": min, "max": max, "unique": unique}
    definition = {"name": name, "unit": unit, **_definition(filter, where, count, functions)}
    with here.api() as api:
        show_one(api.post(PATH, definition), here.output)


@app.command(epilog=EPILOG)
def preview(
    context: typer.Context,
    filter: Filter = None,
    where: Where = None,
    count: Count = False,
    sum: Property = None,
    avg: Property = None,
    min: Property = None,
    max: Property = None,
    unique: Property = None,
) -> None:
    """What a meter would say, without creating it."""
    here = session(context)
    functions = {"sum": sum, "avg": avg, "min": min, "max": max, "unique": unique}
    with here.api() as api:
        show_one(api.post(f"{PATH}preview", _definition(filter, where, count, functions)), here.output)


@app.command(epilog=EPILOG)
def backfill(context: typer.Context, meter: Annotated[str, typer.Argument(help="A meter's id or name.")]) -> None:
    """Count a meter's whole history again and compare it with the running totals. Exit code 3 if one differs."""
    from deploy.totals_check import compare_totals

    here = session(context)
    note("A meter counts all history, from the first event on, so nothing has to be filled in. This counts it again.")
    with here.api() as api:
        rows = compare_totals(api, find_meter(api, meter))
    show(rows, ("customer", "running", "recounted", "equal"), here.output)
    if not all(row["equal"] for row in rows):
        raise GiveUp("running totals differ from a recount; stop the server and run `meterstream rebuild`", MISMATCH)


def find_meter(api: "Api", wanted: str) -> dict[str, Any]:
    """The meter of this id or name. Raises GiveUp with the names there are."""
    import difflib

    meters = list(api.pages(PATH))
    found = [meter for meter in meters if wanted in (meter["id"], meter["name"])]
    if len(found) == 1:
        return found[0]
    if found:
        raise GiveUp(f"{len(found)} meters are called {wanted!r}; give the id of one", USAGE)
    names = [meter["name"] for meter in meters]
    close = difflib.get_close_matches(wanted, names, n=1)
    known = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(sorted(names)) or 'none'}"
    raise GiveUp(f"there is no meter {wanted!r}; {known}", USAGE)


def _definition(
    filter: str | None, where: list[str] | None, count: bool, functions: dict[str, str | None]
) -> dict[str, Any]:
    from deploy.where import parse_filter

    chosen = [{"func": name, "property": property} for name, property in functions.items() if property is not None]
    chosen += [{"func": "count"}] if count else []
    if len(chosen) != 1:
        raise GiveUp(f"give one of --count, --{', --'.join(functions)}; not {as_json(chosen)}", USAGE)
    return {"aggregation": chosen[0], "filter": parse_filter(filter, where or [])}
