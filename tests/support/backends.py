"""The stores that there are: each must pass the conformance suite in tests/store."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from harpcaller.store import Store
from harpcaller.store.sqlite import open_store

#: Opens the store that lives in a directory of its own.
Opener = Callable[[Path], Awaitable[Store]]

#: By name. A new backend is a new line here, nothing else.
BACKENDS: Mapping[str, Opener] = {"sqlite": open_store}
