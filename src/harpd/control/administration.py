"""What an administrator asks of running wardens: their state, and to take no new calls for a while."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from harpd.config.settings import ConfigError
from harpd.control.supervisor_client import SupervisorClient, SupervisorError

__all__ = ["drain", "resume", "status"]

#: Seconds between two looks whether the last call has ended.
_PAUSE = 0.2


def _wardens(directory: Path) -> SupervisorClient:
    try:
        return SupervisorClient(directory)
    except OSError as error:
        raise ConfigError(f"runtime_directory: {directory}: {error.strerror}") from error


async def status(directory: Path) -> list[dict[str, Any]]:
    """What each warden says of itself; see `harpd.supervisor.main`.

    Args:
        directory: the runtime directory.

    Raises:
        ConfigError: there is no such directory.
        SupervisorError: a warden gives no answer.
    """
    with _wardens(directory) as wardens:
        return await wardens.request_all({"control": "status"})


async def drain(directory: Path, deadline: float | None) -> bool:
    """Have the wardens refuse new calls; return once they hold none any more.

    Args:
        directory: the runtime directory.
        deadline: seconds to wait for the end of the calls there are; None: for ever.

    Returns:
        Whether that was in time. If not, new calls are refused all the same.

    Raises:
        ConfigError: there is no such directory.
        SupervisorError: a warden gives no answer, or there is none.
    """
    with _wardens(directory) as wardens:
        await _tell(wardens, "drain")
        try:
            async with asyncio.timeout(deadline):
                while True:
                    found = await wardens.request_all({"control": "status"})
                    if not any(warden["calls"] + warden["resumable"] for warden in found):
                        return True
                    await asyncio.sleep(_PAUSE)
        except TimeoutError:
            return False


async def resume(directory: Path) -> None:
    """Have the wardens take new calls again. Raises as `drain`."""
    with _wardens(directory) as wardens:
        await _tell(wardens, "resume")


async def _tell(wardens: SupervisorClient, command: str) -> None:
    if not await wardens.request_all({"control": command}):
        raise SupervisorError("the warden of the calls does not run")
