"""The shared parts of both daemons: logs, process, event loop, sockets, back-off, TLS, memory quota, settings, JSON."""
