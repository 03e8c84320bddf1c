"""Checks user names and passwords by the configured authentication module, which is not part of harpd and may block."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from functools import partial

from harpd.config.loaded import LoadedConfig
from harpd.frontend.thread_pool import BoundedThreadPool, TaskFailed

log = logging.getLogger("harpd.frontend")


class Authenticator:
    """The users of a configuration."""

    def __init__(self, config: LoadedConfig) -> None:
        limits = config.configuration.limits
        self._users = config.users
        self._timeout = limits.authentication_timeout
        self._thread_pool = BoundedThreadPool(limits.authentication_threads)

    def is_cached(self, user: str, password: str) -> bool:
        """Return whether the module accepts the password without blocking, by its method `check_cached`."""
        check_cached = getattr(self._users, "check_cached", None)  # not every module derives from `AuthDB`
        try:
            return check_cached is not None and check_cached(user, password) is True
        except Exception:  # noqa: BLE001 - `authenticate` is called next, and its error is logged
            return False

    async def authenticate(self, user: str, password: str, log_fields: Mapping[str, object]) -> bool:
        """Return whether the module accepts the password. It is called in a thread, with a deadline."""
        check = partial(self._users.authenticate, user, password)
        try:
            answer: object = await self._thread_pool.run(check, self._timeout)
        except TimeoutError:
            log.error("authentication timed out", extra=dict(log_fields))
            return False
        except TaskFailed as error:
            # Neither the text of the exception nor a traceback: they may contain the password.
            log.error("authentication module failed", extra={**log_fields, **_raised_at(error.__cause__)})
            return False
        if not isinstance(answer, bool):
            log.error("authentication module returned no bool", extra={**log_fields, "type": type(answer).__name__})
        elif not answer:
            log.warning("authentication failed", extra=dict(log_fields))
        return answer is True


def _raised_at(error: BaseException | None) -> dict[str, object]:
    """Return log fields of an exception that contain no secret: its type, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    location = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"
    return {"error": type(error).__name__, "location": location}
