"""The command line: options -> recipe -> one call of the API; errors -> one line and an exit code."""
