"""Queries to the store. Every function takes a connection that reads one snapshot, and blocks."""
