"""The runtime directory: sockets and state files of harpd.

One frontend and one launcher lock it. They are parts of one program, or two programs.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from harp_daemon.settings import ConfigError


def _check_owner(path: Path, file: Path) -> None:
    """Raise `ConfigError` if another user can write there: this user could impersonate the supervisor."""
    status = path.stat()
    where = f"{file}: runtime_directory: {path}"
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{where}: owned by user {status.st_uid}; change the owner to the user that harpd runs as")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{where}: other users can write there; run chmod go-w")


@contextmanager
def runtime_directory(configured: str | None, file: Path, *roles: str) -> Iterator[Path]:
    """Create the runtime directory if it is missing, and lock it for the roles of this program.

    Args:
        configured: its path; None: a temporary directory, removed at the end.
        file: the configuration file, for messages.
        *roles: ``frontend``, ``launcher`` or both; each role has a lock file.

    Raises:
        ConfigError: it cannot be created, is not a directory, other users can write there, or a running program has
            one of the roles.
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
            for role in roles:
                descriptor = os.open(path / f"{role}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                closing.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{file}: runtime_directory: {path}: used by another running harpd") from error
        except OSError as error:
            raise ConfigError(f"{file}: runtime_directory: {path}: {error.strerror}") from error
        yield path
