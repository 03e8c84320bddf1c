-- The statements of the store, each under its name. The verbs are in writes.py and reads.py.
-- A write runs alone: what it read in its transaction stays true until it commits.

-- name: add_lane
-- Nothing happens when it is there: the first job of a queue decides its concurrency.
INSERT INTO lanes (lane, queue, concurrency) VALUES (:lane, :queue, :concurrency) ON CONFLICT DO NOTHING;

-- name: add_job
INSERT INTO jobs (id, lane, host, submitted) VALUES (:id, :lane, :host, :now);

-- name: add_call
INSERT INTO calls (job, procedure, arguments, timeout, max_exec_time, queue, info)
VALUES (:place, :procedure, :arguments, :timeout, :max_exec_time, :queue, :info);

-- name: next_head
-- The first head behind a place, of the lanes that have room.
SELECT jobs.place, jobs.host FROM lanes INDEXED BY lanes_with_room JOIN jobs ON jobs.place = lanes.head
WHERE lanes.head > :place AND lanes.is_full = 0 ORDER BY lanes.head LIMIT 1;

-- name: running_on_host
SELECT count(*) FROM jobs INDEXED BY jobs_running_on_host WHERE host = :host AND state = 'running';

-- name: start_job
UPDATE jobs SET state = 'running', started = :now WHERE place = :place;

-- name: find_job
SELECT place, state, records FROM jobs WHERE id = :id;

-- name: end_job
UPDATE jobs SET state = :state, ended = :now WHERE place = :place;

-- name: add_end
INSERT INTO ends (job, body) VALUES (:place, :body);

-- name: not_ended_of_lane
SELECT place, id, state FROM jobs INDEXED BY jobs_not_ended_of_lane
WHERE lane = :lane AND ended IS NULL ORDER BY place;

-- name: running_jobs
SELECT jobs.place FROM jobs INDEXED BY jobs_running_on_host WHERE state = 'running' ORDER BY jobs.place;

-- name: last_chunk
-- The last chunk of a job's records, when it is small enough to grow.
SELECT first, count, bytes FROM records
WHERE job = :place AND first = (SELECT max(first) FROM records WHERE job = :place) AND length(bytes) < :most;

-- name: add_chunk
INSERT INTO records (job, first, count, bytes) VALUES (:place, :first, :count, :bytes);

-- name: grow_chunk
UPDATE records SET count = :count, bytes = :bytes WHERE job = :place AND first = :first;

-- name: count_records
UPDATE jobs SET records = :records WHERE place = :place;

-- name: old_jobs
-- Ended jobs with the size of their payloads; the oldest end first.
SELECT jobs.place, length(calls.arguments) + length(calls.info) + coalesce(length(ends.body), 0)
FROM jobs INDEXED BY jobs_ended JOIN calls ON calls.job = jobs.place LEFT JOIN ends ON ends.job = jobs.place
WHERE jobs.ended < :before ORDER BY jobs.ended LIMIT :limit;

-- name: add_leftover
INSERT INTO leftovers (job) SELECT :place WHERE EXISTS (SELECT 1 FROM records WHERE job = :place);

-- name: delete_job
DELETE FROM jobs WHERE place = :place;

-- name: first_leftover
SELECT min(job) FROM leftovers;

-- name: chunks
SELECT rowid, length(bytes) FROM records WHERE job = :place LIMIT :limit;

-- name: delete_chunk
DELETE FROM records WHERE rowid = :rowid;

-- name: delete_leftover
DELETE FROM leftovers WHERE job = :place AND NOT EXISTS (SELECT 1 FROM records WHERE job = :place);

-- name: get_job
SELECT * FROM whole_jobs WHERE id = :id;

-- name: get_job_at
SELECT * FROM whole_jobs WHERE place = :place;

-- name: list_jobs
SELECT * FROM whole_jobs WHERE place > :after ORDER BY place LIMIT :limit;

-- name: list_jobs_of_lane
SELECT * FROM whole_jobs WHERE lane = :lane AND place > :after ORDER BY place LIMIT :limit;

-- name: list_jobs_not_ended
SELECT * FROM whole_jobs WHERE ended IS NULL AND place > :after ORDER BY place LIMIT :limit;

-- name: list_jobs_not_ended_of_lane
SELECT * FROM whole_jobs WHERE lane = :lane AND ended IS NULL AND place > :after ORDER BY place LIMIT :limit;

-- name: list_queues
-- A lane's rowid is greater than those of all lanes that were there before it.
SELECT queue, concurrency,
    (SELECT count(*) FROM jobs WHERE jobs.lane = lanes.lane AND state = 'running' AND ended IS NULL),
    (SELECT count(*) FROM jobs WHERE jobs.lane = lanes.lane AND state = 'queued' AND ended IS NULL)
FROM lanes WHERE queue IS NOT NULL ORDER BY lanes.rowid;

-- name: read_chunks
-- From the chunk that holds record number :first on.
SELECT records.first, records.bytes FROM jobs JOIN records ON records.job = jobs.place
WHERE jobs.id = :id
    AND records.first >= (SELECT max(first) FROM records WHERE job = jobs.place AND first <= :first)
ORDER BY records.first;
