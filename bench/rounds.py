"""The order of things: run after run, each contender is started, does its works, and ends before the next is started.

So nothing else of the measurement runs meanwhile, and what slows the machine for a while slows neighbours, not one
side. Who begins a run is another one in each. A contender that breaks is left out from then on, with the reason; what
it has done stays.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.clients import Missing
from bench.contenders import Contender, Place
from bench.figures import Results
from bench.processes import Broken, Client
from bench.works import Part, Sizes, Work

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
    runs = part.runs(sizes) if contenders else 0
    for run in range(runs):
        first = run % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            works = [
                work for work in part.works if work.key in contender.works and (contender.name, work.key) not in out
            ]
            if not works:
                continue
            say(f"{part.key}, run {run + 1} of {runs}: {contender.name}")
            own = directory / f"{part.key}-{run}-{contenders.index(contender)}"
            own.mkdir()
            own.chmod(0o755)
            session = _Session(part.key, contender, run, sizes, results)
            try:
                with contender.serve(Place(own, directory, peers, sizes)) as client:
                    out |= {(contender.name, key) for key in session.do(works, client)}
                    session.at = "its end"
            except (Missing, Broken, OSError, AssertionError) as error:
                out |= {(contender.name, work.key) for work in works}
                results.leave_out(part.key, contender.name, session.at, str(error) or repr(error))
            finally:
                shutil.rmtree(own, ignore_errors=True)


@dataclass
class _Session:
    """A contender's turn in a run.

    Attributes:
        at: what it is about, for the note when it breaks.
    """

    part: str
    contender: Contender
    run: int
    sizes: Sizes
    results: Results
    at: str = "its start"

    def do(self, works: Sequence[Work], client: Client) -> Iterator[str]:
        """Have the works done; give those that can't be."""
        # For some contenders two works are the same, as where no process is made for each call anyway.
        known: dict[tuple[str, str], dict[str, float]] = {}
        for work in works:
            self.at = work.rows[0].title
            name, request = self.contender.works[work.key], work.request(self.sizes)
            asked = (name, repr(request))
            try:
                if asked not in known:
                    known[asked] = client.ask(name, work.deadline(self.sizes), **request)
            except Missing as lack:
                self.results.leave_out(self.part, self.contender.name, self.at, str(lack))
                yield work.key
            else:
                for row in work.rows:
                    values = row.values(known[asked])
                    for number, value in enumerate(values, self.run * len(values)):
                        self.results.add(row.key, self.contender.name, number, value)
