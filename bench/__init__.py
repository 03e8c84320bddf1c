"""The measurements behind docs/performance.md: ours and theirs on the same work, in the same run, in turn.

`./dev bench` runs them. What is measured is in `bench.works`, who is measured in `bench.ours` and `bench.peers`, how in
`bench.rounds`.
"""
