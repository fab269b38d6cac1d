"""Ids for events that a file gives none: made from what a line says, so that sending it again counts nothing twice.

An id is a digest of the content and the number of its occurrence among equal lines of the file. A file that has grown,
or of which some lines were mended, so repeats what was there, and two equal lines of one file are two events. Neither
the file's name nor the line's number is part of it: an equal line of another file is the same event.

Occurrences are counted in a temporary file, since a log of usage may have more lines than fit into memory.
"""

import hashlib
import sqlite3
import uuid
from contextlib import closing
from types import TracebackType

from deploy.giving_up import GiveUp

DIGEST_BYTES = 16  # no two contents will ever share it
CACHE_KIB = 32 * 1024  # what counting takes of memory; more lies in the temporary file


class StableIds:
    """Gives each content of one file its ids. A context manager."""

    def __init__(self, apart: str = "") -> None:
        """``apart`` tells events that are meant to be others from those whose lines say the same."""
        self._apart = apart.encode() + b"\0" if apart else b""
        self._counts = sqlite3.connect("", isolation_level=None)  # no name: SQLite removes it by itself
        for setting in (f"cache_size = -{CACHE_KIB}", "journal_mode = OFF", "synchronous = OFF"):
            self._counts.execute(f"PRAGMA {setting}")
        self._counts.execute("CREATE TABLE seen (content BLOB PRIMARY KEY, times INTEGER) WITHOUT ROWID")
        self._counts.execute("BEGIN")  # one transaction for all: nothing of it has to outlive the command

    def __enter__(self) -> "StableIds":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._counts.close()

    def next(self, content: bytes) -> str:
        """The id of a line that says this: of its first occurrence, then of its second, and so on. Raises GiveUp."""
        digest = hashlib.sha256(self._apart + content).digest()[:DIGEST_BYTES]
        try:
            with closing(self._counts.execute(
                "INSERT INTO seen VALUES (?, 1) ON CONFLICT DO UPDATE SET times = times + 1 RETURNING times", (digest,)
            )) as counted:
                times: int = counted.fetchone()[0]
        except sqlite3.Error as error:
            raise GiveUp(f"the temporary directory cannot be written: {error}; name another one with TMPDIR") from None
        return f"{digest.hex()}:{times}"


def never_again() -> str:
    """A value for ``apart`` that nothing else will ever have."""
    return uuid.uuid4().hex
