"""What a host is asked for a job's call: to start it, to go on with it. Pure."""

from __future__ import annotations

from harp.protocol.harpd import Attach, CallTerms, Request
from harpcaller.config import Config
from harpcaller.hosts.inventory import Host
from harpcaller.model.jobs import Identity, Job

__all__ = ["attach", "start"]


def start(job: Job, host: Host, warden: str | None, keep: bool, identity: Identity, config: Config) -> Request:
    """The request that starts a job's call.

    Args:
        job: the job.
        host: where.
        warden: the warden that shall keep the call; None: it is to be a tied one.
        keep: whether the connection is to be kept for another call.
        identity: who we are to the hosts.
        config: its `keep_running` and `linger` count.
    """
    terms = None
    if warden is not None:
        terms = CallTerms(
            id=job.id,
            owner=identity.owner_at(host.hostname),
            secret=identity.secret(job.id),
            warden=warden,
            keep_running=config.keep_running,
            linger=config.linger,
            timeout=job.timeout,
            max_exec_time=job.max_exec_time,
        )
    return Request(job.procedure, job.arguments, host.user, host.password, terms, keep and terms is not None)


def attach(job_id: str, host: Host, since: int, identity: Identity) -> Attach:
    """The request that goes on with the call of a job from record number `since` on."""
    owner, secret = identity.owner_at(host.hostname), identity.secret(job_id)
    return Attach(job_id, owner, secret, since, host.user, host.password)
