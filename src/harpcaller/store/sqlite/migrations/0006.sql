-- A job whose start certainly did not happen is queued again, for `start_within` seconds.

ALTER TABLE calls ADD COLUMN start_within REAL NOT NULL DEFAULT 10;
ALTER TABLE jobs ADD COLUMN tried REAL;           -- time of the first start, if the job was queued again after it

DROP TRIGGER job_moves;
CREATE TRIGGER job_moves BEFORE UPDATE OF state ON jobs
WHEN NOT (
    (OLD.state = 'queued' AND NEW.state IN ('running', 'cancelled', 'failed'))
    OR (OLD.state = 'running' AND NEW.state IN ('queued', 'returned', 'raised', 'failed', 'cancelled'))
)
BEGIN
    SELECT RAISE(ABORT, 'no such transition of a job');
END;

DROP VIEW job_view;
CREATE VIEW job_view AS                           -- a row is read by rows.py, in this order of columns
SELECT jobs.seq, jobs.lane, jobs.id, jobs.state, jobs.host, calls.procedure, calls.arguments, calls.timeout,
    calls.max_exec_time, calls.queue, calls.info, jobs.submitted, jobs.started, jobs.ended, outcomes.body, jobs.records,
    jobs.holds_slot, jobs.stop, calls.start_within, jobs.tried
FROM jobs JOIN calls ON calls.job = jobs.seq LEFT JOIN outcomes ON outcomes.job = jobs.seq;
