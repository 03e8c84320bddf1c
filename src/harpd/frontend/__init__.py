"""The network frontend of harpd: TLS, requests, authentication."""
