"""``meterstream reconcile``: compare what was accepted, what is counted and what Polar has.

The command chooses the checks and whether to repair, calls ``deploy.reconcile.run``, and prints the report as a
table, JSON, CSV or HTML. Its exit code says whether differences remain.
"""

from collections.abc import Callable
from datetime import UTC, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.client import session
from deploy.console import Output, harmless, note, parse_instant, show, show_json, show_table
from deploy.errors import DONE, FAILED, MISMATCH, USAGE, GiveUp
from deploy.server.private_files import private_files

if TYPE_CHECKING:
    from aggregator.reconcile.report import Difference, Report


class Which(StrEnum):
    """What to compare."""

    all = "all"
    log = "log"
    store = "store"
    ledger = "ledger"
    upstream = "upstream"


class Mend(StrEnum):
    """What to do about differences."""

    plan = "plan"
    apply = "apply"


def reconcile(
    context: typer.Context,
    check: Annotated[list[Which] | None, typer.Option(help="What to compare; repeatable; all by default.")] = None,
    since: Annotated[str | None, typer.Option(help="From this time on (ISO 8601; UTC without an offset).")] = None,
    until: Annotated[str | None, typer.Option(help="Up to this time, not included.")] = None,
    repair: Annotated[Mend | None, typer.Option(help="List the repairs of the differences, or apply them.")] = None,
    settle: Annotated[int, typer.Option(min=0, help="Minutes that an event may be on its way to Polar.")] = 15,
    report: Annotated[Path | None, typer.Option(help="Also write the report to this file, as a page (HTML).")] = None,
) -> int:
    """Compare the log with the store, the store with itself, balances with entries, and all of it with Polar.

    Exit code 0: equal. 3: different; the report names every difference, its cause, and what to do. 1: something could
    not be compared. Polar is left out, and the verdict says so, where METERSTREAM_POLAR_TOKEN is not set.

    Example: meterstream reconcile --since 2026-03-01 --until 2026-04-01 --report march.html
    """
    from aggregator.reconcile.html import page
    from aggregator.reconcile.report import report_json
    from deploy.reconcile.local import CHECKS, Task
    from deploy.reconcile.run import prove
    from deploy.server.runtime import configure_logs

    here = session(context, page=True)
    configure_logs("reconcile", "critical")  # what goes wrong is said once, by the command
    wanted = [one.value for one in check or [Which.all]]
    if Which.upstream in (check or []) and not here.settings.polar_token:
        raise GiveUp("--check upstream compares with Polar: set METERSTREAM_POLAR_TOKEN; nothing was compared", USAGE)
    begin = None if since is None else parse_instant(since, "--since").astimezone(UTC)
    end = None if until is None else parse_instant(until, "--until").astimezone(UTC)
    if begin and end and begin >= end:
        raise GiveUp("--until must be later than --since; nothing was compared", USAGE)
    checks = CHECKS if "all" in wanted else tuple(one for one in CHECKS if one in wanted)
    task = Task(
        checks=checks, since=begin, until=end, repair=repair.value if repair else None,
        settle=timedelta(minutes=settle),
    )  # fmt: skip
    found = prove(here, task)
    if report is not None:
        _write(report, page(found))
    if here.output is Output.json:
        show_json(report_json(found).decode())
    elif here.output is Output.html:
        print(page(found), end="")
    else:
        _print(found, here.output)
    if not found.is_equal:
        return MISMATCH
    return FAILED if found.has_failed else DONE


def _print(found: "Report", output: Output) -> None:
    say: Callable[[str], None] = note if output is Output.csv else print  # with CSV, rows alone are the answer
    (_print_csv if output is Output.csv else _print_table)(found)
    for check in found.checks:
        if check.skipped and output is Output.csv:
            note(f"{check.name} was not compared: {harmless(check.skipped)}")
        for remark in check.notes:
            note(f"{check.name}: {harmless(remark)}")
    for action in [*found.plan, *found.done]:
        say(harmless(action.what))
    say(f"{found.verdict}, as of log position {found.as_of}." if found.as_of else f"{found.verdict}.")


def _print_table(found: "Report") -> None:
    show_table([
        {
            "check": check.name, "compared": sum(one.compared for one in check.counted),
            "different": check.differences_count, "seconds": f"{check.seconds:.1f}", "not compared": check.skipped,
        }
        for check in found.checks
    ], ("check", "compared", "different", "seconds", "not compared"))  # fmt: skip
    for one in found.differences:
        many = f" ({one.count} events)" if one.count > 1 else ""
        print(f"\n{one.check}: {one.cause}: {harmless(one.where)}{many}")
        print(f"    {harmless(one.what)}")
        print("    " + "; ".join(part for part in (harmless(one.moved), _money(one), one.repair) if part))
    if found.differences:
        print()


def _print_csv(found: "Report") -> None:
    rows = [
        {
            "check": one.check, "cause": one.cause.value, "where": one.where, "what": one.what, "events": one.count,
            "quantities": one.moved, "cents": one.cents, "repair": one.repair.value,
        }
        for one in found.differences
    ]  # fmt: skip
    columns = ("check", "cause", "where", "what", "events", "quantities", "cents", "repair")
    show(rows, columns, Output.csv)


def _money(one: "Difference") -> str:
    from aggregator.reconcile.html import stake

    found = stake(one)
    return "money at stake: unknown" if found == "unknown" else found


def _write(path: Path, text: str) -> None:
    try:
        with private_files():  # it names customers and money
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise GiveUp(f"the report cannot be written to {path}: {error.strerror}") from None
