"""Reconciliation: compare the log, the store, the totals in memory, the ledger and Polar with each other."""
