"""The store's commands: make it again, go on without lost records, see what is wrong."""

from pathlib import Path
from typing import Annotated

import typer

from deploy.giving_up import FAILED, GiveUp
from deploy.output import note, progress_bar, show, show_one
from deploy.session import session

BESIDE_A_SERVER = "stop the server for that, or compare beside it with `meterstream reconcile`"


def rebuild(context: typer.Context) -> None:
    """Make the store again from the log: beside the old one, then in its place. No server may run meanwhile."""
    from deploy.logs import configure_logs
    from deploy.rebuild import rebuild as run

    here = session(context)
    configure_logs("rebuild", "critical")  # what goes wrong is said once, by the command
    kept: list[Path] = []
    with progress_bar("records", None) as advance:
        tallies = run(here.data, advance, kept.append)
    show_one(tallies, here.output)
    note(f"{here.data.store} is new, and has everything that the log has.")
    for old in kept:
        note(f"{old} is the old store, which is not known to be of this log: keep it as long as you need its numbers.")


def skip_lost(
    context: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this it only says what would be lost.")] = False,
) -> None:
    """Go on behind records that left the log before they were read; they are never counted. No server may run."""
    from deploy.skipping import skip_lost as run

    here = session(context)
    lost = run(here.data, sure=yes)
    rows = [each._asdict() | {"records": each.start - each.position} for each in lost]
    show(rows, ("stream", "partition", "position", "start", "records"), here.output)
    records = sum(row["records"] for row in rows)
    if records and not yes:
        raise GiveUp(f"{records} records would never be counted; --yes accepts that", FAILED)
    note(f"{records} records are skipped; the aggregator can go on." if records else "Nothing is lost.")


def doctor(context: typer.Context) -> None:
    """Look at the log and the store, and say what is wrong and what heals it. Exit code 1 if something is."""
    from deploy.doctor import examine

    here = session(context)
    with progress_bar("records", None) as advance:
        findings = list(examine(here.data, advance))
    rows = [{"part": finding.part, "found": finding.found, "heal": finding.heal} for finding in findings]
    show(rows, ("part", "found", "heal"), here.output)
    wrong = sum(bool(finding.heal) for finding in findings)
    if wrong:
        raise GiveUp(f"{wrong} of {len(findings)} looks found something wrong; the last column says what to do", FAILED)
    unseen = [finding.part for finding in findings if finding.is_blind]
    if unseen:
        note(f"Nothing is wrong with the rest; the {' and the '.join(unseen)} was not looked at: {BESIDE_A_SERVER}.")
        return
    note("Nothing is wrong.")
