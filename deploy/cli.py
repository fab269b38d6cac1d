"""The console script ``meterstream``: every failure becomes one line and an exit code.

``main`` maps exceptions to messages and exit codes. It hands most commands to ``deploy.app``, which imports all
commands to know their options. ``serve``, ``gateway`` and ``aggregate`` with plain options
(``deploy.server.options``) start here without that, because they should be back soon after a crash. Help, unknown
options and invalid values go to ``deploy.app``; options mean the same on both ways.
"""

import os
import signal
import sys
from collections.abc import Sequence

from deploy.errors import BUG, DONE, FAILED, INTERRUPTED, USAGE, GiveUp, unwritable

TYPE_CHECKING = False  # not taken from typing: to load that takes most of the time before main can hear of Ctrl-C
if TYPE_CHECKING:
    from deploy.settings import Settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit code.

    0 done, 1 failed, 2 wrong usage, 3 mismatch, 70 a bug of ours, 130 ended by Ctrl-C, SIGTERM or SIGHUP.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # some libraries do not survive an exception while they load
    try:
        code, words = _outcome(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        code, words = INTERRUPTED, ""
    lost = _unwritten()
    if lost is not None:
        code, words = FAILED, words if lost in words else f"{words}; {lost}".strip("; ")
    if words:
        print(f"meterstream: {' '.join(words.split())}", file=sys.stderr)
    sys.exit(code)


def _outcome(line: list[str]) -> tuple[int, str]:
    """The exit code of a command, and what there is to say of how it ended."""
    debug = False
    try:
        _take_any_text()
        from deploy.settings import read_environment

        settings = read_environment()
        debug = settings.debug
        return _run(line, settings) or DONE, ""
    except GiveUp as reason:
        return reason.exit_code, str(reason)
    except Exception as error:
        if debug:
            raise
        known = _nobodys_fault(error)
        if known is not None:
            return known.exit_code, str(known)
        return BUG, f"a bug: {type(error).__name__}: {error} (METERSTREAM_DEBUG=1 shows where)"


def _take_any_text() -> None:
    """Have escapes written for what the terminal's encoding lacks, rather than nothing at all."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by whoever started this
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # both are what Python opened


def _unwritten() -> str | None:
    """What there is to say where the answer is lost; nothing of a reader that went away by itself, such as head."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left at its end
        return "" if isinstance(error, BrokenPipeError) else unwritable(error)
    return None


def _nobodys_fault(error: Exception) -> GiveUp | None:
    """What to say of an error that is no bug. Kinds are told by name: their libraries load slowly."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "TransportError" in kinds:
        return GiveUp(
            f"no server answers ({error}); start one with `meterstream serve`, or name it with --url (or "
            "METERSTREAM_URL)"
        )
    if "UnicodeEncodeError" in kinds:
        return GiveUp("an argument, or what a command was given to read, is no text (UTF-8)", USAGE)
    if "TryAgain" in kinds:
        return GiveUp(f"the log does not answer: {error}; try again when it does")
    if type(error).__module__ == "meters.log":  # PositionLost, or Refused, which is a name in other rooms, too
        return GiveUp(f"the log cannot be used: {error}; `meterstream doctor` looks closer")
    return None


def _run(line: list[str], settings: "Settings") -> int | None:
    from deploy.server.options import plain_options

    plain = plain_options(line)
    if plain is None:
        from deploy.app import run

        _hear_interruptions(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        return run(line, settings)
    process, options = plain
    lifeline, listener = (int(options.pop(name)) if name in options else None for name in ("lifeline", "socket"))
    from deploy.server.start import begin

    _hear_interruptions(signal.SIGINT)
    begin(process, settings.but(**options), lifeline, listener)
    return DONE


def _hear_interruptions(*numbers: signal.Signals) -> None:
    """Have Ctrl-C, or another signal, end what runs now in its own way, rather than the process at once."""
    for number in numbers:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


if __name__ == "__main__":
    main()
