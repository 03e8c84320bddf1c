"""The program `harp`, as ``python -m harp``."""

import sys

from harp.cli import main

if __name__ == "__main__":
    sys.exit(main())
