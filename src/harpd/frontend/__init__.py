"""The network side of harpd: TLS, requests, authentication. It holds no call."""
