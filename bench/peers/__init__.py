"""Peers: for each a module with what its workers run and what its client does, under the peers' own Python.

`python -m bench.peers NAME` is the client of the module NAME: its `WORKS` are what it can be asked for. Each uses its
library as the library's documentation recommends; docs/performance.md says how each is configured.
"""

from __future__ import annotations

import json
import os
from typing import Any

#: What the harness tells a peer's programs: ports, files, switches.
SETTINGS: dict[str, Any] = json.loads(os.environ.get("BENCH_SETTINGS", "{}"))
