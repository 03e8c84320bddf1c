-- The owner of each job, the limit of how many jobs of its owner may run, and request ids of each owner for itself.

ALTER TABLE jobs ADD COLUMN owner BLOB;           -- the principal that submitted it; NULL: before this schema
ALTER TABLE calls ADD COLUMN max_running INTEGER  -- it waits while as many jobs of its owner hold a slot; NULL: no limit
    CHECK (max_running > 0);

DROP INDEX jobs_queued_of_lane;
CREATE INDEX jobs_queued_of_lane ON jobs (lane, state, seq, owner) WHERE state = 'queued';

-- The empty owner stands for all clients: it has the request ids that were submitted without access rules. They count
-- for every client for their 24 h, because a submission that is sent again must not become a second job.
CREATE TABLE request_ids_of_owners (              -- a row for 24 h; its job may have been deleted before
    request_id  BLOB NOT NULL,
    owner       BLOB NOT NULL,
    job         INTEGER NOT NULL,                 -- sequence number
    call_digest BLOB NOT NULL,                    -- another call with this request id is refused
    submitted   REAL NOT NULL,
    PRIMARY KEY (request_id, owner)
) WITHOUT ROWID;
INSERT INTO request_ids_of_owners SELECT request_id, x'', job, call_digest, submitted FROM request_ids;
DROP TABLE request_ids;
ALTER TABLE request_ids_of_owners RENAME TO request_ids;
CREATE INDEX request_ids_submitted ON request_ids (submitted);

DROP VIEW job_view;
CREATE VIEW job_view AS                           -- a row is read by rows.py, in this order of columns
SELECT jobs.seq, jobs.lane, jobs.id, jobs.state, jobs.host, calls.procedure, calls.arguments, calls.timeout,
    calls.max_exec_time, calls.queue, calls.info, jobs.submitted, jobs.started, jobs.ended, outcomes.body, jobs.records,
    jobs.holds_slot, jobs.stop, calls.start_within, jobs.tried, jobs.owner, calls.max_running
FROM jobs JOIN calls ON calls.job = jobs.seq LEFT JOIN outcomes ON outcomes.job = jobs.seq;
