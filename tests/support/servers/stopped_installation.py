"""A data directory as a stopped server leaves it, and hands that spoil it."""

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb

from aggregator.reconcile.report import Check, Report
from deploy.client import Session
from deploy.console import Output
from deploy.rebuild import rebuild
from deploy.reconcile.local import Task, reconcile
from deploy.reconcile.run import prove
from deploy.server.data import DataDirectory
from deploy.settings import Settings
from ingest.log import open_log
from meters.log import Log
from tests.support.records import Running

BEGIN = datetime(2026, 3, 1, 9, 50, tzinfo=UTC)


class Hours:
    """A clock of ingestion that moves on by ten minutes with every record."""

    def __init__(self) -> None:
        self.now = BEGIN

    def __call__(self) -> int:
        self.now += timedelta(minutes=10)
        return int(self.now.timestamp() * 1_000_000)


class Left:
    """The directory. ``written`` fills the log, then a real engine counts it and stops."""

    def __init__(self, path: Path) -> None:
        self.data = DataDirectory(path)
        self.data.make()

    @contextlib.contextmanager
    def log(self) -> Iterator[Log]:
        """The log, its clock the test's."""
        with contextlib.closing(open_log(str(self.data.path), clock_us=Hours())) as log:
            yield log

    def count(self) -> None:
        """Follow the log to its end, as a server would."""
        with self.log() as log, Running(log, self.data.store) as running:
            running.catch_up()

    def spoil(self, *statements: str) -> None:
        """Change the store behind everybody's back."""
        with contextlib.closing(duckdb.connect(str(self.data.store))) as connection:
            for statement in statements:
                connection.execute(statement)

    def rebuild(self) -> None:
        """The store again, from the log."""
        rebuild(self.data)

    def report(self, *checks: str) -> Report:
        """Reconcile; the log and the store by default."""
        here = Session(Settings(data=self.data.path), Output.json)
        return reconcile(here, Task(checks=checks or ("log", "store")))

    def check(self, name: str) -> Check:
        """One check."""
        (found,) = self.report(name).checks
        return found

    def between(self, since: datetime, until: datetime) -> Check:
        """The log check of a range."""
        here = Session(Settings(data=self.data.path), Output.json)
        (found,) = reconcile(here, Task(checks=("log",), since=since, until=until)).checks
        return found

    def prove(self, repair: str | None = None) -> Report:
        """Everything, as the command does it."""
        return prove(Session(Settings(data=self.data.path), Output.json), Task(repair=repair))
