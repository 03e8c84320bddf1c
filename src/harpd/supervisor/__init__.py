"""All running calls of a host: sessions, registry, spools, state files, workers and their termination."""
