"""The aggregator: reads the log, keeps the store, and answers queries."""
