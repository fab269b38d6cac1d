"""Ingestion: the gateway, the admission of events, the log, and the client library."""
