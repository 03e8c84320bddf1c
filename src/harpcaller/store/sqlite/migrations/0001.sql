-- The first schema.
--
-- What changes often (jobs) stays narrow; what never changes (calls) and what comes once (ends) lie beside it, so
-- that a change of state does not rewrite a payload. Names and payloads are BLOBs: the bytes as they came.
-- Times are Unix seconds and only shown; every order is that of `place`, which a step of the clock does not touch.

CREATE TABLE jobs (
    place     INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of submission; never used twice
    id        TEXT NOT NULL UNIQUE,
    lane      TEXT NOT NULL,                      -- see lanes
    host      BLOB NOT NULL,
    state     TEXT NOT NULL DEFAULT 'queued'
              CHECK (state IN ('queued', 'running', 'returned', 'raised', 'failed', 'cancelled')),
    submitted REAL NOT NULL,
    started   REAL,
    ended     REAL,
    records   INTEGER NOT NULL DEFAULT 0,         -- how many records are stored
    CHECK ((ended IS NULL) = (state IN ('queued', 'running'))),
    CHECK (started IS NULL OR state <> 'queued'),
    CHECK (started IS NOT NULL OR state NOT IN ('running', 'returned', 'raised'))
);

-- These two hold the jobs that have not ended, and are as small as their number, whatever the table's size.
CREATE INDEX jobs_not_ended ON jobs (place) WHERE ended IS NULL;
CREATE INDEX jobs_not_ended_of_lane ON jobs (lane, state, place) WHERE ended IS NULL;
CREATE INDEX jobs_running_on_host ON jobs (host) WHERE state = 'running';
CREATE INDEX jobs_ended ON jobs (ended) WHERE ended IS NOT NULL;

CREATE TABLE calls (
    job           INTEGER PRIMARY KEY REFERENCES jobs (place) ON DELETE CASCADE,
    procedure     BLOB NOT NULL,
    arguments     BLOB NOT NULL,
    timeout       REAL NOT NULL,
    max_exec_time REAL NOT NULL,
    queue         BLOB,                           -- the queue's name as this job's submitter wrote it
    info          BLOB NOT NULL
);

CREATE TABLE ends (                               -- none for a cancelled job
    job  INTEGER PRIMARY KEY REFERENCES jobs (place) ON DELETE CASCADE,
    body BLOB NOT NULL                            -- returned: the result; raised, failed: the closing line
);

CREATE TABLE records (                            -- no reference to jobs: see leftovers
    job   INTEGER NOT NULL,
    first INTEGER NOT NULL,                       -- number of the chunk's first record
    count INTEGER NOT NULL,
    bytes BLOB NOT NULL,                          -- the records, a line feed between two
    PRIMARY KEY (job, first)
);

CREATE TABLE leftovers (                          -- deleted jobs whose records are still to be deleted, in small steps
    job INTEGER PRIMARY KEY
);

-- A lane: a queue, or a host's jobs that have no queue; there while it has a job that has not ended.
-- `head` and `is_full` are derived from jobs by the triggers below, each time anew: nothing is counted up or down.
CREATE TABLE lanes (
    lane        TEXT PRIMARY KEY,
    queue       BLOB,                             -- the queue's name as its first submitter wrote it; NULL: a host's
    concurrency INTEGER CHECK (concurrency > 0),  -- NULL: a host's lane has no limit of its own
    head        INTEGER,                          -- place of the first queued job
    is_full     INTEGER NOT NULL DEFAULT 0,       -- 1: as many run as the concurrency allows
    CHECK ((queue IS NULL) = (concurrency IS NULL))
);

CREATE INDEX lanes_with_room ON lanes (head) WHERE head IS NOT NULL AND is_full = 0;

CREATE VIEW whole_jobs AS                         -- a row is read by rows.py, in this order of columns
SELECT jobs.place, jobs.lane, jobs.id, jobs.state, jobs.host, calls.procedure, calls.arguments, calls.timeout,
    calls.max_exec_time, calls.queue, calls.info, jobs.submitted, jobs.started, jobs.ended, ends.body, jobs.records
FROM jobs JOIN calls ON calls.job = jobs.place LEFT JOIN ends ON ends.job = jobs.place;

CREATE TRIGGER job_added AFTER INSERT ON jobs
BEGIN
    UPDATE lanes SET head = NEW.place WHERE lane = NEW.lane AND head IS NULL;
END;

CREATE TRIGGER job_moves BEFORE UPDATE OF state ON jobs
WHEN NOT (
    (OLD.state = 'queued' AND NEW.state IN ('running', 'cancelled', 'failed'))
    OR (OLD.state = 'running' AND NEW.state IN ('returned', 'raised', 'failed', 'cancelled'))
)
BEGIN
    SELECT RAISE(ABORT, 'no such transition of a job');
END;

CREATE TRIGGER job_moved AFTER UPDATE OF state ON jobs
BEGIN
    UPDATE lanes
    SET head = (SELECT min(place) FROM jobs WHERE lane = NEW.lane AND state = 'queued' AND ended IS NULL),
        is_full = concurrency IS NOT NULL AND concurrency <= (
            SELECT count(*) FROM jobs WHERE lane = NEW.lane AND state = 'running' AND ended IS NULL
        )
    WHERE lane = NEW.lane;
    DELETE FROM lanes
    WHERE lane = NEW.lane AND NOT EXISTS (SELECT 1 FROM jobs WHERE lane = NEW.lane AND ended IS NULL);
END;
