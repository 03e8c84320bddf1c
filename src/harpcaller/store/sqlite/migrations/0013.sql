-- The limit of a job's records and result, by the rule of access that has allowed its call.

ALTER TABLE calls ADD COLUMN max_record_bytes INTEGER     -- NULL: the setting of the dispatcher decides alone
    CHECK (max_record_bytes > 0);

DROP VIEW job_view;
CREATE VIEW job_view AS                           -- a row is read by rows.py, in this order of columns
SELECT jobs.seq, jobs.lane, jobs.id, jobs.state, jobs.host, calls.procedure, calls.arguments, calls.timeout,
    calls.max_exec_time, calls.queue, calls.info, jobs.submitted, jobs.started, jobs.ended, outcomes.body, jobs.records,
    jobs.holds_slot, jobs.stop, calls.start_within, jobs.tried, jobs.owner, calls.max_running, calls.secrets,
    calls.rerun_of, calls.max_record_bytes
FROM jobs JOIN calls ON calls.job = jobs.seq LEFT JOIN outcomes ON outcomes.job = jobs.seq;
