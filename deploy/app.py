"""The command line: registers every command, and the options that all commands share.

The commands are in ``deploy.commands``, a file for each subject; what a command needs is imported when it runs.
``run`` parses the arguments and calls the command. ``global_options_first`` lets global options such as ``--output``
stand anywhere on the line: ``meterstream usage tokens --output json`` reads naturally.
"""

import errno
import inspect
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from deploy.client import EPILOG, Session
from deploy.commands import access, customers, events, forward, meters, operations, polar, reconcile, webhooks
from deploy.commands import customers as credit_commands
from deploy.commands import kafka as kafka_commands
from deploy.console import Output
from deploy.errors import FAILED, USAGE, GiveUp, unwritable
from deploy.settings import Settings

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a limit: nothing else that is written is unnamed
GLOBAL_OPTIONS = ("--url", "--token", "--data", "--log", "--output")

app = typer.Typer(
    name="meterstream", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=True, epilog=EPILOG,
    help="Usage metering that counts every event exactly once and can explain every number it shows.",
)


def _show_version(context: typer.Context, wanted: bool) -> None:
    if wanted:
        context.obj = Session(context.obj, Output.table)
        operations.version(context)
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    url: Annotated[str | None, typer.Option(help="Where the server is, such as http://127.0.0.1:8000.")] = None,
    token: Annotated[str | None, typer.Option(help="The organization's access token.")] = None,
    data: Annotated[str | None, typer.Option(help="The directory of the store, and of a log that is a file.")] = None,
    log: Annotated[str | None, typer.Option(help="kafka://HOST:PORT; without it, a file in the data.")] = None,
    output: Annotated[Output, typer.Option(help="How to show the answer.")] = Output.table,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """What every command takes."""
    settings: Settings = context.obj
    context.obj = Session(settings.but(url=url, token=token, data=data, log=log), output)


app.command(epilog=EPILOG)(operations.serve)
app.command(epilog=EPILOG)(operations.gateway)
app.command(epilog=EPILOG)(operations.aggregate)
app.command(epilog=EPILOG)(operations.demo)
app.add_typer(events.app, name="events")
app.add_typer(meters.app, name="meters")
app.add_typer(customers.app, name="customers")
app.add_typer(credit_commands.credit_app, name="credits")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(polar.app, name="polar")
app.command(epilog=EPILOG)(meters.usage)
app.add_typer(access.organization_app, name="orgs")
app.add_typer(access.token_app, name="tokens")
app.add_typer(forward.app, name="forward")
app.add_typer(kafka_commands.app, name="kafka")
app.command(epilog=EPILOG)(kafka_commands.lag)
app.command(epilog=EPILOG)(operations.rebuild)
app.command(epilog=EPILOG, name="skip-lost")(operations.skip_lost)
app.command(epilog=EPILOG)(operations.backup)
app.command(epilog=EPILOG)(operations.restore)
app.command(epilog=EPILOG)(operations.doctor)
app.command(epilog=EPILOG)(reconcile.reconcile)
app.command(epilog=EPILOG)(operations.version)


def _let_help_flow(group: typer.Typer) -> None:
    """Remove the line breaks within paragraphs of help: Typer keeps those of every paragraph but the first."""
    for command in group.registered_commands:
        paragraphs = (inspect.getdoc(command.callback) or "").split("\n\n")
        command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            _let_help_flow(inner.typer_instance)


_let_help_flow(app)


def global_options_first(arguments: Sequence[str]) -> list[str]:
    """The same line with the global options in front, where the parser looks for them. ``--`` ends the search.

    Raises GiveUp for one without its value, which would otherwise take a command for it.
    """
    front: list[str] = []
    rest: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        if argument == "--":
            rest += [argument, *pending]
        elif argument in GLOBAL_OPTIONS:
            value = next(pending, "--")
            if value.startswith("--"):
                raise GiveUp(f"{argument} needs a value", USAGE)
            front += [argument, value]
        elif argument.startswith(tuple(f"{option}=" for option in GLOBAL_OPTIONS)):
            front.append(argument)
        else:
            rest.append(argument)
    return front + rest


def run(arguments: Sequence[str], settings: Settings) -> int | None:
    """Parse and run one command; its exit code. Raises GiveUp, and whatever a bug raises."""
    try:
        code: int | None = app(
            args=global_options_first(arguments), prog_name="meterstream", standalone_mode=False, obj=settings
        )
    except typer.TyperException as error:
        if message := error.format_message():  # there is none where the parser has printed the help instead
            print(f"meterstream: {message}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            raise GiveUp(unwritable(error)) from None
        raise
    except typer.Abort:
        return FAILED
    return code
