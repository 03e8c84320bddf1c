-- Lists by any filter: indexes that a returned job hardly touches, how a job ended beside its state, and re-runs.

ALTER TABLE jobs ADD COLUMN end_type BLOB;        -- raised, failed: type of the exception or error
ALTER TABLE jobs ADD COLUMN end_message BLOB;     -- its first characters
ALTER TABLE calls ADD COLUMN rerun_of TEXT;       -- id of the job that was submitted again; it may have been deleted

-- A text that SQLite cannot read as JSON has no type: such an end is older than the checks of the protocol.
WITH lines AS (
    SELECT job, CAST(body AS TEXT) AS line FROM outcomes
    WHERE job IN (SELECT seq FROM jobs WHERE state IN ('raised', 'failed'))
)
UPDATE jobs SET
    end_type = CAST(coalesce(json_extract(line, '$.error.type'), json_extract(line, '$.exception.type')) AS BLOB),
    end_message = CAST(
        substr(coalesce(json_extract(line, '$.error.message'), json_extract(line, '$.exception.message')), 1, 200)
        AS BLOB
    )
FROM lines WHERE lines.job = jobs.seq AND json_valid(line);

-- Partial indexes: a job that returns is in none of them. They have the columns that are looked for among few jobs, so
-- that rows need not be read. Every index of jobs ends with `seq`, as it is the row's id. The condition has no IN: SQLite
-- fills a table with the values of a list for each write of a job, which takes 7 us.
CREATE INDEX jobs_not_returned ON jobs (state, seq, host, end_type, owner, lane, submitted, ended)
WHERE ended IS NOT NULL AND state <> 'returned';
DROP TRIGGER job_moves;                           -- the same transitions, without the lists, for the same reason
CREATE TRIGGER job_moves BEFORE UPDATE OF state ON jobs
WHEN NOT (
    (OLD.state = 'queued' AND NEW.state <> 'queued' AND NEW.state <> 'returned' AND NEW.state <> 'raised')
    OR (OLD.state = 'running' AND NEW.state <> 'running')
)
BEGIN
    SELECT RAISE(ABORT, 'no such transition of a job');
END;
CREATE INDEX jobs_stopped ON jobs (stop, seq, state, host, end_type) WHERE stop IS NOT NULL;
CREATE INDEX calls_rerun_of ON calls (rerun_of) WHERE rerun_of IS NOT NULL;

CREATE INDEX calls_of_procedure ON calls (procedure);
CREATE INDEX jobs_of_owner ON jobs (owner);
DROP INDEX jobs_ended;
CREATE INDEX jobs_ended ON jobs (ended, state) WHERE ended IS NOT NULL;  -- statistics are counted in it alone

-- The clock may be set back, so times do not always ascend in the order of submission. No job was submitted earlier
-- than one before it by more than these seconds.
CREATE TABLE submission_times (
    singleton INTEGER PRIMARY KEY CHECK (singleton = 1),
    disorder  REAL NOT NULL
);
INSERT INTO submission_times
SELECT 1, coalesce(max(latest - submitted), 0)
FROM (SELECT submitted, max(submitted) OVER (ORDER BY seq) AS latest FROM jobs);

DROP VIEW job_view;
CREATE VIEW job_view AS                           -- a row is read by rows.py, in this order of columns
SELECT jobs.seq, jobs.lane, jobs.id, jobs.state, jobs.host, calls.procedure, calls.arguments, calls.timeout,
    calls.max_exec_time, calls.queue, calls.info, jobs.submitted, jobs.started, jobs.ended, outcomes.body, jobs.records,
    jobs.holds_slot, jobs.stop, calls.start_within, jobs.tried, jobs.owner, calls.max_running, calls.secrets,
    calls.rerun_of
FROM jobs JOIN calls ON calls.job = jobs.seq LEFT JOIN outcomes ON outcomes.job = jobs.seq;
