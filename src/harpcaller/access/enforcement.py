"""What the dispatcher keeps to enforce its policy: the policy in use, rates of calls, and requests that wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from harp.protocol.ends import Failed
from harpcaller.access.client import Client
from harpcaller.access.policy import ALLOW_ALL, BUILT_IN_ROLES, Action, Policy
from harpcaller.access.rules import MAX_EXAMINED, NO_LIMITS, Limits, Rate, Target
from harpcaller.access.source import PolicySource
from harpcaller.config import Config
from harpcaller.model.jobs import Job, NewJob, Subject
from harpcaller.model.latest import Latest

#: How many bytes of each payload are needed for a decision: rules refuse to judge longer ones.
SUBJECT_BYTES = MAX_EXAMINED + 1
_ROUNDING = 1e-9  #: Seconds. A shorter delay is an error of rounding.
#: Number of the latest jobs in memory, and the maximum bytes of their arguments: those of the latest ends, so that the
#: results of as many jobs are given without a look-up in the store, with rules as without.
_RECENT, _MAX_REMEMBERED = 2500, 1000
_MAX_RATES = 10_000  #: Number of rates from which unused ones are removed.


class Admission(NamedTuple):
    """How a call becomes a job."""

    owner: str | None = None  # of the job
    limits: Limits = NO_LIMITS
    request_ids_of: str = ""  # the owner among whose request ids its own is unique; empty: among those of all clients
    end: Failed | None = None  # the job ends with it, without a start
    rerun_of: str | None = None  # id of the job that is submitted again


class Wait(NamedTuple):
    """A request that waits for a job that its client may read, by a policy; `revoke` ends it."""

    client: Client
    job_id: str
    policy: Policy
    revoke: Callable[[], object]


class Rates:
    """The rates of calls. A rate of 50/s allows 50 calls at once, then one every 20 ms. They are in memory only."""

    def __init__(self) -> None:
        # For each key, the monotonic time at which all of its calls are used up by its rate.
        self._used_up_at: dict[tuple[str, Rate], float] = {}

    def take(self, wanted: Mapping[tuple[str, Rate], int], now: float) -> float | None:
        """Count calls, all or none, by owner and rate; `now` is monotonic.

        Returns 0 if they were counted, the seconds after which they can be, or None if they never can.
        """
        used_up_at = {}
        delay = _ROUNDING
        for key, calls in wanted.items():
            _, (most, seconds) = key
            if calls > most:
                return None
            at = self._used_up_at.get(key, now)
            used_up_at[key] = at = (at if at > now else now) + calls * seconds / most
            if at - now - seconds > delay:
                delay = at - now - seconds
        if delay > _ROUNDING:
            return delay
        self._used_up_at |= used_up_at
        if len(self._used_up_at) > _MAX_RATES:
            self._used_up_at = {key: at for key, at in self._used_up_at.items() if at > now}
        return 0.0


class Access:
    """The policy of a configuration, and what depends on it. Raises `ConfigError`."""

    def __init__(self, config: Config) -> None:
        self.source: PolicySource
        self.policy: Policy  #: The policy for new requests, see `refresh`.
        self._parsed: Policy  # that of the source, without the tags of hosts
        self._tags: Mapping[str, tuple[str, ...]] = {}
        self.use(PolicySource(config))
        self.rates = Rates()
        self.waits: dict[object, Wait] = {}  #: The requests that wait, by any key.
        self._recent: Latest[NewJob] = Latest(_RECENT)  # by id
        self._is_checked = True  # whether the policy in use has decided about all of them

    def use(self, source: PolicySource) -> None:
        """Use the policy of another source."""
        self.source = source
        self._parsed = source.policy
        self.policy = self._parsed.with_tags(self._tags)
        self._is_checked = False

    def use_tags(self, tags: Mapping[str, tuple[str, ...]]) -> None:
        """Use other tags of hosts. The policy becomes another one if it depends on them."""
        if tags is not self._tags and tags != self._tags:
            self._tags = tags
            if self._parsed.uses_tags:
                self.use(self.source)

    def refresh(self) -> None:
        """Use the policy of a file that has changed. It is called regularly: a request asks for no file."""
        if self._parsed is not self.source.policy:
            self.use(self.source)

    def policy_of(self, client: Client) -> Policy:
        """Return the policy for new requests of a client."""
        return BUILT_IN_ROLES if client.needs_role and self.policy is ALLOW_ALL else self.policy

    def remember(self, job: NewJob) -> None:
        """Keep a job in memory for a while, so that its client can wait for it without a look-up."""
        if self.policy is not ALLOW_ALL and len(job.arguments) <= _MAX_REMEMBERED:
            self._recent[job.id] = job

    def get_recent(self, job_id: str) -> NewJob | None:
        """Return one of the latest jobs. What decides who may do something with a job never changes."""
        return self._recent.get(job_id)

    def add_wait(self, key: object, wait: Wait) -> None:
        """Add a request that waits. Its policy may have been replaced since."""
        self.waits[key] = wait
        if wait.policy is not self.policy_of(wait.client):
            self._is_checked = False

    def take_unchecked(self) -> list[tuple[object, Wait]]:
        """Return the requests that wait by another policy than the one in use; the caller decides about them."""
        if self._is_checked:
            return []
        self._is_checked = True
        return [(key, wait) for key, wait in self.waits.items() if wait.policy is not self.policy_of(wait.client)]


def may(policy: Policy, client: Client, action: Action, job: Subject | Job | NewJob) -> bool:
    """Return whether a client may do something with a job.

    Every client may read its refused calls, because the end of such a job is the refusal.
    """
    if action is Action.READ and isinstance(job, Subject) and job.is_refused and job.owner in client.principals:
        return True
    # A job of an unknown owner has the owner "", which is no principal.
    target = Target(job.host, job.procedure, job.arguments, job.queue, job.owner or "")
    return policy.decide(client, action, target).allowed
