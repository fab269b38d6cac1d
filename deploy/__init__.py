"""Deployment: the command line, the processes and their data directory, reconciliation and the demonstration."""
