"""The client without network and clock: operations, streams, retry, connection pool."""
