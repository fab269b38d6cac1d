"""The engine: follows the log, applies each batch to the store and to memory, and restarts after a failure."""
