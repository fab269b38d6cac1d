"""The processes: the whole, its two halves, and the demonstration."""

from pathlib import Path
from typing import Annotated

import typer

from deploy.output import Output, show_one
from deploy.session import session
from deploy.start import begin

Host = Annotated[str | None, typer.Option(help="The address to listen on.")]
Port = Annotated[int | None, typer.Option(help="The port to listen on; 0 takes a free one.")]
Upstream = Annotated[str | None, typer.Option(help="The aggregator, http:// or https://HOST:PORT; else a socket.")]
Lifeline = Annotated[int | None, typer.Option(hidden=True, help="A pipe that closes when the supervisor is gone.")]
Socket = Annotated[int | None, typer.Option(hidden=True, help="A listening socket that the supervisor opened.")]


def serve(context: typer.Context, host: Host = None, port: Port = None, lifeline: Lifeline = None) -> None:
    """Run Meterstream: gateway and aggregator together. The first start makes an organization and a token."""
    begin("serve", session(context).settings.but(host=host, port=port), lifeline)


def gateway(
    context: typer.Context, host: Host = None, port: Port = None, upstream: Upstream = None,
    lifeline: Lifeline = None, socket: Socket = None,
) -> None:  # fmt: skip
    """Run the gateway alone: takes events into the log, passes reads on to the aggregator."""
    begin("gateway", session(context).settings.but(host=host, port=port, upstream=upstream), lifeline, socket)


def aggregate(
    context: typer.Context, host: Host = None, port: Port = None, lifeline: Lifeline = None
) -> None:
    """Run the aggregator alone: follows the log into the store and answers queries.

    With its log on Kafka it answers on --host and --port, for gateways elsewhere; else on a socket in the data.
    """
    begin("aggregate", session(context).settings.but(host=host, port=port), lifeline)


def demo(
    context: typer.Context,
    trace: Annotated[Path | None, typer.Option(help="A CSV file: TIMESTAMP, ContextTokens, GeneratedTokens.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Take only the first rows.")] = None,
) -> None:
    """Meter an LLM trace end to end and check every total against a plain recount; exit code 3 if one differs.

    The trace is --trace; without it a copy of the real one, if there is any here, and else one that is generated.
    """
    from deploy.demo.run import run

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
