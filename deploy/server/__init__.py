"""The server's processes: supervisor, gateway and aggregator, and what they share."""
