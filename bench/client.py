"""Program: run one function of a client module and print its figures.

`python -m bench.client MODULE FUNCTION [ARGUMENTS]`: FUNCTION is a key of the `FUNCTIONS` of MODULE, ARGUMENTS a JSON
object. The last line of stdout is `{"figures": ...}` or `{"missing": WHY}`; everything else goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module

from bench.load import Missing


def main(module: str, function: str, arguments: str = "{}") -> None:
    """Run the function; print the answer for the harness."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        functions = import_module(module).FUNCTIONS
        answer = {"figures": functions[function](**json.loads(arguments))}
    except Missing as lack:
        answer = {"missing": str(lack)}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
