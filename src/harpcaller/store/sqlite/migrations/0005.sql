-- Lanes and slots are decided in memory (active.py): the file keeps what a restart and the readers need. A job that
-- starts with the transaction of its submission enters and leaves one partial index, and its end is one row beside it.

DROP VIEW job_view;
DROP TRIGGER job_added;
DROP TRIGGER job_moved;
DROP INDEX jobs_holding_on_host;
DROP INDEX jobs_holding_of_lane;
DROP INDEX jobs_not_ended;

-- Both are as small as the number of such jobs, and in the order of submission.
CREATE INDEX jobs_queued ON jobs (seq, host, state) WHERE state = 'queued';
CREATE INDEX jobs_holding ON jobs (seq, lane, host, state, holds_slot) WHERE holds_slot = 1;

CREATE TABLE queues (                             -- a row while the queue has a job that is queued or holds a slot
    lane        TEXT PRIMARY KEY,                 -- the lane of its jobs
    name        BLOB NOT NULL,                    -- as its first submitter wrote it
    concurrency INTEGER NOT NULL CHECK (concurrency > 0)
);
INSERT INTO queues SELECT lane, queue, concurrency FROM lanes WHERE queue IS NOT NULL ORDER BY rowid;
DROP TABLE lanes;

CREATE TABLE outcomes (                           -- no row for a cancelled job without metadata; metadata is JSON objects
    job          INTEGER PRIMARY KEY REFERENCES jobs (seq) ON DELETE CASCADE,
    body         BLOB,                            -- returned: the result; raised, failed: the closing line
    call         BLOB,                            -- where and how the call runs
    stop_request BLOB,                            -- why, by whom and when it was stopped
    stop_report  BLOB,                            -- what the host reports of the stop
    exit_info    BLOB                             -- how the call's process ended
);
INSERT INTO outcomes
SELECT jobs.seq, ends.body, facts.call, facts.stop_request, facts.stop_report, facts.exit_info
FROM jobs LEFT JOIN ends ON ends.job = jobs.seq LEFT JOIN job_metadata AS facts ON facts.job = jobs.seq
WHERE ends.job IS NOT NULL OR facts.job IS NOT NULL;
DROP TABLE ends;
DROP TABLE job_metadata;

CREATE VIEW job_view AS                           -- a row is read by rows.py, in this order of columns
SELECT jobs.seq, jobs.lane, jobs.id, jobs.state, jobs.host, calls.procedure, calls.arguments, calls.timeout,
    calls.max_exec_time, calls.queue, calls.info, jobs.submitted, jobs.started, jobs.ended, outcomes.body, jobs.records,
    jobs.holds_slot, jobs.stop
FROM jobs JOIN calls ON calls.job = jobs.seq LEFT JOIN outcomes ON outcomes.job = jobs.seq;
