"""The hosts: their registry, TLS, capabilities, and the connections to their harpd."""
