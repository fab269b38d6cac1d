"""Webhooks out: who moved in a round (causes), what is to be told (outbox), where it may go (targets) and what a name
means (names), and whose state cannot be told yet (aside).

The telling itself is ``aggregator.webhooks.sender``.
"""
