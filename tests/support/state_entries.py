"""The entries of all state files in a runtime directory."""

from __future__ import annotations

from pathlib import Path

from harpd.supervisor.state_files import ENTRY_SIZE, Purpose, decode_entry


def read_entries(runtime_directory: Path) -> dict[str, Purpose]:
    """Return the purposes of all entries in use, by call id."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    found: dict[str, Purpose] = {}
    for file in runtime_directory.glob("calls/*.1"):
        data = file.read_bytes()
        for at in range(0, len(data), ENTRY_SIZE):
            if entry := decode_entry(data[at : at + ENTRY_SIZE], boot):
                purpose, _, state = entry
                found[state.call_id] = purpose
    return found
