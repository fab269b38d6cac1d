"""From the store to Polar: what was counted here is handed on there, within its limits, once."""
