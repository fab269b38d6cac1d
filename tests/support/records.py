"""Records and decisions for tests of the aggregator: short to write, real in every byte."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aggregator.engine.pipeline import Committed, Engine
from aggregator.store.database import Settings
from aggregator.store.store import Store, prepare_partitions
from meters.catalogue.catalogue import (
    Change,
    MeterCreated,
    Organization,
    OrganizationCreated,
    encode_change,
    encode_changes,
)
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Log, Record
from meters.meter import Meter, new_meter

ORGANIZATION = "b0c3f6b4-6a39-4b0e-9b5e-0f6d1d9a7b11"
OTHER_ORGANIZATION = "5d1f7a52-8f4e-4d6c-8a55-0d5d6f0f9a22"
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
NOW_US = int(NOW.timestamp()) * 1_000_000
SMALL = Settings(memory_limit="512MB", threads=1)
CAUGHT_UP_TIMEOUT_S = 30
LOOK_AGAIN_S = 0.05  # not every change announces itself


def line(external_id: str | None = None, **fields: Any) -> bytes:
    """An event as JSON; ``metadata`` may be given as text to keep its tokens."""
    event = {"name": "call", "external_customer_id": "ann", **fields}
    if external_id is not None:
        event["external_id"] = external_id
    metadata = event.pop("metadata", {})
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    return json.dumps(event).encode()[:-1] + b', "metadata": ' + text.encode() + b"}"


def record(*lines: bytes, offset: int = 0, organization_id: str | None = ORGANIZATION, admitted: bool = True) -> Record:
    """A record of the events stream, ingested at NOW."""
    return Record(0, offset, NOW_US, b"\n".join(lines), organization_id, admitted)


def entry(*lines: bytes, organization_id: str | None = ORGANIZATION, admitted: bool = True) -> Entry:
    """The same as something to append."""
    return Entry(b"\n".join(lines), 0, organization_id, admitted)


def decisions(changes: Iterable[Change]) -> list[Entry]:
    """Control records."""
    return [Entry(encode_change(change), admitted=True) for change in changes]


def together(changes: Sequence[Change]) -> Entry:
    """One control record of them all."""
    return Entry(encode_changes(changes), admitted=True)


def organization(organization_id: str = ORGANIZATION) -> Change:
    """A tenant is made."""
    return OrganizationCreated(Organization(organization_id, "test", NOW))


def meter(id: str, filter: dict[str, Any] | None = None, **aggregation: Any) -> Meter:
    """A meter of the test organization; everything counts by default."""
    body = {
        "name": f"meter {id}",
        "filter": filter or {"conjunction": "and", "clauses": []},
        "aggregation": aggregation or {"func": "count"},
    }
    made = new_meter(body, id=id, organization_id=ORGANIZATION, created_at=NOW)
    assert isinstance(made, Meter)
    return made


def created(*meters: Meter) -> list[Change]:
    """The decisions that make meters."""
    return [MeterCreated(made) for made in meters]


class Running:
    """An engine that follows a log into a store file, and can be awaited."""

    def __init__(self, log: Log, path: Path) -> None:
        identities = {stream: log.identity(stream) for stream in (USAGE_EVENTS, USAGE_CONTROL)}
        store = Store.open(path, identities, SMALL)
        for stream in identities:
            prepare_partitions(store, stream, list(log.ends(stream)))
        self._log, self.path = log, path
        self._moved = threading.Condition()
        self.engine = Engine(log, store, self._observe)

    def __enter__(self) -> "Running":
        self.engine.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.engine.stop()

    def _observe(self, committed: Committed) -> None:
        with self._moved:
            self._moved.notify_all()

    def catch_up(self) -> Engine:
        """Wait until everything in the log is committed and counted."""
        self._until(lambda: dict(self.engine.as_of) == self._log.ends(USAGE_EVENTS))
        self._until(lambda: self.engine.control_position == self._log.ends(USAGE_CONTROL).get(0, 0))
        self._until(lambda: all(c.complete.is_set() for c in list(self.engine.totals._meters.values())))
        self._until(lambda: not self.engine.totals._waiting)
        return self.engine

    def _until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + CAUGHT_UP_TIMEOUT_S
        done = False
        self.engine.awaited.set()
        with self._moved:
            while not (done or self.engine.ended.is_set()) and time.monotonic() < deadline:
                done = self._moved.wait_for(reached, timeout=LOOK_AGAIN_S)
        if self.engine.failure is not None:
            raise self.engine.failure
        assert done, "the engine did not catch up"


def rows(store: Store, sql: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
    """Ask the store directly."""
    with store.read() as snapshot:
        return snapshot.connection.execute(sql, list(parameters)).fetchall()
