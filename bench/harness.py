"""The order of the measurement: in each round, each contender does its workloads, one after the other.

Contenders are started when they are first needed, and then wait while others are measured: an idle one costs next to
nothing, and a slow period of the machine affects neighbours alike. Each round begins with another contender. One that
fails is left out from then on; its earlier figures stay.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from bench.contenders import Ask, Contender, Place
from bench.load import Figures, Missing
from bench.processes import Broken
from bench.results import Results
from bench.workloads import Part, Sizes, Workload

#: How a contender fails.
_FAILURES = (Missing, Broken, OSError, AssertionError)


@dataclass
class Measurement:
    """What is measured, and where the figures go.

    Attributes:
        contenders: all of them.
        sizes: of all workloads.
        place: each contender gets a directory of its own in its directory.
        results: receives figures, and what was left out.
        say: receives progress.
        needed: the workloads of each contender that are measured; None: all that it does.
    """

    contenders: Sequence[Contender]
    sizes: Sizes
    place: Place
    results: Results
    say: Callable[[str], object]
    needed: Callable[[Contender, Workload], bool] = lambda contender, workload: True
    _broken: set[str] = field(default_factory=set)
    _runs: int = 0

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
                began = time.monotonic()
                for part in parts:
                    self.say(f"round {done + 1} of {rounds}: {part.key}")
                    for contender in self._in_turn():
                        self._measure(part, contender, running, stack, first=done == 0)
                self._runs += 1
                if (now := time.monotonic()) + (now - began) > until:
                    break
        return done + 1

    def _in_turn(self) -> list[Contender]:
        first = self._runs % max(1, len(self.contenders))
        return [*self.contenders[first:], *self.contenders[:first]]

    def _measure(
        self, part: Part, contender: Contender, running: dict[str, Ask], stack: ExitStack, first: bool
    ) -> None:
        """Have a contender do its workloads of a part."""
        workloads = [
            workload
            for workload in part.workloads
            if workload.key in contender.functions and self.needed(contender, workload) and (first or not workload.once)
        ]
        if not workloads or contender.name in self._broken:
            return
        try:
            if contender.name not in running:
                self.say(f"  starting {contender.name}")
                running[contender.name] = self._start(contender, stack)
            self._ask(workloads, contender, running[contender.name], part)
        except _FAILURES as error:
            self._broken.add(contender.name)
            self.results.leave_out(part.key, contender.name, str(error) or repr(error))

    def _start(self, contender: Contender, stack: ExitStack) -> Ask:
        directory = self.place.directory / f"{self._runs}-{self.contenders.index(contender)}"
        directory.mkdir()
        servers = contender.start(replace(self.place, directory=directory))
        ask = servers.__enter__()

        def end() -> None:
            try:
                servers.__exit__(None, None, None)
            except _FAILURES as error:
                self.results.leave_out("end", contender.name, str(error) or repr(error))
            finally:
                shutil.rmtree(directory, ignore_errors=True)

        stack.callback(end)
        return ask

    def _ask(self, workloads: Iterable[Workload], contender: Contender, ask: Ask, part: Part) -> None:
        # Two workloads can be the same for a contender: some have shared worker processes in any case.
        known: dict[tuple[str, str], Figures] = {}
        sizes = replace(self.sizes, jobs=max(1, round(self.sizes.jobs * contender.jobs)))
        for workload in workloads:
            function, arguments = contender.functions[workload.key], workload.arguments(sizes)
            asked = (function, repr(arguments))
            try:
                if asked not in known:
                    known[asked] = ask(function, arguments, workload.deadline)
            except Missing as lack:
                self.results.leave_out(part.key, contender.name, f"{workload.key}: {lack}")
                continue
            for row in workload.rows:
                if row.figure in known[asked]:  # floors have fewer figures
                    self.results.add(row.key, contender.name, self._runs, known[asked], row.figure)
