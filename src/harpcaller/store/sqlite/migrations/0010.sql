-- Secret arguments: the encrypted values of a call, until its job has ended.

ALTER TABLE calls ADD COLUMN secrets BLOB;        -- see secret_arguments.py
CREATE INDEX calls_with_secrets ON calls (job) WHERE secrets IS NOT NULL;

DROP VIEW job_view;
CREATE VIEW job_view AS                           -- a row is read by rows.py, in this order of columns
SELECT jobs.seq, jobs.lane, jobs.id, jobs.state, jobs.host, calls.procedure, calls.arguments, calls.timeout,
    calls.max_exec_time, calls.queue, calls.info, jobs.submitted, jobs.started, jobs.ended, outcomes.body, jobs.records,
    jobs.holds_slot, jobs.stop, calls.start_within, jobs.tried, jobs.owner, calls.max_running, calls.secrets
FROM jobs JOIN calls ON calls.job = jobs.seq LEFT JOIN outcomes ON outcomes.job = jobs.seq;
