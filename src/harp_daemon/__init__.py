"""What both daemons share: logs, process, event loop, listeners, acceptor, back-off, TLS minimum, memory quota, JSON."""
