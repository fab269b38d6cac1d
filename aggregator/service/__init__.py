"""The query service: queries and decisions for the API and the webhooks, without HTTP."""
