"""Reconciliation: compare the log, the store, the ledger and Polar, and repair differences."""
