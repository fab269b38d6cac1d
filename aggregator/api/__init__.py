"""The HTTP API of the aggregator: everything except ingestion. Use it through ``create_app``."""

from aggregator.api.app import create_app

__all__ = ["create_app"]
