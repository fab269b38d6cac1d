"""A spool's newest events: a file of lines, each there for good, whatever ends the process, once ``append`` returns.

Writing a line costs two microseconds, a transaction of SQLite's ten; and most events are acknowledged so soon that
they need never get into SQLite. A line is ``+NUMBER EVENT``, or ``-NUMBER LAST``: the events from NUMBER to LAST are
needed no more. A line that its process did not live to finish has no newline; what a power cut took away reads as
zeros, which no event has in it. Neither is an event. The file is emptied whenever nothing in it is needed.

It has no lock of its own: who holds the spool's SQLite file holds this one, too.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Iterable, Sequence
from io import FileIO
from itertools import islice
from pathlib import Path

logger = logging.getLogger(__name__)

SUFFIX = ".journal"  # "-journal" would be SQLite's own

_EVENTS_MAX = 10_000  # needed ones: some 30 ms to move, and more than wait while a server keeps up
_BYTES_MAX = 16 << 20  # of what is needed and what is not: read within a tenth of a second by who takes it over

Row = tuple[int, bytes]


class Journal:
    """The file, and in memory what is needed of it. Every method but ``drop`` raises OSError when the disk fails."""

    def __init__(self, spool: Path) -> None:
        self._path = Path(f"{spool}{SUFFIX}")
        self._path.touch(mode=0o600)
        self._file = FileIO(self._path, "r+")
        self._descriptor = self._file.fileno()
        *lines, unfinished = self._file.readall().split(b"\n")
        self._bytes = self._file.seek(-len(unfinished), os.SEEK_END)
        self.needed: dict[int, bytes] = _needed(lines)

    def append(self, number: int, line: bytes) -> None:
        """Write one event; its number is larger than any before."""
        self._write(b"+%d %b\n" % (number, line))
        self.needed[number] = line

    def is_full(self) -> bool:
        """Whether what is needed should move elsewhere, so that the file can be emptied."""
        return len(self.needed) >= _EVENTS_MAX or self._bytes >= _BYTES_MAX

    def after(self, number: int, limit: int) -> list[Row]:
        """The next events that are needed after a number, in order."""
        return list(islice((row for row in self.needed.items() if row[0] > number), limit))

    def settle(self, numbers: Sequence[int]) -> None:
        """These events, which were needed until now, are needed no more."""
        if len(numbers) < len(self.needed):
            self._write(b"".join(b"-%d %d\n" % each for each in ranges(numbers)))
        for number in numbers:
            del self.needed[number]
        if not self.needed:
            self.clear()

    def clear(self) -> None:
        """Nothing in it is needed."""
        self.needed.clear()
        self._file.truncate(0)
        self._bytes = self._file.seek(0)

    def remove(self) -> None:
        """Close the file, and delete it."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def drop(self) -> None:
        """Close the file as it is."""
        self._file.close()

    def _write(self, lines: bytes) -> None:
        written = os.write(self._descriptor, lines)
        if written != len(lines):
            self._file.seek(self._bytes)
            with contextlib.suppress(OSError):  # or what is there of these would be read as lines behind the next ones
                self._file.truncate()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._bytes += written


def ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """These numbers, first to last: in one piece if they are one, or else one by one."""
    first, last = min(numbers), max(numbers)
    return [(first, last)] if last - first + 1 == len(numbers) else [(number, number) for number in numbers]


def _needed(lines: Iterable[bytes]) -> dict[int, bytes]:
    """What the lines of a journal leave to be done."""
    needed: dict[int, bytes] = {}
    for line in lines:
        number, _, rest = line.partition(b" ")
        if 0 in line or not number[1:].isdigit():
            logger.warning("a line of a spool's journal is damaged")
        elif number[:1] == b"+":
            needed[int(number)] = rest
        elif number[:1] == b"-" and rest.isdigit():
            for settled in range(-int(number), int(rest) + 1):
                needed.pop(settled, None)
    return needed
