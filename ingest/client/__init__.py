"""The client: send usage events from an application, none lost and none counted twice.

    from ingest.client import Ingestion

    with Ingestion(TOKEN, base_url="https://meters.example.com") as ingestion:
        ingestion.ingest({"name": "call", "external_customer_id": "user-1", "metadata": {"tokens": 812}})

The client works with Meterstream and with Polar. It needs httpx and msgspec, and no part of the server.
"""

from ingest.client.event import Event, EventRefused, Limits, Rejection, SpoolFull
from ingest.client.ingestion import AsyncIngestion, Ingestion, Stats
from ingest.client.kafka import KafkaTransport
from ingest.client.strategy import Customer, Strategy

__all__ = [
    "AsyncIngestion", "Customer", "Event", "EventRefused", "Ingestion", "KafkaTransport", "Limits", "Rejection",
    "SpoolFull", "Stats", "Strategy",
]  # fmt: skip
