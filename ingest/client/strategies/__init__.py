"""Strategies: small files, none of which knows another, that turn what happened into events."""
