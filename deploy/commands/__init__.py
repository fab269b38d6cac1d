"""The commands, a file for each subject: they parse arguments, call the code in deploy, and show the result."""
