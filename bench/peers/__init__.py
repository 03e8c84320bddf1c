"""Peers: one module each, with what its workers run and what its client does, under the peers' own Python.

`FUNCTIONS` of a module is what `bench.client` can run. Each module uses its library as that library's documentation
recommends; docs/performance.md lists the configuration of each.
"""
