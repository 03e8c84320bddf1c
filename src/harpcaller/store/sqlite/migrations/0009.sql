-- Staging: jobs of one request that are stored, and not yet inserted into the other tables.

CREATE TABLE staged_jobs (
    step      INTEGER PRIMARY KEY,                -- in the order of submission
    submitted REAL NOT NULL,
    jobs      BLOB NOT NULL                       -- JSON array, see staging.py
);
