"""What holds for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# No deadline: a slow machine is no fault. The same examples each time, unless somebody goes looking for more:
# HYPOTHESIS_PROFILE=search ./dev test tests/protocol
settings.register_profile("usual", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "usual"))
