"""A client for an application's tests: ``RecordingIngestion`` sends nothing and records every event.

    ingestion = RecordingIngestion()
    charge(ingestion)
    assert ingestion.one("chat.completion")["metadata"]["tokens"] == 812

Events pass the same checks and get the same bytes as with ``Ingestion``; what is recorded is what would have been
sent.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import msgspec

from ingest.client.event import Event, EventRefused, Rejection, Unacceptable, seal
from ingest.client.strategy import S


class RecordingIngestion:
    """Stands in for ``Ingestion``. ``events`` are dicts as the server would read them, ``rejections`` the refused."""

    def __init__(self, *, strict: bool = False) -> None:
        self.events: list[dict[str, Any]] = []
        self.rejections: list[Rejection] = []
        self.is_closed = False
        self._strict = strict

    def ingest(self, event: Event | Mapping[str, Any]) -> str | None:
        """Remember the event; its id, or None when it was refused. Raises EventRefused in strict mode."""
        try:
            sealed = seal(event)
        except Unacceptable as problem:
            rejection = Rejection(event, None, problem.type, problem.loc, problem.msg, "capture")
            self.rejections.append(rejection)
            if self._strict:
                raise EventRefused(rejection) from None
            return None
        self.events.append(msgspec.json.decode(sealed.line))
        return sealed.external_id

    capture = ingest

    def strategy(self, strategy_class: type[S], event_name: str, **metadata: Any) -> S:
        """As ``Ingestion.strategy``."""
        return strategy_class(event_name, self, metadata)

    def named(self, name: str) -> list[dict[str, Any]]:
        """The events of this name, in order."""
        return [event for event in self.events if event["name"] == name]

    def one(self, name: str | None = None) -> dict[str, Any]:
        """The only event (of this name). AssertionError when there are none or several."""
        found = self.events if name is None else self.named(name)
        if len(found) != 1:
            raise AssertionError(f"expected one event, found {len(found)}: {[event['name'] for event in self.events]}")
        return found[0]

    def total(self, key: str, name: str | None = None) -> Any:
        """The sum of a metadata value over the events (of this name) that have it."""
        found = self.events if name is None else self.named(name)
        return sum(event["metadata"][key] for event in found if key in event.get("metadata", {}))

    def clear(self) -> None:
        """Forget everything."""
        self.events.clear()
        self.rejections.clear()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Nothing is ever on its way."""
        return True

    def close(self, timeout_s: float | None = None) -> None:
        """Remember that it was closed."""
        self.is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
