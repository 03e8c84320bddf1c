-- Lists of a host's and of a queue's jobs, newest first or oldest first, whatever else there is.
-- No row of an old file is written anew; the indexes are made from a few passes over the table of jobs.

-- Every index of jobs ends with `place`, as it is the row's id: with all columns before it given, it is in order.
CREATE INDEX jobs_of_host ON jobs (host);
-- Only jobs that have a queue: the other lanes are called host:... A statement that uses it says so as well.
CREATE INDEX jobs_of_queue ON jobs (lane) WHERE lane >= 'queue:';

-- Those of a host that have not ended are found among all that have not, in the index alone.
DROP INDEX jobs_not_ended;
CREATE INDEX jobs_not_ended ON jobs (place, host, ended) WHERE ended IS NULL;

-- Those of a lane that have not ended wait or run, and those that run hold a slot: jobs_holding_of_lane has them. So a
-- job that starts leaves this index, instead of moving in it.
DROP INDEX jobs_not_ended_of_lane;
CREATE INDEX jobs_queued_of_lane ON jobs (lane, state, place) WHERE state = 'queued';

DROP TRIGGER job_moved;
CREATE TRIGGER job_moved AFTER UPDATE OF state, holds_slot ON jobs
BEGIN
    UPDATE lanes
    SET head = (SELECT min(place) FROM jobs WHERE lane = NEW.lane AND state = 'queued'),
        is_full = concurrency IS NOT NULL AND concurrency <= (
            SELECT count(*) FROM jobs WHERE lane = NEW.lane AND holds_slot = 1
        )
    WHERE lane = NEW.lane;
    DELETE FROM lanes
    WHERE lane = NEW.lane
        AND NOT EXISTS (SELECT 1 FROM jobs WHERE lane = NEW.lane AND state = 'queued')
        AND NOT EXISTS (SELECT 1 FROM jobs WHERE lane = NEW.lane AND holds_slot = 1);
END;
