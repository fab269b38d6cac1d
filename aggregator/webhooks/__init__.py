"""Webhooks out: what is to be told (outbox), to whom (targets), and the telling (webhook_sender)."""
