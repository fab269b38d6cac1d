"""Running totals: what customers used of every meter, in memory and exact."""
