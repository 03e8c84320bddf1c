"""What both daemons need of the system: their log, their process, their floor for TLS. Standard library only.

The client does not import this package.
"""
