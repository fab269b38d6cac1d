"""Decoding: log records become columns of events, deduplicated against every identity ever stored."""
