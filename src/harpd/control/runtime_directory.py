"""The runtime directory: sockets and state files of harpd. One frontend and one launcher lock it.

Frontend and launcher are one program, or two services.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path

from harpd.config.settings import ConfigError

__all__ = ["Role", "runtime_directory"]


class Role(Enum):
    """A part of harpd that there is once for a runtime directory; the value names its lock."""

    FRONTEND = "gate"
    LAUNCHER = "keeper"


def _check_owner(path: Path, file: Path) -> None:
    """Whoever may write there could take the supervisors' place."""
    found = path.stat()
    whose = f"{file}: runtime_directory: {path}"
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{whose}: belongs to user {found.st_uid}; give it to the user that harpd runs as")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{whose}: others may write there; take that from them (chmod go-w)")


@contextmanager
def runtime_directory(configured: str | None, file: Path, *roles: Role) -> Iterator[Path]:
    """Make the runtime directory, and hold it as these parts of harpd.

    Args:
        configured: its path, made when it is missing; None: a fresh one that is removed at the end.
        file: the configuration file, for messages.
        *roles: the roles of this program.

    Raises:
        ConfigError: it can't be made, is not a directory, others may write there, or a running program is one of
            these parts already.
    """
    if configured is None:
        path = Path(tempfile.mkdtemp(prefix="harpd-"))
    else:
        path = Path(configured).absolute()
    with ExitStack() as closing:
        if configured is None:
            closing.callback(shutil.rmtree, path, ignore_errors=True)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_owner(path, file)
            for part in roles:
                descriptor = os.open(path / f"{part.value}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                closing.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{file}: runtime_directory: {path}: held by another running harpd") from error
        except OSError as error:
            raise ConfigError(f"{file}: runtime_directory: {path}: {error.strerror}") from error
        yield path
