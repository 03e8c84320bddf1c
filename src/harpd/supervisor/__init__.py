"""All running calls of a host: their sessions, registry, records, state files and termination."""
