"""Errors of commands, and the exit codes.

A command that cannot go on raises ``GiveUp``: one line for the person, one exit code for scripts. ``deploy.cli``
prints the line and exits.
"""

DONE = 0
FAILED = 1  # the world said no: no server, no permission, a refused event
USAGE = 2  # the command itself is wrong; nothing was tried
MISMATCH = 3  # two ways to count gave different numbers
INTERRUPTED = 130  # Ctrl-C, as shells count it
BUG = 70  # what should not happen, as sysexits.h counts it


class GiveUp(Exception):
    """Stop, print the message and leave with the exit code. The message says what is wrong and what to do about it."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def unwritable(error: OSError) -> str:
    """What to say where standard output does not take the answer."""
    return f"the answer cannot be written: {error.strerror}"
