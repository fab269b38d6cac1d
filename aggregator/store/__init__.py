"""The store: one DuckDB file with everything that was counted, written by one writer."""
