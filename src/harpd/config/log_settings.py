"""harpd's log settings, which frontend and supervisor share.

The frontend sends its `LogSettings` to the supervisor as JSON.
"""

from __future__ import annotations

import logging.config
from collections.abc import Mapping
from typing import Any, TypedDict

from harp_daemon import logs


class LogSettings(TypedDict):
    """The destination of the log.

    Attributes:
        syslog: log to the local syslog instead of stderr; ignored if `config` is given.
        config: the argument for `logging.config.dictConfig`; None: not configured.
    """

    syslog: bool
    config: dict[str, Any] | None


def configure(settings: Mapping[str, Any]) -> None:
    """Configure this process's log, in place of its previous configuration.

    Args:
        settings: as in `LogSettings`.

    Raises:
        ValueError: `logging.config.dictConfig` rejects `config`; the message gives the reason.
        OSError: a log file or the syslog socket cannot be opened.
    """
    config = settings.get("config")
    if config is None:
        logs.configure(syslog=bool(settings.get("syslog")), name="harpd")
        return
    try:
        # Existing loggers continue to log even if the file does not name them.
        logging.config.dictConfig({"version": 1, **config, "disable_existing_loggers": False})
    except (ValueError, TypeError, AttributeError, ImportError, KeyError) as error:
        cause = f": {error.__cause__}" if error.__cause__ else ""
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        raise ValueError(f"{error}{cause}") from error
