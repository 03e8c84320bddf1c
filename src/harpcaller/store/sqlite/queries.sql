-- The named statements of the store. The verbs that run them are in writes.py, pruning.py and reads.py.
-- No other transaction writes at the same time, so everything that a verb has read is valid until it commits.

-- name: add_lane
-- An existing lane does not change: the first job of a queue decides its concurrency.
INSERT INTO lanes (lane, queue, concurrency) VALUES (?, ?, ?) ON CONFLICT DO NOTHING;

-- name: add_job
INSERT INTO jobs (id, lane, host, submitted) VALUES (?, ?, ?, ?);

-- name: last_seq
SELECT last_insert_rowid();

-- name: add_call
INSERT INTO calls (job, procedure, arguments, timeout, max_exec_time, queue, info)
VALUES (?, ?, ?, ?, ?, ?, ?);

-- name: next_head
-- The first head after a sequence number, of the lanes that are not full.
SELECT jobs.seq, jobs.host FROM lanes INDEXED BY lanes_with_room JOIN jobs ON jobs.seq = lanes.head
WHERE lanes.head > :seq AND lanes.is_full = 0 ORDER BY lanes.head LIMIT 1;

-- name: holding_on_host
SELECT count(*) FROM jobs INDEXED BY jobs_holding_on_host WHERE host = :host AND holds_slot = 1;

-- name: start_job
-- `now` may be earlier than the job, because a claim runs after the other verbs of its batch.
UPDATE jobs SET state = 'running', started = max(:now, submitted), holds_slot = 1 WHERE seq = :seq;

-- name: find_job
SELECT seq, state, records, holds_slot FROM jobs WHERE id = :id;

-- name: end_job
UPDATE jobs SET state = :state, ended = :now, stop = :stop, holds_slot = :holds_slot WHERE seq = :seq;

-- name: add_end
INSERT INTO ends (job, body) VALUES (:seq, :body);

-- name: finalize_stop
UPDATE jobs SET stop = :stop, holds_slot = :holds_slot WHERE seq = :seq;

-- name: update_metadata
-- A parameter that is NULL leaves its column as it is.
INSERT INTO job_metadata (job, call, stop_request, stop_report, exit_info)
VALUES (:seq, :call, :stop_request, :stop_report, :exit_info)
ON CONFLICT (job) DO UPDATE SET
    call = coalesce(:call, call),
    stop_request = coalesce(:stop_request, stop_request),
    stop_report = coalesce(:stop_report, stop_report),
    exit_info = coalesce(:exit_info, exit_info);

-- name: not_ended_of_lane
SELECT seq, id, state FROM jobs INDEXED BY jobs_queued_of_lane WHERE lane = :lane AND state = 'queued'
UNION ALL
SELECT seq, id, state FROM jobs INDEXED BY jobs_holding_of_lane
WHERE lane = :lane AND holds_slot = 1 AND state = 'running'
ORDER BY seq;

-- name: growing_chunk
-- The last chunk of a job's records, if it is small enough to grow. A chunk without timestamps does not grow.
SELECT first, count, bytes, timestamps FROM records
WHERE job = :seq AND first = (SELECT max(first) FROM records WHERE job = :seq)
    AND length(bytes) + length(timestamps) < :max_bytes;

-- name: add_chunk
INSERT INTO records (job, first, count, bytes, timestamps) VALUES (:seq, :first, :count, :bytes, :timestamps);

-- name: grow_chunk
UPDATE records SET count = :count, bytes = :bytes, timestamps = :timestamps WHERE job = :seq AND first = :first;

-- name: count_records
UPDATE jobs SET records = :records WHERE seq = :seq;

-- name: old_jobs
-- Ended jobs and the size of their stored payloads without records; the oldest end first.
SELECT jobs.seq,
    length(calls.arguments) + length(calls.info) + coalesce(length(ends.body), 0)
    + coalesce(length(job_metadata.call), 0) + coalesce(length(job_metadata.stop_request), 0)
    + coalesce(length(job_metadata.stop_report), 0) + coalesce(length(job_metadata.exit_info), 0)
FROM jobs INDEXED BY jobs_ended
    JOIN calls ON calls.job = jobs.seq
    LEFT JOIN ends ON ends.job = jobs.seq
    LEFT JOIN job_metadata ON job_metadata.job = jobs.seq
WHERE jobs.ended < :before AND jobs.holds_slot = 0 ORDER BY jobs.ended LIMIT :limit;

-- name: orphan_records
INSERT INTO orphaned_records (job) SELECT :seq WHERE EXISTS (SELECT 1 FROM records WHERE job = :seq);

-- name: delete_job
DELETE FROM jobs WHERE seq = :seq;

-- name: first_orphaned_records
SELECT min(job) FROM orphaned_records;

-- name: orphaned_chunks
SELECT rowid, length(bytes) FROM records WHERE job = :seq LIMIT :limit;

-- name: delete_chunk
DELETE FROM records WHERE rowid = :rowid;

-- name: forget_orphaned_records
DELETE FROM orphaned_records WHERE job = :seq AND NOT EXISTS (SELECT 1 FROM records WHERE job = :seq);

-- name: get_job
SELECT * FROM job_view WHERE id = :id;

-- name: get_job_by_seq
SELECT * FROM job_view WHERE seq = :seq;

-- name: get_metadata
SELECT call, stop_request, stop_report, exit_info FROM job_metadata WHERE job = :seq;

-- name: record_bytes
-- Without the line feeds between them.
SELECT coalesce(sum(length(bytes) - count + 1), 0) FROM records WHERE job = :seq;

-- name: queue_position
SELECT
    (
        SELECT count(*) FROM jobs INDEXED BY jobs_queued_of_lane
        WHERE lane = waiting.lane AND state = 'queued' AND seq <= waiting.seq
    ),
    lanes.concurrency,
    (SELECT count(*) FROM jobs INDEXED BY jobs_holding_of_lane WHERE lane = waiting.lane AND holds_slot = 1),
    (SELECT count(*) FROM jobs INDEXED BY jobs_holding_on_host WHERE host = waiting.host AND holds_slot = 1)
FROM jobs AS waiting JOIN lanes ON lanes.lane = waiting.lane
WHERE waiting.seq = :seq;

-- name: slot_holders
SELECT jobs.id FROM jobs INDEXED BY jobs_holding_of_lane
WHERE jobs.lane = (SELECT lane FROM jobs WHERE seq = :seq) AND jobs.holds_slot = 1
ORDER BY jobs.seq LIMIT :limit;

-- name: list_slot_holders
SELECT * FROM job_view
WHERE seq IN (SELECT seq FROM jobs INDEXED BY jobs_holding_on_host WHERE holds_slot = 1) ORDER BY seq;

-- name: list_jobs
SELECT * FROM job_view WHERE seq > :after ORDER BY seq LIMIT :limit;

-- name: list_jobs_of_host
SELECT * FROM job_view WHERE host = :host AND seq > :after ORDER BY seq LIMIT :limit;

-- name: list_jobs_of_lane
SELECT * FROM job_view WHERE lane = :lane AND lane >= 'queue:' AND seq > :after
ORDER BY seq LIMIT :limit;

-- name: list_jobs_not_ended
SELECT * FROM job_view WHERE ended IS NULL AND seq > :after ORDER BY seq LIMIT :limit;

-- name: list_jobs_not_ended_of_host
SELECT * FROM job_view WHERE seq IN (
    SELECT seq FROM jobs INDEXED BY jobs_not_ended WHERE ended IS NULL AND host = :host AND seq > :after
    ORDER BY seq LIMIT :limit
) ORDER BY seq;

-- name: list_jobs_not_ended_of_lane
SELECT * FROM job_view WHERE seq IN (
    SELECT seq FROM jobs INDEXED BY jobs_queued_of_lane WHERE lane = :lane AND state = 'queued' AND seq > :after
    UNION ALL
    SELECT seq FROM jobs INDEXED BY jobs_holding_of_lane
    WHERE lane = :lane AND holds_slot = 1 AND state = 'running' AND seq > :after
    ORDER BY seq LIMIT :limit
) ORDER BY seq;

-- name: list_newest
-- The same lists in reverse order, for jobs before a sequence number.
SELECT * FROM job_view WHERE seq < :after ORDER BY seq DESC LIMIT :limit;

-- name: list_newest_of_host
SELECT * FROM job_view WHERE host = :host AND seq < :after ORDER BY seq DESC LIMIT :limit;

-- name: list_newest_of_lane
SELECT * FROM job_view WHERE lane = :lane AND lane >= 'queue:' AND seq < :after
ORDER BY seq DESC LIMIT :limit;

-- name: list_newest_not_ended
SELECT * FROM job_view WHERE ended IS NULL AND seq < :after ORDER BY seq DESC LIMIT :limit;

-- name: list_newest_not_ended_of_host
SELECT * FROM job_view WHERE seq IN (
    SELECT seq FROM jobs INDEXED BY jobs_not_ended WHERE ended IS NULL AND host = :host AND seq < :after
    ORDER BY seq DESC LIMIT :limit
) ORDER BY seq DESC;

-- name: list_newest_not_ended_of_lane
SELECT * FROM job_view WHERE seq IN (
    SELECT seq FROM jobs INDEXED BY jobs_queued_of_lane WHERE lane = :lane AND state = 'queued' AND seq < :after
    UNION ALL
    SELECT seq FROM jobs INDEXED BY jobs_holding_of_lane
    WHERE lane = :lane AND holds_slot = 1 AND state = 'running' AND seq < :after
    ORDER BY seq DESC LIMIT :limit
) ORDER BY seq DESC;

-- name: list_queues
-- The rowid of a new lane is greater than those of all lanes that exist.
SELECT queue, concurrency,
    (SELECT count(*) FROM jobs INDEXED BY jobs_holding_of_lane WHERE jobs.lane = lanes.lane AND holds_slot = 1),
    (SELECT count(*) FROM jobs INDEXED BY jobs_queued_of_lane WHERE jobs.lane = lanes.lane AND state = 'queued')
FROM lanes WHERE queue IS NOT NULL ORDER BY lanes.rowid;

-- name: read_chunks
-- The chunk with record number :first and all later ones.
SELECT records.first, records.bytes, records.timestamps, jobs.started FROM jobs JOIN records ON records.job = jobs.seq
WHERE jobs.id = :id
    AND records.first >= (SELECT max(first) FROM records WHERE job = jobs.seq AND first <= :first)
ORDER BY records.first;

-- name: get_identity
SELECT owner, key FROM identity;

-- name: add_identity
INSERT INTO identity (singleton, owner, key) VALUES (1, :owner, :key);
