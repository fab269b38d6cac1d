"""Webhooks out: who moved in a round (causes), what is to be told (outbox), and where it may go (targets).

The telling itself is ``aggregator.webhook_sender``.
"""
