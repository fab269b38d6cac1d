"""The HTTP API of the aggregator: everything but ingestion. ``create_app`` is its only door."""

from aggregator.api.app import create_app

__all__ = ["create_app"]
