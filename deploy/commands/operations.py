"""Commands for processes and the store: ``serve``, ``gateway``, ``aggregate``, ``demo``, ``rebuild``, ``skip-lost``,
``backup``, ``restore``, ``doctor``.

Each command sets the options over the settings and calls ``deploy.server``, ``deploy.demo``, ``deploy.rebuild``,
``deploy.backup`` or ``deploy.doctor``.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.client import session
from deploy.console import Output, note, progress_bar, show, show_one
from deploy.errors import FAILED, GiveUp
from deploy.server.options import PROCESSES
from deploy.server.start import begin

# Processes and the demonstration.


def _command(process: str, help: str) -> Callable[..., None]:
    """Make the command that runs a process. Typer reads the command's options from the signature."""
    def command(context: typer.Context, **given: Any) -> None:
        lifeline, listener = given.pop("lifeline"), given.pop("socket", None)
        begin(process, session(context).settings.but(**given), lifeline, listener)

    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for option in PROCESSES[process]:
        shown = typer.Option(help=option.help, hidden=option.is_hidden)
        annotation: object = Annotated[int | None, shown] if option.is_number else Annotated[str | None, shown]
        parameters.append(
            inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # which inspect looks for
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__name__, command.__doc__ = process, help
    return command


serve = _command(
    "serve", "Run Meterstream: gateway and aggregator together. The first start makes an organization and a token."
)
gateway = _command("gateway", "Run the gateway alone: takes events into the log, passes reads on to the aggregator.")
aggregate = _command("aggregate", """Run the aggregator alone: follows the log into the store and answers queries.

    With its log on Kafka it answers on --host and --port, for gateways elsewhere; else on a socket in the data.
    """)


def demo(
    context: typer.Context,
    trace: Annotated[Path | None, typer.Option(help="A CSV file: TIMESTAMP, ContextTokens, GeneratedTokens.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Take only the first rows.")] = None,
) -> None:
    """Meter an LLM trace end to end and check every total against a plain recount; exit code 3 if one differs.

    The trace is --trace; without it a copy of the real one, if there is any here, and else one that is generated.
    """
    from deploy.demo import run

    run(trace, rows)


def version(context: typer.Context) -> None:
    """The version."""
    from importlib.metadata import version as installed

    here = session(context)
    number = installed("meterstream")
    if here.output is Output.table:
        typer.echo(f"meterstream {number}")
    else:
        show_one({"version": number}, here.output)


# The store.

BESIDE_A_SERVER = "stop the server for that, or compare beside it with `meterstream reconcile`"


def rebuild(context: typer.Context) -> None:
    """Make the store again from the log: beside the old one, then in its place. No server may run meanwhile."""
    from deploy.rebuild import rebuild as run
    from deploy.server.runtime import configure_logs

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
    from deploy.rebuild import skip_lost as run

    here = session(context)
    lost = run(here.data, sure=yes)
    rows = [each._asdict() | {"records": each.start - each.position} for each in lost]
    show(rows, ("stream", "partition", "position", "start", "records"), here.output)
    records = sum(row["records"] for row in rows)
    if records and not yes:
        raise GiveUp(f"{records} records would never be counted; --yes accepts that", FAILED)
    note(f"{records} records are skipped; the aggregator can go on." if records else "Nothing is lost.")


def backup(
    context: typer.Context, directory: Annotated[Path, typer.Argument(help="A new or empty directory.")]
) -> None:
    """Copy the log and the forwarder's file, and the store if no server runs. Works while a server runs.

    Example: meterstream backup /backups/2026-03-01. The copies hold webhook secrets; only their owner may read them.
    """
    from deploy.backup import back_up

    here = session(context)
    made = back_up(here.data, directory)
    show([{"file": each.name, "bytes": each.size} for each in made.files], ("file", "bytes"), here.output)
    note(f"The backup in {directory} is whole, up to position {made.ends['usage.events'] or '0:0'} of usage.events.")
    if here.data.store.name not in [each.name for each in made.files]:
        note("The store is not in it: the first start after a restore rebuilds it from the log.")


def restore(
    context: typer.Context, directory: Annotated[Path, typer.Argument(help="What `meterstream backup` made.")]
) -> None:
    """Put a backup in place of what is here, after checking all of it. No server may run meanwhile.

    Example: meterstream restore /backups/2026-03-01. The files that were here are kept beside the restored ones.
    """
    from deploy.backup import restore as run
    from meters.timestamps import utc_text

    here = session(context)
    made, aside = run(here.data, directory)
    show_one({"made_at": utc_text(made.made_at), "usage.events": made.ends["usage.events"]}, here.output)
    if aside is not None:
        note(f"What was here before is in {aside}.")
    if not here.data.store.exists():
        note("The store is not in the backup: the next start rebuilds it from the log.")
    if not here.data.forwarding.exists():
        note("The backup has no state of a forwarder: forwarding begins as METERSTREAM_POLAR_FROM says.")


def doctor(context: typer.Context) -> None:
    """Check the log, the store and the forwarder's file, and say what is wrong and how to fix it.

    Exit code 1 if something is wrong. While a server runs its store cannot be checked here: stop the server, or use
    `meterstream reconcile`.

    Example: meterstream doctor --data ./data
    """
    from deploy.doctor import examine

    here = session(context)
    with progress_bar("records", None) as advance:
        findings = list(examine(here.data, advance))
    rows = [{"part": finding.part, "found": finding.found, "heal": finding.heal} for finding in findings]
    show(rows, ("part", "found", "heal"), here.output)
    wrong = sum(bool(finding.heal) for finding in findings)
    if wrong:
        found = f"{wrong} of {len(findings)} checks found something wrong"
        raise GiveUp(f"{found}; the last column says what to do", FAILED)
    unseen = [finding.part for finding in findings if finding.is_blind]
    if unseen:
        note(f"Nothing is wrong with the rest; the {' and the '.join(unseen)} was not looked at: {BESIDE_A_SERVER}.")
        return
    note("Nothing is wrong.")
