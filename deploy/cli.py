"""The console script ``meterstream``: every command hangs here, and every way to fail becomes one line.

The commands live in deploy/commands, by noun. What a command needs is imported when it runs, so that the gateway,
which is started again after every crash, does not load the rest first.

The global options may stand anywhere on the line: ``meterstream usage tokens --output json`` reads naturally, and so
does the other order.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from deploy.commands import credits as credit_commands
from deploy.commands import (
    customers,
    events,
    forward,
    meters,
    organizations,
    process,
    reconcile,
    store,
    tokens,
    usage,
    webhooks,
)
from deploy.commands import kafka as kafka_commands
from deploy.giving_up import BUG, DONE, FAILED, GiveUp
from deploy.output import Output
from deploy.session import EPILOG, Session
from deploy.settings import Settings, read_environment

GLOBAL_OPTIONS = ("--url", "--token", "--data", "--log", "--output")

app = typer.Typer(
    name="meterstream", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=True, epilog=EPILOG,
    help="Usage metering that counts every event exactly once and can explain every number it shows.",
)


@app.callback()
def options(
    context: typer.Context,
    url: Annotated[str | None, typer.Option(help="Where the server is, such as http://127.0.0.1:8000.")] = None,
    token: Annotated[str | None, typer.Option(help="The organization's access token.")] = None,
    data: Annotated[str | None, typer.Option(help="The directory of the store, and of a log that is a file.")] = None,
    log: Annotated[str | None, typer.Option(help="kafka://HOST:PORT; without it, a file in the data.")] = None,
    output: Annotated[Output, typer.Option(help="How to show the answer.")] = Output.table,
) -> None:
    """What every command takes."""
    settings: Settings = context.obj
    context.obj = Session(settings.but(url=url, token=token, data=data, log=log), output)


app.command(epilog=EPILOG)(process.serve)
app.command(epilog=EPILOG)(process.gateway)
app.command(epilog=EPILOG)(process.aggregate)
app.command(epilog=EPILOG)(process.demo)
app.add_typer(events.app, name="events")
app.add_typer(meters.app, name="meters")
app.add_typer(customers.app, name="customers")
app.add_typer(credit_commands.app, name="credits")
app.add_typer(webhooks.app, name="webhooks")
app.command(epilog=EPILOG)(usage.usage)
app.add_typer(organizations.app, name="orgs")
app.add_typer(tokens.app, name="tokens")
app.add_typer(forward.app, name="forward")
app.add_typer(kafka_commands.app, name="kafka")
app.command(epilog=EPILOG)(kafka_commands.lag)
app.command(epilog=EPILOG)(store.rebuild)
app.command(epilog=EPILOG, name="skip-lost")(store.skip_lost)
app.command(epilog=EPILOG)(store.doctor)
app.command(epilog=EPILOG)(reconcile.reconcile)
app.command(epilog=EPILOG)(process.version)


def global_options_first(arguments: Sequence[str]) -> list[str]:
    """The same line with the global options in front, where the parser looks for them. ``--`` ends the search."""
    front: list[str] = []
    rest: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        if argument == "--":
            rest += [argument, *pending]
        elif argument in GLOBAL_OPTIONS:
            front += [argument, *(value for value in [next(pending, None)] if value is not None)]
        elif argument.startswith(tuple(f"{option}=" for option in GLOBAL_OPTIONS)):
            front.append(argument)
        else:
            rest.append(argument)
    return front + rest


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit code: 0, 1 failed, 2 wrong usage, 3 mismatch, 70 a bug of ours."""
    line = global_options_first(sys.argv[1:] if arguments is None else arguments)
    debug = False
    try:
        settings = read_environment()
        debug = settings.debug
        code = app(args=line, prog_name="meterstream", standalone_mode=False, obj=settings)
    except GiveUp as reason:
        code = _complain(" ".join(str(reason).split()), reason.exit_code)
    except typer.TyperException as error:
        code = _complain(error.format_message(), error.exit_code)
    except typer.Abort:
        code = FAILED
    except Exception as error:
        if debug:
            raise
        code = _complain(f"a bug: {type(error).__name__}: {error} (METERSTREAM_DEBUG=1 shows where)", BUG)
    sys.exit(code or DONE)


def _complain(message: str, code: int) -> int:
    """Print why, and return the code. There is no message where the parser has printed the help instead."""
    if message:
        print(f"meterstream: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
