-- The statements of the store, each under its name. The verbs are in writes.py and reads.py.
-- A write runs alone: what it read in its transaction stays true until it commits.

-- name: add_lane
-- Nothing happens when it is there: the first job of a queue decides its concurrency.
INSERT INTO lanes (lane, queue, concurrency) VALUES (?, ?, ?) ON CONFLICT DO NOTHING;

-- name: add_job
INSERT INTO jobs (id, lane, host, submitted) VALUES (?, ?, ?, ?);

-- name: last_place
SELECT last_insert_rowid();

-- name: add_call
INSERT INTO calls (job, procedure, arguments, timeout, max_exec_time, queue, info)
VALUES (?, ?, ?, ?, ?, ?, ?);

-- name: next_head
-- The first head behind a place, of the lanes that have room.
SELECT jobs.place, jobs.host FROM lanes INDEXED BY lanes_with_room JOIN jobs ON jobs.place = lanes.head
WHERE lanes.head > :place AND lanes.is_full = 0 ORDER BY lanes.head LIMIT 1;

-- name: holding_on_host
SELECT count(*) FROM jobs INDEXED BY jobs_holding_on_host WHERE host = :host AND holds_slot = 1;

-- name: start_job
-- A claim may have been asked for before the job, and comes behind it all the same.
UPDATE jobs SET state = 'running', started = max(:now, submitted), holds_slot = 1 WHERE place = :place;

-- name: find_job
SELECT place, state, records, holds_slot FROM jobs WHERE id = :id;

-- name: end_job
UPDATE jobs SET state = :state, ended = :now, stop = :stop, holds_slot = :holds_slot WHERE place = :place;

-- name: add_end
INSERT INTO ends (job, body) VALUES (:place, :body);

-- name: settle_stop
UPDATE jobs SET stop = :stop, holds_slot = :holds_slot WHERE place = :place;

-- name: release_slot
UPDATE jobs SET holds_slot = 0 WHERE place = :place;

-- name: note_facts
-- A parameter that is NULL leaves its column as it is.
INSERT INTO facts (job, call, stopped, receipt, evidence) VALUES (:place, :call, :stopped, :receipt, :evidence)
ON CONFLICT (job) DO UPDATE SET
    call = coalesce(:call, call),
    stopped = coalesce(:stopped, stopped),
    receipt = coalesce(:receipt, receipt),
    evidence = coalesce(:evidence, evidence);

-- name: not_ended_of_lane
SELECT place, id, state FROM jobs INDEXED BY jobs_queued_of_lane WHERE lane = :lane AND state = 'queued'
UNION ALL
SELECT place, id, state FROM jobs INDEXED BY jobs_holding_of_lane
WHERE lane = :lane AND holds_slot = 1 AND state = 'running'
ORDER BY place;

-- name: last_chunk
-- The last chunk of a job's records, when it is small enough to grow.
SELECT first, count, bytes, made FROM records
WHERE job = :place AND first = (SELECT max(first) FROM records WHERE job = :place)
    AND length(bytes) + length(made) < :most;

-- name: add_chunk
INSERT INTO records (job, first, count, bytes, made) VALUES (:place, :first, :count, :bytes, :made);

-- name: grow_chunk
UPDATE records SET count = :count, bytes = :bytes, made = :made WHERE job = :place AND first = :first;

-- name: count_records
UPDATE jobs SET records = :records WHERE place = :place;

-- name: old_jobs
-- Ended jobs with the size of what is stored of them, without the records; the oldest end first.
SELECT jobs.place,
    length(calls.arguments) + length(calls.info) + coalesce(length(ends.body), 0)
    + coalesce(length(facts.call), 0) + coalesce(length(facts.stopped), 0)
    + coalesce(length(facts.receipt), 0) + coalesce(length(facts.evidence), 0)
FROM jobs INDEXED BY jobs_ended
    JOIN calls ON calls.job = jobs.place
    LEFT JOIN ends ON ends.job = jobs.place
    LEFT JOIN facts ON facts.job = jobs.place
WHERE jobs.ended < :before AND jobs.holds_slot = 0 ORDER BY jobs.ended LIMIT :limit;

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

-- name: get_facts
SELECT call, stopped, receipt, evidence FROM facts WHERE job = :place;

-- name: record_bytes
-- Without the line feeds between them.
SELECT coalesce(sum(length(bytes) - count + 1), 0) FROM records WHERE job = :place;

-- name: waiting
SELECT
    (
        SELECT count(*) FROM jobs INDEXED BY jobs_queued_of_lane
        WHERE lane = waiting.lane AND state = 'queued' AND place <= waiting.place
    ),
    lanes.concurrency,
    (SELECT count(*) FROM jobs INDEXED BY jobs_holding_of_lane WHERE lane = waiting.lane AND holds_slot = 1),
    (SELECT count(*) FROM jobs INDEXED BY jobs_holding_on_host WHERE host = waiting.host AND holds_slot = 1)
FROM jobs AS waiting JOIN lanes ON lanes.lane = waiting.lane
WHERE waiting.place = :place;

-- name: holders
SELECT jobs.id FROM jobs INDEXED BY jobs_holding_of_lane
WHERE jobs.lane = (SELECT lane FROM jobs WHERE place = :place) AND jobs.holds_slot = 1
ORDER BY jobs.place LIMIT :limit;

-- name: held_jobs
SELECT * FROM whole_jobs
WHERE place IN (SELECT place FROM jobs INDEXED BY jobs_holding_on_host WHERE holds_slot = 1) ORDER BY place;

-- name: list_jobs
SELECT * FROM whole_jobs WHERE place > :after ORDER BY place LIMIT :limit;

-- name: list_jobs_of_host
SELECT * FROM whole_jobs WHERE host = :host AND place > :after ORDER BY place LIMIT :limit;

-- name: list_jobs_of_lane
SELECT * FROM whole_jobs WHERE lane = :lane AND lane >= 'queue:' AND place > :after
ORDER BY place LIMIT :limit;

-- name: list_jobs_not_ended
SELECT * FROM whole_jobs WHERE ended IS NULL AND place > :after ORDER BY place LIMIT :limit;

-- name: list_jobs_not_ended_of_host
SELECT * FROM whole_jobs WHERE place IN (
    SELECT place FROM jobs INDEXED BY jobs_not_ended WHERE ended IS NULL AND host = :host AND place > :after
    ORDER BY place LIMIT :limit
) ORDER BY place;

-- name: list_jobs_not_ended_of_lane
SELECT * FROM whole_jobs WHERE place IN (
    SELECT place FROM jobs INDEXED BY jobs_queued_of_lane WHERE lane = :lane AND state = 'queued' AND place > :after
    UNION ALL
    SELECT place FROM jobs INDEXED BY jobs_holding_of_lane
    WHERE lane = :lane AND holds_slot = 1 AND state = 'running' AND place > :after
    ORDER BY place LIMIT :limit
) ORDER BY place;

-- name: list_newest
-- The same lists from their other end, for jobs before a place.
SELECT * FROM whole_jobs WHERE place < :after ORDER BY place DESC LIMIT :limit;

-- name: list_newest_of_host
SELECT * FROM whole_jobs WHERE host = :host AND place < :after ORDER BY place DESC LIMIT :limit;

-- name: list_newest_of_lane
SELECT * FROM whole_jobs WHERE lane = :lane AND lane >= 'queue:' AND place < :after
ORDER BY place DESC LIMIT :limit;

-- name: list_newest_not_ended
SELECT * FROM whole_jobs WHERE ended IS NULL AND place < :after ORDER BY place DESC LIMIT :limit;

-- name: list_newest_not_ended_of_host
SELECT * FROM whole_jobs WHERE place IN (
    SELECT place FROM jobs INDEXED BY jobs_not_ended WHERE ended IS NULL AND host = :host AND place < :after
    ORDER BY place DESC LIMIT :limit
) ORDER BY place DESC;

-- name: list_newest_not_ended_of_lane
SELECT * FROM whole_jobs WHERE place IN (
    SELECT place FROM jobs INDEXED BY jobs_queued_of_lane WHERE lane = :lane AND state = 'queued' AND place < :after
    UNION ALL
    SELECT place FROM jobs INDEXED BY jobs_holding_of_lane
    WHERE lane = :lane AND holds_slot = 1 AND state = 'running' AND place < :after
    ORDER BY place DESC LIMIT :limit
) ORDER BY place DESC;

-- name: list_queues
-- A lane's rowid is greater than those of all lanes that were there before it.
SELECT queue, concurrency,
    (SELECT count(*) FROM jobs INDEXED BY jobs_holding_of_lane WHERE jobs.lane = lanes.lane AND holds_slot = 1),
    (SELECT count(*) FROM jobs INDEXED BY jobs_queued_of_lane WHERE jobs.lane = lanes.lane AND state = 'queued')
FROM lanes WHERE queue IS NOT NULL ORDER BY lanes.rowid;

-- name: read_chunks
-- From the chunk that holds record number :first on.
SELECT records.first, records.bytes, records.made, jobs.started FROM jobs JOIN records ON records.job = jobs.place
WHERE jobs.id = :id
    AND records.first >= (SELECT max(first) FROM records WHERE job = jobs.place AND first <= :first)
ORDER BY records.first;

-- name: get_identity
SELECT owner, key FROM identity;

-- name: add_identity
INSERT INTO identity (only, owner, key) VALUES (1, :owner, :key);
