"""Transactions and errors of the forwarder's SQLite files.

``transaction`` commits all or nothing. ``explaining`` turns an SQLite error into ``Unusable`` with advice: either the
file is damaged, and a person must restore it, because nothing else knows what was sent; or the machine cannot serve
it at the moment, and the caller retries. All other errors are bugs and propagate.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

MEND = (
    "stop everything and restore it from a backup, or move it away with its -wal and -shm; without it everything is "
    "sent again, which raw events survive, but rollups may count twice"
)
MAKE_ROOM = "make room on its disk, or run this as the user that the server runs as"


class Unusable(Exception):
    """The file cannot be read or written. The message says what heals it, and so does ``heal`` by itself.

    ``is_damaged``: trying again gives the same.
    """

    def __init__(self, path: Path, error: Exception | str, *, is_damaged: bool) -> None:
        self.found = f"{path} {'is damaged' if is_damaged else 'cannot be used now'} ({error})"
        self.heal = MEND if is_damaged else MAKE_ROOM
        self.is_damaged = is_damaged
        super().__init__(f"{self.found}: {self.heal}")


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Around whatever uses the file: says what an error means. Raises Unusable."""
    try:
        yield
    except sqlite3.OperationalError as error:  # locked, disk full, I/O
        raise Unusable(path, error, is_damaged=False) from error
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError:  # its other kinds are wrong statements
            raise
        raise Unusable(path, error, is_damaged=True) from error


@contextlib.contextmanager
def transaction(file: sqlite3.Connection, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
    """All of what is written inside, or none of it."""
    file.execute(begin)
    try:
        yield
        file.execute("COMMIT")
    except BaseException:
        if file.in_transaction:  # a full disk has ended it already
            file.execute("ROLLBACK")
        raise
