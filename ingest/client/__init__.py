"""The client: usage events from an application to the server, none lost and none counted twice.

    from ingest.client import Ingestion

    with Ingestion(TOKEN, base_url="https://meters.example.com") as ingestion:
        ingestion.ingest({"name": "call", "external_customer_id": "user-1", "metadata": {"tokens": 812}})

It speaks to Meterstream and to Polar alike. It needs httpx and msgspec, and nothing of the server.
"""

from ingest.client.event import Event, EventRefused, Limits, Rejection, SpoolFull
from ingest.client.ingestion import AsyncIngestion, Ingestion, Stats
from ingest.client.kafka import KafkaTransport
from ingest.client.strategy import Customer, Strategy

__all__ = [
    "AsyncIngestion", "Customer", "Event", "EventRefused", "Ingestion", "KafkaTransport", "Limits", "Rejection",
    "SpoolFull", "Stats", "Strategy",
]  # fmt: skip
