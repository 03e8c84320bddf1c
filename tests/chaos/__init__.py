"""The chaos run: a whole system under a seeded schedule of faults, checked against what its procedures wrote on disk.

    ./dev chaos --minutes 10 --seed 7

Theory of operation. One asyncio program runs everything. `system` keeps the real daemons running as a service manager
would: one dispatcher, and three hosts, each with a frontend and a launcher. Between the dispatcher and each host is a
`proxy`. `clients` submit, follow and cancel jobs with the real client library, and store what they receive in
`observations`. `schedule` makes the faults from the seed: kind, target, time and duration; `faults` injects them, with
`disturbances`, the `dispatcher`'s injected clock and name service, and the pipes of the daemons' logs (`service`). The
same seed gives the same schedule. Its effects may differ.

The facts do not come from HARP. The procedures write `marks`: one line each at their start, for each record that they
have passed on, for each process that they create, and at their end. The `process_tracker` reads the marks and checks in
/proc which of the marked processes live. A process certainly lived from its first mark to the last check that found it.
Only certain facts count as violations: a slow machine makes the checks rarer, never wrong.

`viewers` walk through lists of jobs and read events all the time, and compare what they see.

`monitor` looks for jobs that are still called running long after their process died. Clients check stop reports as
soon as they receive them. At the end all faults are undone and everything ends. Then `final_read` requests everything
again, and `checks` compares marks with ends, records with what followers received, and processes with limits.
Violations have the number of the promise in docs/guarantees.md, and the facts.

A failpoint run has kills instead of these faults:

    ./dev chaos --kills 500 --seed 7

`kills` makes the sequence of kills from the seed: dispatcher, frontend, supervisor, zygote, worker. `killer` injects
them. Most processes are killed when they enter or leave a system call, the n-th after a random time: `tracer` observes
them with ptrace. So kills hit each step of a path as often as any other one. A random time would hit the waits between
the steps. `direct_clients` call the hosts at the same time. `bystanders` are unrelated processes, most of them with the
pid of a process that has died: HARP must not kill them. As root, a run has its own namespaces (`namespaces`).

`--sabotage` breaks a promise on purpose, to test that the run detects it: by a dispatcher with another store
(`dispatcher`), or by a procedure that does what HARP must not do (`procedures`).
"""
