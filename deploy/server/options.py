"""The options of ``serve``, ``gateway`` and ``aggregate``, each declared once.

``PROCESSES`` is the table, and two modules read it. ``deploy/commands/operations.py`` makes commands of the command
line from it. ``deploy/cli.py`` starts a process from a plain line (``plain_options``) without loading the command
line: that takes as much CPU time as everything else that a gateway does until it listens
(benchmarks/profiles/README.md). So this module imports nothing heavy.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """An option of a process. The supervisor's own options are hidden; the others are settings of the same name."""

    name: str
    help: str
    is_number: bool = False
    is_hidden: bool = False


HOST = Option("host", "The address to listen on.")
PORT = Option("port", "The port to listen on; 0 takes a free one.", is_number=True)
UPSTREAM = Option("upstream", "The aggregator, http:// or https://HOST:PORT; else a socket.")
LIFELINE = Option("lifeline", "A pipe that closes when the supervisor is gone.", is_number=True, is_hidden=True)
SOCKET = Option("socket", "A listening socket that the supervisor opened.", is_number=True, is_hidden=True)

PROCESSES = {
    "serve": (HOST, PORT, LIFELINE),
    "gateway": (HOST, PORT, UPSTREAM, LIFELINE, SOCKET),
    "aggregate": (HOST, PORT, LIFELINE),
}
GLOBAL = ("data", "log", "token")  # of the options that every command takes, those that a process needs


def plain_options(line: Sequence[str]) -> tuple[str, dict[str, str]] | None:
    """Return the process and the values of its options by name; None where the line is not plain.

    A plain line names one process, and has each of its options at most once, as ``--name value`` or ``--name=value``.
    """
    names = [word for word in line if word in PROCESSES]
    if len(names) != 1:
        return None
    numbers = {option.name: option.is_number for option in PROCESSES[names[0]]} | dict.fromkeys(GLOBAL, False)
    found: dict[str, str] = {}
    pending = iter([word for word in line if word != names[0]])
    for word in pending:
        option, equals, value = word.partition("=")
        value = value if equals else next(pending, "")
        name = option.removeprefix("--")
        if name == option or name not in numbers or name in found or not _fits(value, numbers[name]):
            return None
        found[name] = value
    return names[0], found


def _fits(value: str, is_number: bool) -> bool:
    if is_number:
        return value.isascii() and value.isdigit()
    return bool(value) and not value.startswith("-")
