"""Questions to the store, a module each. Every function takes a connection that reads one snapshot, and blocks."""
