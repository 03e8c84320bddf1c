-- Request ids: a submission that is sent again gets the job of the first one.

CREATE TABLE request_ids (                        -- a row for 24 h; its job may have been deleted before
    request_id  BLOB PRIMARY KEY,
    job         INTEGER NOT NULL,                 -- sequence number
    call_digest BLOB NOT NULL,                    -- another call with this request id is refused
    submitted   REAL NOT NULL
) WITHOUT ROWID;

CREATE INDEX request_ids_submitted ON request_ids (submitted);
