"""``meterstream usage``: what was used, over time."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import typer

from deploy.giving_up import USAGE, GiveUp
from deploy.instant import parse_instant
from deploy.output import Output, as_json, show, show_table, text
from deploy.session import session
from meters.window import START_MIN

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
    start: Annotated[str | None, typer.Option(help="From this time (ISO 8601, UTC unless it says).")] = None,
    end: Annotated[str | None, typer.Option(help="Until this time; now by default.")] = None,
    timezone: Annotated[str, typer.Option(help="Whose days and months, such as Europe/Berlin.")] = "UTC",
    chart: Annotated[bool, typer.Option("--chart", help="Draw bars beside the numbers.")] = False,
) -> None:
    """What a meter counted, interval by interval, with its total and the position of the log it is true for."""
    from deploy.client import exact_json, refused
    from deploy.commands.meters import find_meter

    here = session(context)
    if interval not in DEFAULT_RANGE:
        raise GiveUp(f"--interval is one of {', '.join(DEFAULT_RANGE)}, and not {interval!r}", USAGE)
    until = parse_instant(end, "--end") if end else datetime.now(UTC)
    since = parse_instant(start, "--start") if start else _beginning(until, interval, timezone)
    if since > until:
        raise GiveUp("--end must be later than --start", USAGE)
    with here.api() as api:
        found = find_meter(api, meter)
        response = api.send("GET", f"/v1/meters/{found['id']}/quantities", params={
            "start_timestamp": since.isoformat(), "end_timestamp": until.isoformat(), "interval": interval,
            "timezone": timezone, "external_customer_id": customer,
        })
        if not response.is_success:
            raise refused(response)
    _show(exact_json(response.content), response.headers.get("As-Of", ""), here.output, chart)


def _show(answer: dict[str, Any], as_of: str, output: Output, chart: bool) -> None:
    rows = [
        {"timestamp": point["timestamp"], "quantity": Decimal(point["quantity"])} for point in answer["quantities"]
    ]
    if output is Output.json:
        print(as_json({**answer, "as_of": as_of}))
    elif output is Output.csv:
        show(rows, ("timestamp", "quantity"), output)
    else:
        show_table(rows, ("timestamp", "quantity"), chart="quantity" if chart else "")
        print(f"Total {text(Decimal(answer['total']))}, as of log position {as_of}.")


def _beginning(until: datetime, interval: str, timezone: str) -> datetime:
    """Where to begin when nobody says: the default range back, at the start of its hour, day, week, month or year."""
    try:
        local = max(until - DEFAULT_RANGE[interval], START_MIN).astimezone(ZoneInfo(timezone))
    except (ZoneInfoNotFoundError, ValueError):
        raise GiveUp(f"--timezone takes a name such as Europe/Berlin, and not {timezone!r}", USAGE) from None
    local -= timedelta(days=local.weekday() if interval == "week" else 0)
    parts = {"minute": 0, "second": 0, "microsecond": 0}
    parts |= {} if interval == "hour" else {"hour": 0}
    parts |= {"day": 1} if interval in ("month", "year") else {}
    parts |= {"month": 1} if interval == "year" else {}
    return max(local.replace(**parts), START_MIN)  # type: ignore[arg-type]  # no zone is among the parts
