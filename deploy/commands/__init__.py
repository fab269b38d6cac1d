"""The commands, a file for each noun. They parse, ask, and show; what they ask lives beside them in deploy."""
