"""The order of a run: each contender is started, does its workloads, and ends before the next one is started.

So nothing else of the measurement runs at the same time, and a slow period of the machine affects neighbours alike.
Each run begins with another contender. A contender that fails is left out from then on; its earlier figures stay.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

from bench.contenders import Contender, Place
from bench.load import Figures, Missing
from bench.processes import Broken
from bench.results import Results
from bench.workloads import Part, Sizes


def measure(
    part: Part,
    contenders: Sequence[Contender],
    sizes: Sizes,
    runs: int,
    place: Place,
    results: Results,
    say: Callable[[str], None],
) -> None:
    """Measure a part so many times; add figures, and what was left out, to the results.

    Each contender has a directory of its own in the place's directory while it runs. `say` receives progress.
    """
    broken: set[str] = set()
    for run in range(runs):
        first = run % max(1, len(contenders))
        for number, contender in enumerate([*contenders[first:], *contenders[:first]]):
            if contender.name in broken:
                continue
            say(f"{part.key}, run {run + 1} of {runs}: {contender.name}")
            own = place.directory / f"{part.key}-{run}-{number}"
            own.mkdir()
            try:
                _measure(part, contender, sizes, run, Place(own, place.peers), results)
            except (Missing, Broken, OSError, AssertionError) as error:
                broken.add(contender.name)
                results.leave_out(part.key, contender.name, str(error) or repr(error))
            finally:
                shutil.rmtree(own, ignore_errors=True)


def _measure(part: Part, contender: Contender, sizes: Sizes, run: int, place: Place, results: Results) -> None:
    # Two workloads can be the same for a contender: some have shared worker processes in any case.
    known: dict[tuple[str, str], Figures] = {}
    with contender.start(place) as ask:
        for workload in part.workloads:
            function = contender.functions.get(workload.key)
            if function is None:
                continue
            arguments = workload.arguments(sizes)
            asked = (function, repr(arguments))
            try:
                if asked not in known:
                    known[asked] = ask(function, arguments, workload.deadline)
            except Missing as lack:
                results.leave_out(part.key, contender.name, f"{workload.key}: {lack}")
                continue
            for row in workload.rows:
                if row.figure in known[asked]:  # floors have fewer figures
                    results.add(row.key, contender.name, run, known[asked][row.figure])
