-- The secret of a call depends on its host, except for jobs that were submitted before.

ALTER TABLE identity ADD COLUMN shared_secrets_until REAL NOT NULL DEFAULT 0;  -- time of the latest such submission
UPDATE identity SET shared_secrets_until = (SELECT coalesce(max(submitted), 0) FROM jobs);
