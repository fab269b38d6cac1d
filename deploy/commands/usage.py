"""``meterstream usage``: what was used, over time."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any

import typer

from deploy.giving_up import USAGE, GiveUp
from deploy.output import Output, as_json, note, require_stdout, show, show_json, show_table, text
from deploy.session import session
from deploy.typed import parse_instant
from meters import exact_json
from meters.window import END_MAX, START_MIN, Interval, bucket, zone

OPTIONS = {"": "--start and --end", "timezone": "--timezone", "external_customer_id": "--customer"}
MICROSECOND = timedelta(microseconds=1)

# How far back each interval looks by default: a screenful, and within the API's limits.
DEFAULT_RANGE = {
    "hour": timedelta(hours=24),
    "day": timedelta(days=30),
    "week": timedelta(weeks=26),
    "month": timedelta(days=365),
    "year": timedelta(days=5 * 365),
}


def usage(
    context: typer.Context,
    meter: Annotated[str, typer.Argument(help="A meter's id or name.")],
    customer: Annotated[list[str] | None, typer.Option(help="Only this external customer id; repeatable.")] = None,
    interval: Annotated[str, typer.Option(help="hour, day, week, month or year.")] = "day",
    start: Annotated[str | None, typer.Option(help="From this time on (ISO 8601).")] = None,
    end: Annotated[str | None, typer.Option(help="Up to this time, not included; now by default.")] = None,
    timezone: Annotated[
        str, typer.Option(help="Whose days and months, and times that do not say theirs, such as Europe/Berlin.")
    ] = "UTC",
    chart: Annotated[bool, typer.Option("--chart", help="Draw bars beside the numbers.")] = False,
) -> None:
    """What a meter counted, interval by interval, with its total and the position of the log it is true for.

    Intervals are shown whole, all between --start and --end: the first holds --start, the last the moment before --end.
    """
    from deploy.client import blaming
    from deploy.commands.meters import find_meter

    here = session(context)
    if interval not in DEFAULT_RANGE:
        raise GiveUp(f"--interval is one of {', '.join(DEFAULT_RANGE)}, and not {interval!r}", USAGE)
    since, until = _range(start, end, Interval(interval), timezone)
    with here.api() as api, blaming(OPTIONS):
        found = find_meter(api, meter)
        response = api.answer("GET", f"/v1/meters/{found['id']}/quantities", params={
            "start_timestamp": since.isoformat(), "end_timestamp": until.isoformat(), "interval": interval,
            "timezone": timezone, "external_customer_id": customer,
        })
    answer = exact_json.decode(response.content)
    for point in answer["quantities"]:
        beginning, _ = bucket(datetime.fromisoformat(point["timestamp"]), Interval(interval), timezone)
        point["timestamp"] = beginning.isoformat().replace("+00:00", "Z")
    _show(answer, response.headers.get("As-Of", ""), here.output, chart)


def _show(answer: dict[str, Any], as_of: str, output: Output, chart: bool) -> None:
    rows = [
        {"timestamp": point["timestamp"], "quantity": Decimal(point["quantity"])} for point in answer["quantities"]
    ]
    total = f"Total {text(Decimal(answer['total']))}, as of log position {as_of}."
    require_stdout()
    if output is Output.json:
        show_json(as_json({**answer, "as_of": as_of}))
    elif output is Output.csv:
        show(rows, ("timestamp", "quantity"), output)
        note(total)
    else:
        show_table(rows, ("timestamp", "quantity"), chart="quantity" if chart else "")
        print(total)


def _range(start: str | None, end: str | None, interval: Interval, timezone: str) -> tuple[datetime, datetime]:
    """The first and the last moment of all intervals between the options' times. Raises GiveUp.

    The API goes from the first in steps of an interval, and shows the whole interval that each step leads into.
    """
    tz = zone(timezone)
    if tz is None:
        raise GiveUp(f"--timezone takes a name such as Europe/Berlin, and not {timezone!r}", USAGE)
    earliest = START_MIN.replace(tzinfo=tz)
    until = datetime.now(UTC) if end is None else parse_instant(end, "--end", tz)
    back = DEFAULT_RANGE[interval]
    since = max(until, earliest + back) - back if start is None else parse_instant(start, "--start", tz)
    for option, instant in (("--end", until), ("--start", since)):
        if not min(START_MIN, earliest) <= instant <= END_MAX:
            raise GiveUp(f"{option} is a time from {START_MIN.date()} to {END_MAX.date()}", USAGE)
    if since >= until:
        raise GiveUp("--end must be later than --start", USAGE)
    first = max(bucket(since, interval, timezone)[0], START_MIN)
    last = bucket(until - MICROSECOND, interval, timezone)[1] - MICROSECOND
    return first.astimezone(tz), last.astimezone(tz)
