"""``meterstream meters`` and ``meterstream usage``: meters, and what was used over time.

``meters`` lists, creates, previews and backfills meters. ``usage`` asks what one meter counted, by interval and group,
and shows it as a table, a chart, JSON or CSV. ``find_meter`` accepts an id or a name.
"""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.client import EPILOG, session
from deploy.console import (
    Output,
    as_json,
    harmless,
    ids,
    meters_called,
    note,
    parse_filter,
    parse_instant,
    require_stdout,
    show,
    show_json,
    show_one,
    show_table,
    text,
)
from deploy.errors import MISMATCH, USAGE, GiveUp
from meters.timestamps import END_MAX, START_MIN, Interval, bucket, zone

# Meters.

if TYPE_CHECKING:
    from deploy.client import Api

app = typer.Typer(no_args_is_help=True, help="Say what is counted: meters, their filters and aggregations.")

COLUMNS = ("name", "id", "aggregation", "filter", "unit", "archived_at")
PATH = "/v1/meters/"
SIGNS = {"eq": "=", "ne": "!=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<=", "like": "~", "not_like": "!~"}

Filter = Annotated[str | None, typer.Option("--filter", help="The filter as JSON.")]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where", metavar="CLAUSE",
        help="What an event must say, such as model=gpt-4; repeatable, and all must hold. Compare with = != > >= < <=, "
        "~ (contains) and !~ (does not). A number, true and false are read as such, unless in quotes: 'zip=\"00123\"'.",
    ),
]
Count = Annotated[bool, typer.Option("--count", help="Count events.")]
Sum = Annotated[
    str | None,
    typer.Option(
        metavar="PROPERTY", help="Add up a number of the metadata; a key with dots in quotes: '\"gen_ai.tokens\"'."
    ),
]
Avg = Annotated[str | None, typer.Option(metavar="PROPERTY", help="The mean of a number of the metadata.")]
Min = Annotated[str | None, typer.Option(metavar="PROPERTY", help="The smallest.")]
Max = Annotated[str | None, typer.Option(metavar="PROPERTY", help="The largest.")]
Unique = Annotated[str | None, typer.Option(metavar="PROPERTY", help="Count how many different values there are.")]

OPTIONS = {
    "name": "--name", "unit": "--unit", "custom_label": "--label", "filter": "--filter or --where",
    "aggregation": "the function's property",
}  # fmt: skip


@app.command(epilog=EPILOG, name="list")
def list_meters(context: typer.Context) -> None:
    """The organization's meters."""
    here = session(context)
    with here.api() as api:
        meters = list(api.pages(PATH))
    show([_in_words(meter) for meter in meters] if here.output is Output.table else meters, COLUMNS, here.output)


def _in_words(meter: dict[str, Any]) -> dict[str, Any]:
    """The meter as a person says it: ``sum(tokens)``, ``name = llm.call and tokens > 5``."""
    aggregation = meter["aggregation"]
    what = f"{aggregation['func']}({aggregation.get('property', '')})"
    return meter | {"aggregation": what, "filter": _filter_in_words(meter["filter"])}


def _filter_in_words(filter: dict[str, Any]) -> str:
    parts = []
    for clause in filter["clauses"]:
        if "clauses" in clause:
            parts.append(f"({_filter_in_words(clause)})")
        else:
            sign = SIGNS.get(clause["operator"], clause["operator"])
            parts.append(f"{clause['property']} {sign} {text(clause['value'])}")
    return f" {filter['conjunction']} ".join(parts)


@app.command(epilog=EPILOG)
def create(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="At least three characters.")],
    filter: Filter = None,
    where: Where = None,
    count: Count = False,
    sum: Sum = None,
    avg: Avg = None,
    min: Min = None,
    max: Max = None,
    unique: Unique = None,
    unit: Annotated[str, typer.Option(help="scalar, token or custom; for display.")] = "scalar",
    label: Annotated[str | None, typer.Option(help="What a custom unit is called.")] = None,
    same_name: Annotated[bool, typer.Option("--same-name", help="Allow a name that another meter has.")] = False,
) -> None:
    """Create a meter: one of --count, --sum, --avg, --min, --max and --unique, over the events that match.

    The meter counts every stored event, from the first one on. Warnings name events and metadata keys that no recent
    event has; `meterstream meters preview` shows them without creating the meter.

    Example: meterstream meters create --name tokens --sum tokens --where name=llm.call
    """
    from deploy.client import blaming

    here = session(context)
    if unit == "custom" and not label:
        raise GiveUp("--unit custom needs a --label, which says what the unit is called", USAGE)
    functions = {"sum": sum, "avg": avg, "min": min, "max": max, "unique": unique}
    definition = {"name": name, "unit": unit, "custom_label": label, **_definition(filter, where, count, functions)}
    with here.api() as api:
        twins = [meter for meter in api.pages(PATH) if meter["name"] == name and not meter["archived_at"]]
        if twins and not same_name:
            raise GiveUp(
                f"a meter called {name!r} is there already ({ids(twins)}); with --same-name there is another one, and "
                "commands need their ids from then on", USAGE,
            )
        with blaming(OPTIONS):
            made = api.post(PATH, definition)
    _show_with_warnings(made, here.output)


@app.command(epilog=EPILOG)
def preview(
    context: typer.Context,
    filter: Filter = None,
    where: Where = None,
    count: Count = False,
    sum: Sum = None,
    avg: Avg = None,
    min: Min = None,
    max: Max = None,
    unique: Unique = None,
) -> None:
    """Show what a meter would count, without creating it.

    Example: meterstream meters preview --sum tokens --where name=llm.call
    """
    from deploy.client import blaming

    here = session(context)
    functions = {"sum": sum, "avg": avg, "min": min, "max": max, "unique": unique}
    with here.api() as api, blaming(OPTIONS):
        found = api.post(f"{PATH}preview", _definition(filter, where, count, functions))
    _show_with_warnings(found, here.output)


def _show_with_warnings(answer: dict[str, Any], output: Output) -> None:
    """Show a meter or a preview, and its warnings on stderr. A table leaves them out of its rows; JSON has both."""
    shown = {key: value for key, value in answer.items() if key != "warnings"} if output is Output.table else answer
    show_one(shown, output)
    for warning in answer.get("warnings") or ():
        note(f"warning: {harmless(warning)}")


@app.command(epilog=EPILOG)
def backfill(context: typer.Context, meter: Annotated[str, typer.Argument(help="A meter's id or name.")]) -> None:
    """Count a meter's whole history again and compare the running totals of its largest customers with that.

    Exit code 3 if one differs. `meterstream reconcile` compares all customers.
    """
    from deploy.rebuild import compare_totals

    here = session(context)
    note("A meter counts all history, from the first event on, so nothing has to be filled in. This counts it again.")
    with here.api() as api:
        rows, customers = compare_totals(api, find_meter(api, meter))
    if customers > len(rows):
        note(f"Of {customers} customers these are the {len(rows)} largest; `meterstream reconcile` compares all.")
    show(rows, ("customer", "running", "recounted", "equal"), here.output)
    if not all(row["equal"] for row in rows):
        raise GiveUp("running totals differ from a recount; stop the server and run `meterstream rebuild`", MISMATCH)


def find_meter(api: "Api", wanted: str) -> dict[str, Any]:
    """The meter of this id or name; an archived one only where no other is called so. Raises GiveUp."""
    import difflib

    meters = list(api.pages(PATH))
    found = meters_called(meters, wanted)
    if len(found) == 1:
        return found[0]
    if found:
        raise GiveUp(f"{len(found)} meters are called {wanted!r}; give the id of one: {ids(found)}", USAGE)
    names = [meter["name"] for meter in meters]
    close = difflib.get_close_matches(wanted, names, n=1)
    known = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(sorted(names)) or 'none'}"
    raise GiveUp(f"there is no meter {wanted!r}; {known}", USAGE)


def _definition(
    filter: str | None, where: list[str] | None, count: bool, functions: dict[str, str | None]
) -> dict[str, Any]:
    chosen = [{"func": name, "property": property} for name, property in functions.items() if property is not None]
    chosen += [{"func": "count"}] if count else []
    if len(chosen) != 1:
        given = " and ".join(f"--{one['func']}" for one in chosen) or "none"
        raise GiveUp(f"give one of --count, --{', --'.join(functions)}, and not {given}", USAGE)
    if not chosen[0].get("property", "x").strip():
        raise GiveUp(f"--{chosen[0]['func']} takes the name of a property of the metadata", USAGE)
    return {"aggregation": chosen[0], "filter": parse_filter(filter, where or [])}


# Usage. The numbers and the rows are those of ``GET /v1/usage``; nothing is counted here.

USAGE_OPTIONS = {
    "": "--start and --end", "timezone": "--timezone", "external_customer_id": "--customer", "group_by": "--by",
    "top": "--top",
}  # fmt: skip

# The default range of each interval: a screenful. It begins with a whole interval.
DEFAULT_RANGE = {
    "hour": timedelta(hours=24),
    "day": timedelta(days=30),
    "week": timedelta(weeks=26),
    "month": timedelta(days=365),
    "year": timedelta(days=5 * 365),
    "none": timedelta(days=30),
}
EARLIEST = datetime(1970, 1, 2, tzinfo=UTC)  # of a range that is not divided
NO_VALUE, OTHERS = "(none)", "(all others)"


def usage(
    context: typer.Context,
    meter: Annotated[str, typer.Argument(help="A meter's id or name.")],
    customer: Annotated[list[str] | None, typer.Option(help="Only this external customer id; repeatable.")] = None,
    interval: Annotated[
        str | None, typer.Option(help="hour, day, week, month, year or none; day by default, with --by none.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="From this time on (ISO 8601); by default a screenful before --end.")
    ] = None,
    end: Annotated[str | None, typer.Option(help="Up to this time, not included; now by default.")] = None,
    timezone: Annotated[
        str, typer.Option(help="The zone of days and months, and of times without an offset, such as Europe/Berlin.")
    ] = "UTC",
    by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="Group by external_customer_id, customer_id, name or metadata.PATH; repeatable."
        ),
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="With --by, show only so many groups, the largest, and all others as one.")
    ] = None,
    chart: Annotated[bool, typer.Option("--chart", help="Draw bars beside the numbers.")] = False,
) -> None:
    """Show what a meter counted, a row for each interval, with the total and the log position it is true for.

    There is a row for every interval that the range from --start to --end touches. The first and the last row are cut
    to the range, and the total is that of the range alone.

    Example: meterstream usage tokens --interval month --start 2026-01-01 --end 2026-04-01

    Example: meterstream usage tokens --by external_customer_id --top 10
    """
    from deploy.client import blaming

    here = session(context)
    interval = interval or ("none" if by else "day")
    if interval not in DEFAULT_RANGE:
        raise GiveUp(f"--interval is one of {', '.join(DEFAULT_RANGE)}, and not {interval!r}", USAGE)
    if top is not None and not by:
        raise GiveUp("--top chooses among groups: give --by too, such as --by external_customer_id", USAGE)
    since, until = _range(start, end, interval, timezone)
    with here.api() as api, blaming(USAGE_OPTIONS):
        found = find_meter(api, meter)
        answer = api.get(
            "/v1/usage", meter_id=found["id"], start=since.isoformat(), end=until.isoformat(), interval=interval,
            timezone=timezone, external_customer_id=customer, group_by=by, top=top,
        )
    _show(answer, here.output, chart)


def _show(answer: dict[str, Any], output: Output, chart: bool) -> None:
    points = [_point(row, row["group"]) for row in answer["rows"]]
    rest = [_point(row, {}) for row in answer["remainder"]]
    (total,) = (Decimal(one["value"]) for one in answer["totals"])
    keys = list(points[0]["group"]) if points else []
    rows = [one | {key: NO_VALUE if value is None else value for key, value in one["group"].items()} for one in points]
    rows += [one | dict.fromkeys(keys, OTHERS) for one in rest]
    told = f"Total {text(total)}, as of log position {answer['as_of']}."
    require_stdout()
    if output is Output.json:
        shown = {"quantities": points, "remainder": rest, "total": total, "as_of": answer["as_of"]}
        show_json(as_json(shown))
    elif output is Output.csv:
        show(rows, (*keys, "timestamp", "quantity"), output)
        note(told)
    else:
        show_table(rows, (*keys, "timestamp", "quantity"), chart="quantity" if chart else "")
        print(told)


def _point(row: dict[str, Any], group: dict[str, str | None]) -> dict[str, Any]:
    return {"timestamp": row["start"], "end": row["end"], "quantity": Decimal(row["value"]), "group": group}


def _range(start: str | None, end: str | None, interval: str, timezone: str) -> tuple[datetime, datetime]:
    """The time that the options mean. Raises GiveUp."""
    tz = zone(timezone)
    if tz is None:
        raise GiveUp(f"--timezone takes a name such as Europe/Berlin, and not {timezone!r}", USAGE)
    earliest = EARLIEST if interval == "none" else min(START_MIN, START_MIN.replace(tzinfo=tz))
    until = datetime.now(UTC) if end is None else parse_instant(end, "--end", tz)
    since = earliest if start is None else parse_instant(start, "--start", tz)
    for option, instant in (("--end", until), ("--start", since)):
        if not earliest <= instant <= END_MAX:
            raise GiveUp(f"{option} is a time from {earliest.astimezone(tz).date()} to {END_MAX.date()}", USAGE)
    if start is None:
        since = max(until - DEFAULT_RANGE[interval], earliest)
        since = since if interval == "none" else max(bucket(since, Interval(interval), timezone)[0], earliest)
    if since >= until:
        raise GiveUp("--end must be later than --start", USAGE)
    return since, until
