-- A store of schema version 1 with jobs in every state, as its own program left it.
BEGIN TRANSACTION;
CREATE TABLE calls (
    job           INTEGER PRIMARY KEY REFERENCES jobs (place) ON DELETE CASCADE,
    procedure     BLOB NOT NULL,
    arguments     BLOB NOT NULL,
    timeout       REAL NOT NULL,
    max_exec_time REAL NOT NULL,
    queue         BLOB,                           -- the queue's name as this job's submitter wrote it
    info          BLOB NOT NULL
);
INSERT INTO "calls" VALUES(1,X'6465706C6F79',X'5B2231225D',10.0,60.0,NULL,X'6E756C6C');
INSERT INTO "calls" VALUES(2,X'64EDA0BD',X'5B2232225D',10.0,60.0,NULL,X'6E756C6C');
INSERT INTO "calls" VALUES(3,X'6465706C6F79',X'5B2233225D',10.0,60.0,X'7B226462223A2270726F64227D',X'22205C756438303022');
INSERT INTO "calls" VALUES(4,X'6465706C6F79',X'5B2234225D',10.0,60.0,NULL,X'6E756C6C');
INSERT INTO "calls" VALUES(5,X'6465706C6F79',X'5B2235225D',10.0,60.0,NULL,X'6E756C6C');
INSERT INTO "calls" VALUES(6,X'6465706C6F79',X'5B2236225D',10.0,60.0,NULL,X'6E756C6C');
INSERT INTO "calls" VALUES(7,X'6465706C6F79',X'5B2237225D',10.0,60.0,X'7B226462223A2270726F64227D',X'6E756C6C');
INSERT INTO "calls" VALUES(8,X'6465706C6F79',X'5B2238225D',10.0,60.0,X'7B20226462223A202270726F6422207D',X'6E756C6C');
INSERT INTO "calls" VALUES(9,X'6465706C6F79',X'5B2239225D',10.0,60.0,X'7B226462223A2270726F64227D',X'6E756C6C');
INSERT INTO "calls" VALUES(10,X'6465706C6F79',X'5B223130225D',10.0,60.0,NULL,X'6E756C6C');
INSERT INTO "calls" VALUES(11,X'6465706C6F79',X'5B223131225D',10.0,60.0,NULL,X'6E756C6C');
INSERT INTO "calls" VALUES(12,X'6465706C6F79',X'5B223132225D',10.0,60.0,NULL,X'6E756C6C');
CREATE TABLE ends (                               -- none for a cancelled job
    job  INTEGER PRIMARY KEY REFERENCES jobs (place) ON DELETE CASCADE,
    body BLOB NOT NULL                            -- returned: the result; raised, failed: the closing line
);
INSERT INTO "ends" VALUES(1,X'7B2262223A20312E31302C202261223A20327D');
INSERT INTO "ends" VALUES(2,X'7B22657863657074696F6E223A7B2274797065223A2254726F75626C655C7564383030222C226D657373616765223A226C696E655C6E6C696E65222C2264617461223A7B22636C617373223A202254227D7D7D');
INSERT INTO "ends" VALUES(3,X'7B226572726F72223A7B2274797065223A2274696D656F7574222C226D657373616765223A226D61785F657865635F74696D653A2033207320617265206F766572227D7D');
INSERT INTO "ends" VALUES(4,X'7B226572726F72223A7B2274797065223A22756E6B6E6F776E5F686F7374222C226D657373616765223A226E6F207375636820686F7374227D7D');
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
INSERT INTO "jobs" VALUES(1,'00000000-0000-4000-8000-000000000001','host:9a25e93392056677e15d25da3d35858c',X'7765623031','returned',100.25,100.75,101.0,4);
INSERT INTO "jobs" VALUES(2,'00000000-0000-4000-8000-000000000002','host:bc23835286f216c0ecfe6f47720b5c00',X'776562EDA080','raised',110.25,110.75,111.0,0);
INSERT INTO "jobs" VALUES(3,'00000000-0000-4000-8000-000000000003','queue:cdb7e169d97564b6a87c2ad34daac81e',X'7765623031','failed',120.25,120.75,121.0,0);
INSERT INTO "jobs" VALUES(4,'00000000-0000-4000-8000-000000000004','host:97fe1b1f27a7504885b9ffbcbf7e3974',X'6E6F7768657265','failed',130.25,NULL,131.0,0);
INSERT INTO "jobs" VALUES(5,'00000000-0000-4000-8000-000000000005','host:9a25e93392056677e15d25da3d35858c',X'7765623031','cancelled',140.25,NULL,141.0,0);
INSERT INTO "jobs" VALUES(6,'00000000-0000-4000-8000-000000000006','host:9a25e93392056677e15d25da3d35858c',X'7765623031','cancelled',150.25,150.75,151.0,1);
INSERT INTO "jobs" VALUES(7,'00000000-0000-4000-8000-000000000007','queue:cdb7e169d97564b6a87c2ad34daac81e',X'7765623031','running',160.25,160.75,NULL,2);
INSERT INTO "jobs" VALUES(8,'00000000-0000-4000-8000-000000000008','queue:cdb7e169d97564b6a87c2ad34daac81e',X'7765623032','running',170.25,170.75,NULL,0);
INSERT INTO "jobs" VALUES(9,'00000000-0000-4000-8000-000000000009','queue:cdb7e169d97564b6a87c2ad34daac81e',X'7765623031','queued',180.25,NULL,NULL,0);
INSERT INTO "jobs" VALUES(10,'00000000-0000-4000-8000-000000000010','host:9a25e93392056677e15d25da3d35858c',X'7765623031','running',190.25,190.75,NULL,0);
INSERT INTO "jobs" VALUES(11,'00000000-0000-4000-8000-000000000011','host:9a25e93392056677e15d25da3d35858c',X'7765623031','queued',200.25,NULL,NULL,0);
INSERT INTO "jobs" VALUES(12,'00000000-0000-4000-8000-000000000012','host:e7e1311977972162b469ae5a8706e491',X'7765623032','queued',210.25,NULL,NULL,0);
CREATE TABLE lanes (
    lane        TEXT PRIMARY KEY,
    queue       BLOB,                             -- the queue's name as its first submitter wrote it; NULL: a host's
    concurrency INTEGER CHECK (concurrency > 0),  -- NULL: a host's lane has no limit of its own
    head        INTEGER,                          -- place of the first queued job
    is_full     INTEGER NOT NULL DEFAULT 0,       -- 1: as many run as the concurrency allows
    CHECK ((queue IS NULL) = (concurrency IS NULL))
);
INSERT INTO "lanes" VALUES('queue:cdb7e169d97564b6a87c2ad34daac81e',X'7B226462223A2270726F64227D',2,9,1);
INSERT INTO "lanes" VALUES('host:9a25e93392056677e15d25da3d35858c',NULL,NULL,11,0);
INSERT INTO "lanes" VALUES('host:e7e1311977972162b469ae5a8706e491',NULL,NULL,12,0);
CREATE TABLE leftovers (                          -- deleted jobs whose records are still to be deleted, in small steps
    job INTEGER PRIMARY KEY
);
CREATE TABLE records (                            -- no reference to jobs: see leftovers
    job   INTEGER NOT NULL,
    first INTEGER NOT NULL,                       -- number of the chunk's first record
    count INTEGER NOT NULL,
    bytes BLOB NOT NULL,                          -- the records, a line feed between two
    PRIMARY KEY (job, first)
);
INSERT INTO "records" VALUES(1,0,4,X'226C696E652030220A226C696E652031220A226C696E652032220A7B2262223A312E31302C2261223A225C7564383030227D');
INSERT INTO "records" VALUES(6,0,1,X'30');
INSERT INTO "records" VALUES(7,0,2,X'300A31');
CREATE TABLE schema_version (version INTEGER PRIMARY KEY);
INSERT INTO "schema_version" VALUES(1);
CREATE INDEX jobs_not_ended ON jobs (place) WHERE ended IS NULL;
CREATE INDEX jobs_not_ended_of_lane ON jobs (lane, state, place) WHERE ended IS NULL;
CREATE INDEX jobs_running_on_host ON jobs (host) WHERE state = 'running';
CREATE INDEX jobs_ended ON jobs (ended) WHERE ended IS NOT NULL;
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
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',12);
COMMIT;
