"""What the tests of the real libraries share: an endpoint to play back answers, and somewhere for events to go.

Every event is looked at here and sent on to the server that the outer test runs, under a name that tells the file it
came from; at the end a tally says what the meters must read there. Started by hand, without a server, nothing is sent.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime, tzinfo
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from ingest.client import Event, Ingestion, Rejection
from ingest.client.testing import RecordingIngestion
from tests.support.servers.vendor_endpoint import Replay

SERVER, TOKEN, TALLY = "STRATEGY_TESTS_SERVER", "STRATEGY_TESTS_TOKEN", "STRATEGY_TESTS_TALLY"
VERSIONS = "STRATEGY_TESTS_VERSIONS"
COUNTED = ("_llm.input_tokens", "_llm.output_tokens", "_llm.total_tokens", "cachedInputTokens", "_cost.amount", "bytes")
PATIENCE_S = 20.0


class Forwarding(RecordingIngestion):
    """Remembers events, and sends the same ones to a server."""

    def __init__(self, prefix: str, server: Ingestion | None, tally: Counter[str]) -> None:
        super().__init__()
        self._prefix, self._server, self._tally = prefix, server, tally
        self._known: set[str] = set()

    def ingest(self, event: Event | Mapping[str, Any]) -> str | None:
        """Remember and send."""
        external_id = super().ingest(event)
        if external_id is not None and external_id not in self._known:
            self._known.add(external_id)
            sent = self.events[-1]
            name = f"{self._prefix}.{sent['name']}"
            self._tally[f"{name} count"] += 1
            for key in COUNTED:
                part, _, inner = key.partition(".")
                value = sent["metadata"].get(part)
                value = value.get(inner) if inner and value else value
                if value is not None:
                    self._tally[f"{name} {key}"] += Decimal(str(value))  # type: ignore[assignment]
            if self._server is not None:
                self._server.ingest({**sent, "name": name, "external_id": f"{self._prefix}.{sent['external_id']}"})
        return external_id

    capture = ingest


@pytest.fixture(scope="session")
def server() -> Iterator[tuple[Ingestion | None, Counter[str]]]:
    """The way to the server, and the tally of what went there."""
    tally: Counter[str] = Counter()
    if SERVER not in os.environ:
        yield None, tally
        return
    rejections: list[Rejection] = []
    ingestion = Ingestion(os.environ[TOKEN], base_url=os.environ[SERVER], spool=None, on_rejected=rejections.append)
    yield ingestion, tally
    assert ingestion.flush(PATIENCE_S)
    ingestion.close()
    assert rejections == []
    told = json.dumps({name: str(total) for name, total in tally.items()})
    Path(os.environ[TALLY]).write_text(told, encoding="utf-8")


@pytest.fixture
def vendor() -> Iterator[Replay]:
    """A vendor's endpoint."""
    with Replay() as replay:
        yield replay


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noon in November 2026, for prices that go by the day or the hour."""
    from genai_prices import data_snapshot, types  # not installed where the outer tests run

    class Then(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Then":
            return cls(2026, 11, 25, 12, tzinfo=tz)

    for module in (data_snapshot, types):  # each asks for the time
        monkeypatch.setattr(module, "datetime", Then)


@pytest.fixture
def ingestion(request: pytest.FixtureRequest, server: tuple[Ingestion | None, Counter[str]]) -> RecordingIngestion:
    """Where events go."""
    versions = os.environ.get(VERSIONS, "newest")
    return Forwarding(f"{versions}.{Path(request.node.path).stem.removeprefix('vendor_')}", *server)
