-- The named statements of the store. The verbs that run them are in writes.py and reads.py.
-- No other transaction writes at the same time, so rows that a verb has read stay valid until it commits.

-- name: last_seq
-- The last sequence number that was ever used.
SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'jobs';

-- name: submission_times
-- The submission time of the last job, and the disorder of all.
SELECT coalesce((SELECT submitted FROM jobs WHERE seq = (SELECT max(seq) FROM jobs)), 0), disorder FROM submission_times;

-- name: set_disorder
UPDATE submission_times SET disorder = ?;

-- name: queue_limits
SELECT lane, concurrency FROM queues;

-- name: queued_to_cache
SELECT seq, lane, owner FROM jobs INDEXED BY jobs_queued_of_lane WHERE state = 'queued' ORDER BY lane, seq;

-- name: slot_holders_to_cache
SELECT seq, id, lane, owner, host, state, records FROM jobs
WHERE seq IN (SELECT seq FROM jobs INDEXED BY jobs_holding WHERE holds_slot = 1);

-- name: add_queue
INSERT INTO queues (lane, name, concurrency) VALUES (?, ?, ?);

-- name: delete_queue
DELETE FROM queues WHERE lane = ?;

-- name: add_job
INSERT INTO jobs (seq, id, lane, host, state, submitted, started, holds_slot, owner) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: add_call
INSERT INTO calls (
    job, procedure, arguments, timeout, max_exec_time, queue, info, start_within, max_running, secrets, rerun_of,
    max_record_bytes
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: jobs_with_secrets
SELECT job FROM calls INDEXED BY calls_with_secrets WHERE secrets IS NOT NULL;

-- name: erase_secrets
UPDATE calls SET secrets = NULL WHERE job = ?;

-- name: find_request_id
-- The owner's own one comes first. The job's id is NULL if the job was deleted or is not inserted yet.
SELECT request_ids.job, jobs.id, request_ids.call_digest, request_ids.owner = :owner
FROM request_ids LEFT JOIN jobs ON jobs.seq = request_ids.job
WHERE request_ids.request_id = :request_id AND request_ids.owner IN (:owner, x'') ORDER BY request_ids.owner DESC;

-- name: add_request_id
-- It replaces the request id of a deleted job.
INSERT OR REPLACE INTO request_ids (request_id, owner, job, call_digest, submitted) VALUES (?, ?, ?, ?, ?);

-- name: delete_request_ids
DELETE FROM request_ids WHERE (request_id, owner) IN (
    SELECT request_id, owner FROM request_ids WHERE submitted < :before ORDER BY submitted LIMIT :limit
);

-- name: stage_jobs
INSERT INTO staged_jobs (submitted, jobs) VALUES (?, ?) RETURNING step;

-- name: staged_jobs
SELECT step, submitted, jobs FROM staged_jobs ORDER BY step;

-- name: complete_staged_jobs
UPDATE staged_jobs SET submitted = ? WHERE step = ?;

-- name: discard_staged_parts
DELETE FROM staged_jobs WHERE submitted < 0;

-- name: unstage_jobs
DELETE FROM staged_jobs WHERE step = ?;

-- name: start_job
-- A guarded write: a job that is not queued does not change, and the transaction fails.
UPDATE jobs SET state = 'running', started = ?, holds_slot = 1 WHERE seq = ? AND state = 'queued';

-- name: requeue_job
UPDATE jobs SET state = 'queued', started = NULL, holds_slot = 0, tried = coalesce(tried, ?)
WHERE seq = ? AND state = 'running';

-- name: expired
-- The jobs of a host's lane that have waited long enough for a start: since :since, or since their first attempt if it
-- was before :restarted. Jobs submitted after the latest attempt, at :failed, do not expire.
SELECT jobs.seq, jobs.id, jobs.owner
FROM jobs INDEXED BY jobs_queued_of_lane JOIN calls ON calls.job = jobs.seq
WHERE jobs.lane = :lane AND jobs.state = 'queued' AND jobs.submitted <= :failed
    AND max(jobs.submitted, iif(jobs.tried < :restarted, jobs.tried, :since)) + calls.start_within <= :now
ORDER BY jobs.seq LIMIT :limit;

-- name: next_deadline
SELECT min(max(jobs.submitted, iif(jobs.tried < :restarted, jobs.tried, :since)) + calls.start_within)
FROM jobs INDEXED BY jobs_queued_of_lane JOIN calls ON calls.job = jobs.seq
WHERE jobs.lane = :lane AND jobs.state = 'queued';

-- name: find_queued_job
SELECT seq, lane, owner FROM jobs WHERE id = ? AND state = 'queued';

-- name: find_job
SELECT seq FROM jobs WHERE id = ?;

-- name: end_job
-- A guarded write: the first end wins.
-- The clock may have been set back since the start: the times of a job never run backwards.
UPDATE jobs SET state = ?, ended = max(?, coalesce(started, submitted)), stop = ?, holds_slot = ?,
    end_type = ?, end_message = ?
WHERE seq = ? AND ended IS NULL;

-- name: end_jobs
-- The same for several jobs.
UPDATE jobs SET state = ends.column1, ended = max(ends.column2, coalesce(started, submitted)), stop = ends.column3,
    holds_slot = ends.column4, end_type = ends.column5, end_message = ends.column6
FROM (VALUES (?, ?, ?, ?, ?, ?, ?)) AS ends
WHERE seq = ends.column7 AND ended IS NULL;

-- name: finalize_stop
UPDATE jobs SET stop = ?, holds_slot = ? WHERE seq = ? AND ended IS NOT NULL AND holds_slot = 1;

-- name: add_outcome
-- A parameter that is NULL leaves its column as it is.
INSERT INTO outcomes (job, body, call, stop_request, stop_report, exit_info) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (job) DO UPDATE SET
    body = coalesce(excluded.body, body),
    call = coalesce(excluded.call, call),
    stop_request = coalesce(excluded.stop_request, stop_request),
    stop_report = coalesce(excluded.stop_report, stop_report),
    exit_info = coalesce(excluded.exit_info, exit_info);

-- name: queued_of_lane
SELECT seq, id, owner FROM jobs INDEXED BY jobs_queued_of_lane WHERE lane = ? AND state = 'queued' ORDER BY seq LIMIT ?;

-- name: add_chunk
INSERT INTO records (job, first, count, bytes, timestamps) VALUES (?, ?, ?, ?, ?);

-- name: grow_chunk
UPDATE records SET count = ?, bytes = ?, timestamps = ? WHERE job = ? AND first = ?;

-- name: count_records
UPDATE jobs SET records = ? WHERE seq = ? AND state = 'running';

-- name: old_jobs
-- Ended jobs and the size of their stored payloads without records; the oldest end first.
SELECT jobs.seq, jobs.id,
    length(calls.arguments) + length(calls.info) + coalesce(length(outcomes.body), 0)
    + coalesce(length(outcomes.call), 0) + coalesce(length(outcomes.stop_request), 0)
    + coalesce(length(outcomes.stop_report), 0) + coalesce(length(outcomes.exit_info), 0)
FROM jobs INDEXED BY jobs_ended
    JOIN calls ON calls.job = jobs.seq
    LEFT JOIN outcomes ON outcomes.job = jobs.seq
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

-- name: get_subject
-- At most :bytes of each payload.
SELECT jobs.owner, jobs.host, calls.procedure, substr(calls.arguments, 1, :bytes), substr(calls.queue, 1, :bytes),
    jobs.state = 'failed' AND jobs.started IS NULL AND jobs.ended = jobs.submitted
FROM jobs JOIN calls ON calls.job = jobs.seq WHERE jobs.id = :id;

-- name: get_subjects
-- Several of them; NULL instead of long arguments, whose beginning is read otherwise.
SELECT jobs.seq, jobs.owner, jobs.host, calls.procedure,
    CASE WHEN length(calls.arguments) <= 4096 THEN calls.arguments END, length(calls.arguments), calls.queue,
    jobs.state = 'failed' AND jobs.started IS NULL AND jobs.ended = jobs.submitted
FROM jobs JOIN calls ON calls.job = jobs.seq WHERE jobs.seq IN (:seqs);

-- name: get_summaries
-- NULL instead of long payloads, whose beginning is read otherwise.
SELECT jobs.seq, jobs.id, jobs.state, jobs.host, calls.procedure,
    CASE WHEN jobs.lane >= 'queue:' THEN substr(jobs.lane, 7) END, calls.queue, jobs.owner,
    jobs.submitted, jobs.started, jobs.ended, jobs.records, jobs.end_type, jobs.end_message, jobs.stop, jobs.holds_slot,
    CASE WHEN length(calls.arguments) <= 4096 THEN calls.arguments END,
    CASE WHEN length(calls.info) <= 4096 THEN calls.info END, calls.rerun_of
FROM jobs JOIN calls ON calls.job = jobs.seq WHERE jobs.seq IN (:seqs);

-- name: count_states
-- From the indexes alone. A job that is in none of the partial ones has returned.
WITH others AS (
    SELECT 'queued' AS state, count(*) AS jobs FROM jobs INDEXED BY jobs_queued WHERE state = 'queued'
    UNION ALL
    SELECT 'running', count(*) FROM jobs INDEXED BY jobs_holding WHERE holds_slot = 1 AND state = 'running'
    UNION ALL
    SELECT state, count(*) FROM jobs INDEXED BY jobs_not_returned
    WHERE state IN ('raised', 'failed', 'cancelled') AND ended IS NOT NULL AND state <> 'returned' GROUP BY state
)
SELECT state, jobs FROM others WHERE jobs > 0
UNION ALL
SELECT 'returned', (SELECT count(*) FROM jobs) - (SELECT sum(jobs) FROM others);

-- name: count_submitted
SELECT count(*) FROM jobs WHERE seq BETWEEN :low AND :high AND submitted >= :since AND submitted < :until;

-- name: count_ended
-- In the order of the index, so that nothing is sorted.
SELECT count(*) FILTER (WHERE state = 'returned'), count(*) FILTER (WHERE state = 'raised'),
    count(*) FILTER (WHERE state = 'failed'), count(*) FILTER (WHERE state = 'cancelled')
FROM jobs INDEXED BY jobs_ended WHERE ended IS NOT NULL AND ended >= :since AND ended < :until;

-- name: bounds
SELECT (SELECT min(seq) FROM jobs), (SELECT max(seq) FROM jobs), disorder FROM submission_times;

-- name: submitted_from
-- The first job from a sequence number on.
SELECT seq, submitted FROM jobs WHERE seq >= ? ORDER BY seq LIMIT 1;

-- name: first_host
SELECT host FROM jobs INDEXED BY jobs_of_host WHERE host >= ? ORDER BY host LIMIT 1;

-- name: next_host
SELECT host FROM jobs INDEXED BY jobs_of_host WHERE host > ? ORDER BY host LIMIT 1;

-- name: get_job_by_seq
SELECT * FROM job_view WHERE seq = :seq;

-- name: get_metadata
SELECT call, stop_request, stop_report, exit_info FROM outcomes WHERE job = :seq;

-- name: record_bytes
-- Without the line feeds between them.
SELECT coalesce(sum(length(bytes) - count + 1), 0) FROM records WHERE job = :seq;

-- name: queue_position
-- The position is at most :most, if that is not negative.
SELECT
    (
        SELECT count(*) FROM (
            SELECT 1 FROM jobs INDEXED BY jobs_queued_of_lane
            WHERE lane = waiting.lane AND state = 'queued' AND seq <= waiting.seq LIMIT :most
        ) AS counted
    ),
    queues.concurrency,
    (SELECT count(*) FROM jobs INDEXED BY jobs_holding WHERE holds_slot = 1 AND lane = waiting.lane),
    (SELECT count(*) FROM jobs INDEXED BY jobs_holding WHERE holds_slot = 1 AND host = waiting.host),
    CASE WHEN calls.max_running IS NULL THEN 0 ELSE (
        SELECT count(*) FROM jobs
        WHERE seq IN (SELECT seq FROM jobs INDEXED BY jobs_holding WHERE holds_slot = 1) AND owner IS waiting.owner
    ) END,
    CASE WHEN :with_owner THEN (
        SELECT count(*) FROM jobs INDEXED BY jobs_queued_of_lane
        WHERE lane = waiting.lane AND state = 'queued' AND seq <= waiting.seq AND owner IS waiting.owner
    ) END
FROM jobs AS waiting JOIN calls ON calls.job = waiting.seq LEFT JOIN queues ON queues.lane = waiting.lane
WHERE waiting.seq = :seq;

-- name: slot_holders
SELECT id FROM jobs WHERE seq IN (
    SELECT seq FROM jobs INDEXED BY jobs_holding
    WHERE holds_slot = 1 AND lane = (SELECT lane FROM jobs WHERE seq = :seq) ORDER BY seq LIMIT :limit
) ORDER BY seq;

-- name: list_slot_holders
SELECT * FROM job_view
WHERE seq IN (SELECT seq FROM jobs INDEXED BY jobs_holding WHERE holds_slot = 1) ORDER BY seq;

-- name: list_ended_since
SELECT * FROM job_view WHERE seq IN (
    SELECT seq FROM jobs INDEXED BY jobs_ended WHERE ended IS NOT NULL AND ended >= :since ORDER BY ended LIMIT :limit
) ORDER BY seq;

-- name: list_jobs
SELECT * FROM job_view WHERE seq > :after ORDER BY seq LIMIT :limit;

-- name: list_jobs_of_host
SELECT * FROM job_view WHERE host = :host AND seq > :after ORDER BY seq LIMIT :limit;

-- name: list_jobs_of_lane
SELECT * FROM job_view WHERE lane = :lane AND lane >= 'queue:' AND seq > :after
ORDER BY seq LIMIT :limit;

-- name: list_jobs_not_ended
SELECT * FROM job_view WHERE seq IN (
    SELECT seq FROM jobs INDEXED BY jobs_queued WHERE state = 'queued' AND seq > :after
    UNION ALL
    SELECT seq FROM jobs INDEXED BY jobs_holding
    WHERE holds_slot = 1 AND state = 'running' AND seq > :after
    ORDER BY seq LIMIT :limit
) ORDER BY seq;

-- name: list_jobs_not_ended_of_host
SELECT * FROM job_view WHERE seq IN (
    SELECT seq FROM jobs INDEXED BY jobs_queued WHERE host = :host AND state = 'queued' AND seq > :after
    UNION ALL
    SELECT seq FROM jobs INDEXED BY jobs_holding
    WHERE holds_slot = 1 AND host = :host AND state = 'running' AND seq > :after
    ORDER BY seq LIMIT :limit
) ORDER BY seq;

-- name: list_jobs_not_ended_of_lane
SELECT * FROM job_view WHERE seq IN (
    SELECT seq FROM jobs INDEXED BY jobs_queued_of_lane WHERE lane = :lane AND state = 'queued' AND seq > :after
    UNION ALL
    SELECT seq FROM jobs INDEXED BY jobs_holding
    WHERE holds_slot = 1 AND lane = :lane AND state = 'running' AND seq > :after
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
SELECT * FROM job_view WHERE seq IN (
    SELECT seq FROM jobs INDEXED BY jobs_queued WHERE state = 'queued' AND seq < :after
    UNION ALL
    SELECT seq FROM jobs INDEXED BY jobs_holding
    WHERE holds_slot = 1 AND state = 'running' AND seq < :after
    ORDER BY seq DESC LIMIT :limit
) ORDER BY seq DESC;

-- name: list_newest_not_ended_of_host
SELECT * FROM job_view WHERE seq IN (
    SELECT seq FROM jobs INDEXED BY jobs_queued WHERE host = :host AND state = 'queued' AND seq < :after
    UNION ALL
    SELECT seq FROM jobs INDEXED BY jobs_holding
    WHERE holds_slot = 1 AND host = :host AND state = 'running' AND seq < :after
    ORDER BY seq DESC LIMIT :limit
) ORDER BY seq DESC;

-- name: list_newest_not_ended_of_lane
SELECT * FROM job_view WHERE seq IN (
    SELECT seq FROM jobs INDEXED BY jobs_queued_of_lane WHERE lane = :lane AND state = 'queued' AND seq < :after
    UNION ALL
    SELECT seq FROM jobs INDEXED BY jobs_holding
    WHERE holds_slot = 1 AND lane = :lane AND state = 'running' AND seq < :after
    ORDER BY seq DESC LIMIT :limit
) ORDER BY seq DESC;

-- name: list_queues
-- The rowid of a new queue is greater than those of all queues that exist.
SELECT name, concurrency,
    (SELECT count(*) FROM jobs INDEXED BY jobs_holding WHERE holds_slot = 1 AND jobs.lane = queues.lane),
    (SELECT count(*) FROM jobs INDEXED BY jobs_queued_of_lane WHERE jobs.lane = queues.lane AND state = 'queued')
FROM queues ORDER BY queues.rowid;

-- name: find_queues
-- Of one lane, or a page of all.
SELECT rowid, lane, name, concurrency,
    (SELECT count(*) FROM jobs INDEXED BY jobs_queued_of_lane WHERE jobs.lane = queues.lane AND state = 'queued'),
    (SELECT submitted FROM jobs WHERE seq = (
        SELECT min(seq) FROM jobs INDEXED BY jobs_queued_of_lane WHERE jobs.lane = queues.lane AND state = 'queued'))
FROM queues WHERE rowid > :after AND (:lane IS NULL OR lane = :lane) ORDER BY rowid LIMIT :limit;

-- name: find_queues_of_owners
-- As `find_queues`, and as if there were only the jobs of these owners.
SELECT place, lane, name, concurrency, queued, (SELECT submitted FROM jobs WHERE seq = oldest), held FROM (
    SELECT queues.rowid AS place, queues.lane AS lane, name, concurrency,
        sum(holds_slot = 0) AS queued, min(CASE WHEN holds_slot = 0 THEN seq END) AS oldest, sum(holds_slot) AS held
    FROM (
        SELECT lane, seq, 0 AS holds_slot FROM jobs INDEXED BY jobs_queued_of_lane
        WHERE state = 'queued' AND owner IN (:owners)
        UNION ALL
        SELECT lane, seq, 1 FROM jobs
        WHERE seq IN (SELECT seq FROM jobs INDEXED BY jobs_holding WHERE holds_slot = 1) AND owner IN (:owners)
    ) AS own JOIN queues ON queues.lane = own.lane
    WHERE queues.rowid > :after AND (:lane IS NULL OR queues.lane = :lane)
    GROUP BY queues.rowid ORDER BY queues.rowid LIMIT :limit
) AS own_queues;

-- name: count_queued_of_hosts_and_owners
SELECT host, count(*) FROM jobs
WHERE seq IN (SELECT seq FROM jobs INDEXED BY jobs_queued_of_lane WHERE state = 'queued' AND owner IN (:owners))
GROUP BY host;

-- name: count_holding_of_hosts_and_owners
SELECT host, count(*) FROM jobs
WHERE seq IN (SELECT seq FROM jobs INDEXED BY jobs_holding WHERE holds_slot = 1) AND owner IN (:owners) GROUP BY host;

-- name: count_holding_of_lanes
SELECT lane, count(*) FROM jobs INDEXED BY jobs_holding WHERE holds_slot = 1 GROUP BY lane;

-- name: count_queued_of_hosts
SELECT host, count(*) FROM jobs INDEXED BY jobs_queued WHERE state = 'queued' GROUP BY host;

-- name: count_holding_of_hosts
SELECT host, count(*) FROM jobs INDEXED BY jobs_holding WHERE holds_slot = 1 GROUP BY host;

-- name: read_chunks
-- The chunk with record number :first, and all later chunks.
SELECT records.first, records.bytes, records.timestamps, jobs.started FROM jobs JOIN records ON records.job = jobs.seq
WHERE jobs.id = :id
    AND records.first >= (SELECT max(first) FROM records WHERE job = jobs.seq AND first <= :first)
ORDER BY records.first;

-- name: count_queued
SELECT count(*) FROM jobs INDEXED BY jobs_queued_of_lane WHERE state = 'queued';

-- name: cancel_all_queued
UPDATE jobs SET state = 'cancelled', ended = max(:now, submitted) WHERE state = 'queued';

-- name: erase_secrets_of_ended
UPDATE calls SET secrets = NULL WHERE secrets IS NOT NULL
    AND job IN (SELECT seq FROM jobs WHERE ended IS NOT NULL AND holds_slot = 0);

-- name: delete_empty_queues
DELETE FROM queues WHERE lane NOT IN (
    SELECT lane FROM jobs WHERE state = 'queued' UNION ALL SELECT lane FROM jobs WHERE holds_slot = 1);

-- name: newest_end
SELECT max(ended) FROM jobs INDEXED BY jobs_ended WHERE ended IS NOT NULL;

-- name: get_identity
SELECT owner, key, shared_secrets_until FROM identity;

-- name: add_identity
INSERT INTO identity (singleton, owner, key) VALUES (1, :owner, :key);

-- name: count_stored
SELECT count(*) FROM jobs;

-- name: queued_gauges
SELECT count(*), (SELECT submitted FROM jobs WHERE seq = (
    SELECT min(seq) FROM jobs INDEXED BY jobs_queued WHERE state = 'queued'))
FROM jobs INDEXED BY jobs_queued WHERE state = 'queued';

-- name: slot_gauges
SELECT count(*), sum(state = 'running'), sum(ended < :before) FROM jobs
WHERE seq IN (SELECT seq FROM jobs INDEXED BY jobs_holding WHERE holds_slot = 1);

-- name: queue_gauges
SELECT (SELECT count(*) FROM queues), (
    SELECT count(*) FROM (
        SELECT lane, count(*) AS held FROM jobs INDEXED BY jobs_holding WHERE holds_slot = 1 GROUP BY lane
    ) AS holding JOIN queues ON queues.lane = holding.lane WHERE held >= concurrency);

-- name: gauges_of_queue
SELECT
    (SELECT count(*) FROM jobs INDEXED BY jobs_queued_of_lane WHERE lane = :lane AND state = 'queued'),
    (SELECT count(*) FROM jobs INDEXED BY jobs_holding WHERE holds_slot = 1 AND lane = :lane);

-- name: queued_of_hosts
SELECT host, count(*) FROM jobs INDEXED BY jobs_queued WHERE state = 'queued' GROUP BY host;
