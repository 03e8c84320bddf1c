"""The measurements behind docs/performance.md: HARP and its peers on the same work, in the same run, in turn.

`./dev bench` runs them. `bench.workloads` defines what is measured, `bench.contenders` who is measured,
`bench.harness` the order, `bench.load` the load of all clients.
"""
