"""The domain: the meaning of events, meters, quantities, credits and decisions, as pure functions and values."""
