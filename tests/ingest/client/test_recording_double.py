"""The recorder for tests of applications: what it shows is what would have been sent."""

import pytest

from ingest.client import EventRefused
from ingest.client.strategies.delta_time import DeltaTime
from ingest.client.testing import RecordingIngestion


def test_it_remembers_what_would_be_sent() -> None:
    """By name, alone, and added up; values as they travel."""
    with RecordingIngestion() as ingestion:
        for tokens in (1, 2):
            metadata = {"tokens": tokens, "gone": None}
            ingestion.ingest({"name": "call", "external_customer_id": "u", "metadata": metadata})
        ingestion.strategy(DeltaTime, "task", plan="pro").start("u").stop()

    assert [event["metadata"] for event in ingestion.named("call")] == [{"tokens": 1}, {"tokens": 2}]
    assert ingestion.total("tokens", "call") == ingestion.total("tokens") == 3
    assert ingestion.one("task")["metadata"]["plan"] == "pro"
    assert ingestion.is_closed
    with pytest.raises(AssertionError, match="found 2"):
        ingestion.one("call")


def test_it_refuses_what_would_be_refused() -> None:
    """Into a list, or raised in strict mode; cleared when asked."""
    ingestion = RecordingIngestion()
    assert ingestion.ingest({"name": "call"}) is None
    assert [rejection.type for rejection in ingestion.rejections] == ["missing"]
    ingestion.clear()
    assert ingestion.rejections == []
    assert ingestion.flush()

    with pytest.raises(EventRefused, match="external_customer_id"):
        RecordingIngestion(strict=True).ingest({"name": "call"})
