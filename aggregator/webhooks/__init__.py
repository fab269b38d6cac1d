"""Outgoing webhooks: build messages from causes, and deliver them to endpoints."""
