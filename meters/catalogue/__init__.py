"""The operator's decisions: the catalogue that they add up to, access, and facts from Polar."""
