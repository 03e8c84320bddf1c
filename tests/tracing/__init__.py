"""Counts the Python functions that one job enters, process by process: `./dev trace --help`."""
