"""The order of the measurement: in each round, each contender does its workloads, one after the other.

Contenders are started when they are first needed, and then wait while others are measured: an idle one costs next to
nothing, and a slow period of the machine affects neighbours alike. Each round begins with another contender. A workload
that fails is left out from then on, and a contender that fails twice; earlier figures stay.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from bench.contenders import Ask, Contender, Place
from bench.load import Figures, Missing
from bench.processes import Broken
from bench.results import Results
from bench.workloads import Part, Sizes, Workload

#: How a contender fails, and how often.
_FAILURES, _MAX_FAILURES = (Broken, OSError, AssertionError), 2


@dataclass
class Measurement:
    """What is measured, and where the figures go.

    Attributes:
        contenders: all of them.
        sizes: of all workloads.
        place: each contender gets a directory of its own in its directory.
        results: receives figures, and what was left out.
        say: receives progress.
        needed: whether a workload of a contender is measured.
    """

    contenders: Sequence[Contender]
    sizes: Sizes
    place: Place
    results: Results
    say: Callable[[str], object]
    needed: Callable[[Contender, Workload], bool] = lambda contender, workload: True
    _broken: dict[str, list[str]] = field(default_factory=dict)  # workloads by contender
    _runs: int = 0
    _once: float = 0.0  # seconds of a round that the next one does not take

    def measure(self, parts: Sequence[Part], rounds: int, until: float = float("inf")) -> int:
        """Start the contenders and measure so many rounds; end them. Return the number of rounds.

        Args:
            parts: what is measured.
            rounds: how often.
            until: no round is begun that would end after this time, in seconds of `time.monotonic`.
        """
        with ExitStack() as stack:
            running: dict[str, Ask] = {}
            for done in range(rounds):
                began, self._once = time.monotonic(), 0.0
                for part in parts:
                    self.say(f"round {done + 1} of {rounds}: {part.key}")
                    for contender in self._in_turn():
                        self._measure(part, contender, running, stack, first=done == 0)
                self._runs += 1
                if (now := time.monotonic()) + (now - began - self._once) > until:
                    break
        return done + 1

    def _in_turn(self) -> list[Contender]:
        first = self._runs % max(1, len(self.contenders))
        return [*self.contenders[first:], *self.contenders[:first]]

    def _measure(
        self, part: Part, contender: Contender, running: dict[str, Ask], stack: ExitStack, first: bool
    ) -> None:
        """Have a contender do its workloads of a part."""
        broken = self._broken.setdefault(contender.name, [])
        workloads = [
            workload
            for workload in part.workloads
            if workload.key in contender.functions and self.needed(contender, workload) and (first or not workload.once)
        ]
        sizes = replace(self.sizes, jobs=max(1, round(self.sizes.jobs * contender.jobs)))
        known: dict[tuple[str, str], Figures] = {}
        for workload in workloads:
            if workload.key in broken or len(broken) >= _MAX_FAILURES:
                continue
            try:
                ask = running.get(contender.name) or self._start(contender, running, stack)
                began = time.monotonic()
                figures = _ask(ask, contender.functions[workload.key], workload, sizes, known)
            except (Missing, *_FAILURES) as error:
                if contender.name not in running:
                    broken.extend(contender.functions)
                elif not isinstance(error, Missing):
                    broken.append(workload.key)
                self.results.leave_out(part.key, contender.name, f"{workload.key}: {str(error) or repr(error)}")
                continue
            self._once += time.monotonic() - began if workload.once else 0.0
            for row in workload.rows:
                if row.figure in figures:  # floors have fewer figures
                    self.results.add(row.key, contender.name, self._runs, figures, row.figure)

    def _start(self, contender: Contender, running: dict[str, Ask], stack: ExitStack) -> Ask:
        self.say(f"  starting {contender.name}")
        directory = self.place.directory / f"{self._runs}-{self.contenders.index(contender)}"
        directory.mkdir()
        servers = contender.start(replace(self.place, directory=directory))
        began = time.monotonic()
        running[contender.name] = servers.__enter__()
        self._once += time.monotonic() - began

        def end() -> None:
            try:
                servers.__exit__(None, None, None)
            except _FAILURES as error:
                self.results.leave_out("end", contender.name, str(error) or repr(error))
            finally:
                shutil.rmtree(directory, ignore_errors=True)

        stack.callback(end)
        return running[contender.name]


def _ask(ask: Ask, function: str, workload: Workload, sizes: Sizes, known: dict[tuple[str, str], Figures]) -> Figures:
    """Return the figures of a workload: known ones if it has the same function and arguments as an earlier one.

    For some contenders, two workloads are the same: their worker processes are shared in any case.
    """
    arguments = workload.arguments(sizes)
    asked = (function, repr(arguments))
    if asked not in known:
        known[asked] = ask(function, arguments, workload.deadline)
    return known[asked]
