"""One job, one call: the run, its records, its outcome, its deadlines, and reconciliation with hosts."""
