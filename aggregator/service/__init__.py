"""The query service: what the API and the webhooks read and decide, without HTTP."""
