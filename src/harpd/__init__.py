"""The daemon: exposes procedures over TLS, each call in a separate process."""
