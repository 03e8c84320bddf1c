"""The daemon: exposes procedures over TLS, each call in a process of its own."""
