"""Two sides that should say the same, compared: log and store, store and itself, ledger, store and Polar."""
