-- Slots apart from states, what is known of a call beside its end, when each record was made, the dispatcher's identity.
-- No row of an old file is written anew but those of its running jobs.

ALTER TABLE jobs ADD COLUMN holds_slot INTEGER NOT NULL DEFAULT 0    -- 1: it takes a place of its queue and host
    CHECK (holds_slot IN (0, 1) AND (holds_slot = 0 OR started IS NOT NULL));

ALTER TABLE jobs ADD COLUMN stop TEXT                                -- of its processes; NULL: it was not stopped
    CHECK (
        stop IS NULL
        OR (stop IN ('pending', 'confirmed', 'failed', 'unknown') AND started IS NOT NULL AND ended IS NOT NULL)
    );

UPDATE jobs SET holds_slot = 1 WHERE state = 'running';

-- What no CHECK could say of a table with such jobs.
CREATE TRIGGER running_job_added BEFORE INSERT ON jobs WHEN NEW.state = 'running' AND NEW.holds_slot = 0
BEGIN
    SELECT RAISE(ABORT, 'a running job holds a slot');
END;

CREATE TRIGGER running_job_changed BEFORE UPDATE OF state, holds_slot ON jobs
WHEN NEW.state = 'running' AND NEW.holds_slot = 0
BEGIN
    SELECT RAISE(ABORT, 'a running job holds a slot');
END;

-- As small as the number of jobs that hold a slot, or have not ended. They have the column of their condition in
-- them, too: then SQLite counts in the index alone.
DROP INDEX jobs_running_on_host;
DROP INDEX jobs_not_ended_of_lane;
CREATE INDEX jobs_holding_on_host ON jobs (host, holds_slot) WHERE holds_slot = 1;
CREATE INDEX jobs_holding_of_lane ON jobs (lane, holds_slot, place) WHERE holds_slot = 1;
CREATE INDEX jobs_not_ended_of_lane ON jobs (lane, state, ended, place) WHERE ended IS NULL;

CREATE TABLE facts (                              -- no row for a job that has none; each a JSON object
    job      INTEGER PRIMARY KEY REFERENCES jobs (place) ON DELETE CASCADE,
    call     BLOB,
    contact  BLOB,
    stopped  BLOB,
    receipt  BLOB,
    evidence BLOB
);

-- When the chunk's records were made: runs of those made at one time, each its count and the time (see rows.py).
-- NULL in chunks that are older than this column; these don't grow any more.
ALTER TABLE records ADD COLUMN made BLOB;

CREATE TABLE identity (                           -- one row, made by file.py once this table is there
    only  INTEGER PRIMARY KEY CHECK (only = 1),
    owner TEXT NOT NULL,
    key   BLOB NOT NULL
);

DROP VIEW whole_jobs;
CREATE VIEW whole_jobs AS                         -- a row is read by rows.py, in this order of columns
SELECT jobs.place, jobs.lane, jobs.id, jobs.state, jobs.host, calls.procedure, calls.arguments, calls.timeout,
    calls.max_exec_time, calls.queue, calls.info, jobs.submitted, jobs.started, jobs.ended, ends.body, jobs.records,
    jobs.holds_slot, jobs.stop
FROM jobs JOIN calls ON calls.job = jobs.place LEFT JOIN ends ON ends.job = jobs.place;

-- A lane is there while it has a job that has not ended or holds a slot, and full when as many hold one as may.
DROP TRIGGER job_moved;
CREATE TRIGGER job_moved AFTER UPDATE OF state, holds_slot ON jobs
BEGIN
    UPDATE lanes
    SET head = (SELECT min(place) FROM jobs WHERE lane = NEW.lane AND state = 'queued' AND ended IS NULL),
        is_full = concurrency IS NOT NULL AND concurrency <= (
            SELECT count(*) FROM jobs WHERE lane = NEW.lane AND holds_slot = 1
        )
    WHERE lane = NEW.lane;
    DELETE FROM lanes
    WHERE lane = NEW.lane
        AND NOT EXISTS (SELECT 1 FROM jobs WHERE lane = NEW.lane AND ended IS NULL)
        AND NOT EXISTS (SELECT 1 FROM jobs WHERE lane = NEW.lane AND holds_slot = 1);
END;
