"""Credits: the ledger and its statement, benefits that grant credits, and prices."""
