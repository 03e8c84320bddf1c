"""The backends of the store. Each must pass the conformance suite in tests/store."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from harpcaller.store.sqlite import Store, open_store

#: Opens the store in a directory.
Opener = Callable[[Path], Awaitable[Store]]

#: The backends by name. A new backend needs only a new line here.
BACKENDS: Mapping[str, Opener] = {"sqlite": open_store}
