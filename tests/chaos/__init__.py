"""The chaos run: a whole system under a seeded schedule of faults, checked against what its procedures wrote on disk.

    ./dev chaos --minutes 10 --seed 7

Theory of operation. One asyncio program runs everything. `system` keeps the real daemons running as a service manager
would: one dispatcher, and three hosts, each with a frontend and a launcher. Between the dispatcher and each host is a
`proxy`. `clients` submit, follow and cancel jobs with the real client library, and store what they receive in
`observations`. `schedule` makes the faults from the seed: kind, target, time and duration; `faults` injects them. The
same seed gives the same schedule. Its effects may differ.

The facts do not come from HARP. The procedures write `marks`: one line each at their start, for each record that they
have passed on, for each process that they create, and at their end. The `process_tracker` reads the marks and checks in
/proc which of the marked processes live. A process certainly lived from its first mark to the last check that found it.
Only certain facts count as violations: a slow machine makes the checks rarer, never wrong.

`monitor` looks for jobs that are still called running long after their process died. Clients check stop reports as
soon as they receive them. At the end all faults are undone and everything ends. Then `final_read` requests everything
once more, and `checks` compares marks with ends, records with what followers received, and processes with limits.
Violations have the number of the promise in docs/guarantees.md, and the facts.

`--sabotage` runs a dispatcher that breaks a promise on purpose (`dispatcher`), to test that the run detects it.
"""
