"""Program: the client of a peer, named by the first argument."""

from __future__ import annotations

import sys
from importlib import import_module

from bench.clients import serve

serve(import_module(f"bench.peers.{sys.argv[1]}").WORKS)
