"""The proof: a whole system under a seeded schedule of faults, judged by what its procedures wrote on disk.

    ./dev chaos --minutes 10 --seed 7

Theory of operation. One asyncio program runs it all. `system` keeps the real daemons up as a service manager would:
one dispatcher, three hosts, each a gate and a keeper of its calls, and between the dispatcher and each host a `proxy`
of our own. `clients` submit, follow, ask and cancel by the real client library, and note in the `ledger` what they were
told. `schedule` makes the faults from the seed: kind, target, moment and length; `faults` carries them out. The same
seed gives the same schedule; what comes of it may differ.

The truth does not come from HARP. The procedures write `marks`: one line each at their start, for each record that they
handed over, for each process that they make, and at their end. The `census` reads the marks and looks into /proc, again
and again, which of the marked processes live. So of each process is known for sure: it lived from its first mark until
it was last seen. Only what is sure is held against HARP: slow machines make the looks rarer, never wrong.

`watch` looks all the while for jobs that are called running long after their process died; clients check receipts the
moment they get them. At the end all faults are healed, all that can end ends, `sweep` asks for everything once more,
and `judge` compares: marks with ends, records with what followers saw, processes with limits. Broken promises have the
numbers of docs/guarantees.md, and the facts.

`--sabotage` runs a dispatcher that breaks a promise on purpose (`dispatcher`): a proof that cannot fail proves nothing.
"""
