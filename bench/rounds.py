"""The order of things: run after run, each contender is started, does its works, and ends before the next is started.

So nothing else of the measurement runs meanwhile, and what slows the machine for a while slows neighbours, not one
side. Who begins a run is another one in each. A contender that breaks is left out from then on, with the reason; what
it has done stays.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.contenders import Contender, Place
from bench.figures import Results
from bench.processes import Broken, Missing
from bench.works import Part, Sizes

__all__ = ["measure"]


def measure(
    part: Part,
    contenders: Sequence[Contender],
    sizes: Sizes,
    directory: Path,
    peers: Path | None,
    results: Results,
    say: Callable[[str], None],
) -> None:
    """Measure a part.

    Args:
        part: the works.
        contenders: who does them.
        sizes: how much of them.
        directory: where everything lies; each contender has a directory in it for as long as it runs.
        peers: the Python that has the peers' packages; None: there is none.
        results: takes the figures, and what was left out.
        say: told what is being done.
    """
    out: set[tuple[str, str]] = set()
    for run in range(sizes.runs):
        first = run % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            works = [
                work for work in part.works if work.key in contender.works and (contender.name, work.key) not in out
            ]
            if not works:
                continue
            say(f"{part.key}, run {run + 1} of {sizes.runs}: {contender.name}")
            own = directory / f"{part.key}-{run}-{contenders.index(contender)}"
            own.mkdir()
            own.chmod(0o755)
            at = "its start"
            try:
                with contender.serve(Place(own, directory, peers)) as client:
                    for work in works:
                        at = work.rows[0].title
                        try:
                            figures = client.ask(contender.works[work.key], sizes.deadline, **work.request(sizes))
                        except Missing as lack:
                            out.add((contender.name, work.key))
                            results.leave_out(part.key, contender.name, at, str(lack))
                            continue
                        for row in work.rows:
                            results.add(row.key, contender.name, run, figures[row.figure])
                    at = "its end"
            except (Missing, Broken, OSError, AssertionError) as error:
                out |= {(contender.name, work.key) for work in works}
                results.leave_out(part.key, contender.name, at, str(error) or repr(error))
            finally:
                shutil.rmtree(own, ignore_errors=True)
