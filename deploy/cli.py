"""The console script ``meterstream``: every way to fail becomes one line and an exit code.

Commands are parsed by deploy/command_line.py, which loads all of them to know their options. The processes that should
be back soon after a crash do not wait for that: ``serve``, ``gateway`` and ``aggregate`` with plain options begin
here. Whatever is not plain (help, an unknown option, a number that is none) goes to the command line, which knows how
to say so; the options mean the same either way.
"""

import sys
from collections.abc import Sequence

from deploy.giving_up import BUG, DONE, FAILED, GiveUp
from deploy.settings import Settings, read_environment
from deploy.start import begin

NUMBERS = ("--port", "--lifeline", "--socket")
OPTIONS = {
    "serve": {"--data", "--log", "--token", "--host", "--port", "--lifeline"},
    "gateway": {"--data", "--log", "--token", "--host", "--port", "--upstream", "--lifeline", "--socket"},
    "aggregate": {"--data", "--log", "--token", "--host", "--port", "--lifeline"},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit code: 0, 1 failed, 2 wrong usage, 3 mismatch, 70 a bug of ours."""
    line = list(sys.argv[1:] if arguments is None else arguments)
    debug = False
    try:
        settings = read_environment()
        debug = settings.debug
        code = _run(line, settings)
    except GiveUp as reason:
        print(f"meterstream: {' '.join(str(reason).split())}", file=sys.stderr)
        code = reason.exit_code
    except Exception as error:
        if debug:
            raise
        outage = _outage(error)
        hint = "(METERSTREAM_DEBUG=1 shows where)"
        told = outage or f"a bug: {type(error).__name__}: {error} {hint}"
        print(f"meterstream: {' '.join(told.split())}", file=sys.stderr)
        code = FAILED if outage else BUG
    sys.exit(code or DONE)


def _outage(error: Exception) -> str | None:
    """What to say of an error that is nobody's fault. Kinds are told by name: their libraries load slowly."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "TransportError" in kinds:
        return (
            f"no server answers ({error}); start one with `meterstream serve`, or name it with --url (or "
            "METERSTREAM_URL)"
        )
    return f"the log does not answer: {error}; try again when it does" if "TryAgain" in kinds else None


def _run(line: list[str], settings: Settings) -> int | None:
    plain = plain_options(line)
    if plain is None:
        from deploy.command_line import run

        return run(line, settings)
    process, options = plain
    told = {name[2:]: value for name, value in options.items() if name not in ("--lifeline", "--socket")}
    lifeline, listener = (int(options[name]) if name in options else None for name in ("--lifeline", "--socket"))
    begin(process, settings.but(**told), lifeline, listener)
    return DONE


def plain_options(line: Sequence[str]) -> tuple[str, dict[str, str]] | None:
    """The process and its options, each ``--name value`` or ``--name=value``; None where it is not as plain as that."""
    names = [word for word in line if word in OPTIONS]
    if len(names) != 1:
        return None
    found: dict[str, str] = {}
    pending = iter([word for word in line if word != names[0]])
    for word in pending:
        name, equals, value = word.partition("=")
        value = value if equals else next(pending, "")
        is_fit = value.isascii() and value.isdigit() if name in NUMBERS else value and not value.startswith("-")
        if name not in OPTIONS[names[0]] or name in found or not is_fit:
            return None
        found[name] = value
    return names[0], found


if __name__ == "__main__":
    main()
