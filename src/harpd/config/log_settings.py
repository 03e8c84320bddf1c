"""harpd's log, set up alike in the gate and in the supervisor.

The gate sends its `LogSettings` to the supervisor as JSON: plain values only.
"""

from __future__ import annotations

import logging.config
from collections.abc import Mapping
from typing import Any, TypedDict

from harp_daemon import logs

__all__ = ["LogSettings", "configure"]


class LogSettings(TypedDict):
    """Where the log goes.

    Attributes:
        syslog: to the local syslog instead of stderr; counts when `config` is None.
        config: what `logging.config.dictConfig` takes, None when the administrator gave nothing.
    """

    syslog: bool
    config: dict[str, Any] | None


def configure(settings: Mapping[str, Any]) -> None:
    """Set up this process's log as `LogSettings` say, in place of what was set before.

    Raises:
        ValueError: `config` is not what `logging.config.dictConfig` takes; the message says what is wrong.
        OSError: a log file or the syslog socket can't be opened.
    """
    config = settings.get("config")
    if config is None:
        logs.configure(syslog=bool(settings.get("syslog")), name="harpd")
        return
    try:
        # Loggers that exist already must go on, whatever an administrator's file says or leaves out.
        logging.config.dictConfig({"version": 1, **config, "disable_existing_loggers": False})
    except (ValueError, TypeError, AttributeError, ImportError, KeyError) as error:
        cause = f": {error.__cause__}" if error.__cause__ else ""
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        raise ValueError(f"{error}{cause}") from error
