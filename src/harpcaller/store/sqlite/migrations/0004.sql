-- Tables, columns and JSON keys by the names of the glossary; outages of hosts are no longer stored.
--
-- Every row of facts is rewritten, because its JSON keys change. In these texts `"name":` can only be a key, because
-- quotes within a string are escaped. Payloads of jobs do not change.

DROP VIEW whole_jobs;

ALTER TABLE jobs RENAME COLUMN place TO seq;
ALTER TABLE records RENAME COLUMN made TO timestamps;
ALTER TABLE identity RENAME COLUMN only TO singleton;
ALTER TABLE leftovers RENAME TO orphaned_records;

CREATE TABLE job_metadata (                       -- no row for a job that has none; each a JSON object
    job          INTEGER PRIMARY KEY REFERENCES jobs (seq) ON DELETE CASCADE,
    call         BLOB,                            -- where and how the call runs
    stop_request BLOB,                            -- why, by whom and when it was stopped
    stop_report  BLOB,                            -- what the host reports of the stop
    exit_info    BLOB                             -- how the call's process ended
);

INSERT INTO job_metadata (job, call, stop_request, stop_report, exit_info)
SELECT
    job,
    CAST(
        replace(replace(replace(CAST(call AS TEXT),
            '"kept":', '"resumable":'), '"warden":', '"instance":'), '"connecting":', '"connect_seconds":')
        AS BLOB
    ),
    stopped,
    CAST(replace(replace(CAST(receipt AS TEXT), '"lost":', '"host_lost":'), '"held":', '"known":') AS BLOB),
    evidence
FROM facts WHERE coalesce(call, stopped, receipt, evidence) IS NOT NULL;

DROP TABLE facts;

CREATE VIEW job_view AS                           -- a row is read by rows.py, in this order of columns
SELECT jobs.seq, jobs.lane, jobs.id, jobs.state, jobs.host, calls.procedure, calls.arguments, calls.timeout,
    calls.max_exec_time, calls.queue, calls.info, jobs.submitted, jobs.started, jobs.ended, ends.body, jobs.records,
    jobs.holds_slot, jobs.stop
FROM jobs JOIN calls ON calls.job = jobs.seq LEFT JOIN ends ON ends.job = jobs.seq;
