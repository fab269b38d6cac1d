"""``meterstream forward``: run the forwarder to Polar, show its status, pause, resume and replay.

The commands read and write the forwarder's state in the data directory through ``deploy.forwarding``.
"""

from typing import Annotated

import typer

from deploy.client import EPILOG, session
from deploy.console import note, show, show_one
from deploy.errors import USAGE, GiveUp

app = typer.Typer(help="Hand events on to a Polar organization (works on --data).")

Server = Annotated[str | None, typer.Option(help="production, sandbox, or a URL.")]
Lifeline = Annotated[int | None, typer.Option(hidden=True, help="A pipe that closes when the supervisor is gone.")]


@app.callback(invoke_without_command=True, epilog=EPILOG)
def run(context: typer.Context, server: Server = None, lifeline: Lifeline = None) -> None:
    """Hand events on to Polar until stopped; METERSTREAM_POLAR_TOKEN says to which organization."""
    if context.invoked_subcommand:
        return
    from aggregator.forward.polar_client import base_url
    from deploy.forwarding import run as forward
    from deploy.server.runtime import crashes_logged

    try:
        base_url(server or "production")
    except ValueError as error:
        raise GiveUp(f"--server: {error}", USAGE) from None
    with crashes_logged():
        forward(session(context).settings.but(polar_server=server), lifeline)


@app.command(epilog=EPILOG)
def status(context: typer.Context) -> None:
    """How far it got: what is pending, sent and refused, and what it waits for."""
    from deploy.forwarding import status as look

    here = session(context)
    show_one(look(here.data), here.output)


@app.command(epilog=EPILOG)
def pause(context: typer.Context) -> None:
    """Send nothing until resumed. What comes in meanwhile waits."""
    from deploy.forwarding import opened

    with opened(session(context).data) as state:
        state.set(paused=True)
    note("Nothing is sent any more; `meterstream forward resume` goes on.")


@app.command(epilog=EPILOG)
def resume(context: typer.Context) -> None:
    """Go on, after a pause or after what stopped it was mended."""
    from deploy.forwarding import now_us, opened

    with opened(session(context).data) as state:
        state.set(paused=None, resumed_us=now_us())
    note("Forwarding goes on.")


@app.command(epilog=EPILOG)
def adopt(
    context: typer.Context,
    begin: Annotated[
        str,
        typer.Option(
            "--from",
            help="Forward what came in since this time, such as 2026-03-01T00:00:00Z; beginning: all; now: only new.",
        ),
    ],
) -> None:
    """Continue forwarding from this log, after a restored or new log stopped it. Polar counts no event twice.

    Example: meterstream forward adopt --from 2026-03-01T00:00:00Z, the time of the backup that was restored.
    """
    from deploy.forwarding import ask_to_adopt

    ask_to_adopt(session(context).data, begin)
    note(f"Forwarding begins anew from {begin}; `meterstream forward status` shows how far it got.")


@app.command(epilog=EPILOG)
def replay(
    context: typer.Context,
    since: Annotated[str, typer.Option(help="From this time of the events on, such as 2026-03-01T00:00:00Z.")],
    until: Annotated[str, typer.Option(help="Up to this time, not included.")],
) -> None:
    """Send a range of time again, what was refused too. Polar knows what it has by its id, so nothing counts twice."""
    from deploy.forwarding import ask_replay

    here = session(context)
    number = ask_replay(here.data, since, until)
    show_one({"replay": number}, here.output)
    note("It is in line; `meterstream forward status` shows it until it is done.")


@app.command(epilog=EPILOG)
def dead(context: typer.Context, limit: Annotated[int, typer.Option(min=1, help="How many to show.")] = 100) -> None:
    """The events that Polar refuses, newest first, with its words."""
    from deploy.forwarding import dead_letters

    here = session(context)
    show(dead_letters(here.data, limit), ("refused_at", "external_id", "words", "event"), here.output)


@app.command(epilog=EPILOG)
def plan(context: typer.Context) -> None:
    """Whether the last day's traffic fits Polar's request limit as it is, and what a rollup would make of it."""
    from deploy.forwarding import plan as compute

    here = session(context)
    rows = compute(here.settings)
    show(rows, ("way", "events", "requests", "busiest_minute_requests", "fits", "about"), here.output)
