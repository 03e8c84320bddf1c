"""The HTTP API of the dispatcher. Its packages are those of the extra `web`; only this package imports them."""
