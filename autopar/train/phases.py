"""Phases: what a run consists of, in one order, each part once; ranks go from one to the next together.
Must not know what the parts do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from autopar.errors import ConfigError, suggest
from autopar.runtime.groups import fail_together

PHASES = ("launch", "configure", "parallelise", "optimizers", "schedulers", "dataloaders", "metrics", "resume", "fit", "finalise")
ALONE = ("launch", "fit", "finalise")  # their parts see to it themselves that ranks fail together
DAY = 86400.0


@dataclass(frozen=True)
class Part:
    what: str  # 'make the model', as an error goes on after 'rank 1 failed to'
    run: Callable[[], None]
    after: tuple[str, ...] = ()


class Phases:
    """Parts are added to a phase and run in the order in which they came, but for those that name others they come after."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Part]] = {p: [] for p in PHASES}
        self._done: set[str] = set()

    def add(self, phase: str, what: str, run: Callable[[], None], *, after: Sequence[str] = ()) -> None:
        if phase not in self._parts:
            raise ConfigError(f"unknown phase {phase!r}: {suggest(phase, PHASES)}")
        self._parts[phase].append(Part(what, run, tuple(after)))

    def run(self, first: str = PHASES[0], last: str = PHASES[-1]) -> None:
        """Run the phases from the first to the last that have not run. NB: collective."""
        for phase in PHASES[PHASES.index(first) : PHASES.index(last) + 1]:
            if phase in self._done:
                continue
            self._done.add(phase)
            for part in self._sorted(phase):
                if phase in ALONE:
                    part.run()
                else:
                    fail_together(part.what, part.run, DAY)

    def _sorted(self, phase: str) -> list[Part]:
        parts = {p.what: p for p in self._parts[phase]}
        for p in parts.values():
            for other in p.after:
                if other not in parts:
                    raise ConfigError(f"{p.what!r} is to come after {other!r}, which phase {phase!r} has not: {suggest(other, parts)}")
        before = {w: set(p.after) for w, p in parts.items()}
        try:
            list(TopologicalSorter(before).static_order())
        except CycleError as e:
            raise ConfigError(f"parts of phase {phase!r} wait for each other: {' -> '.join(e.args[1])}") from None
        out: list[Part] = []
        while before:  # NB: not the sorter's order, which forgets in what order they came
            ready = next(w for w, needs in before.items() if not needs & before.keys())
            del before[ready]
            out.append(parts[ready])
        return out
