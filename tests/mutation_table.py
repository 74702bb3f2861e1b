"""The mutation table: every kind of tests/mutate.py, how many mutants were made, and what caught them: the checker, or the numbers.
Must not know how a mutant is made or found. The numbers are of the generated code of some mutants, on all ranks in this process.

    python tests/mutation_table.py [--plans 4] [--run 3]
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import handwritten
import small_models
import torch
from mutate import mutations
from random_plans import MESHES, random_plan

from autopar.codegen.emit import emit
from autopar.driver import Compiled
from autopar.ir.graph import Graph
from autopar.lower.check import errors
from autopar.lower.lower import lower
from autopar.lower.program import Program
from autopar.runtime import run_ranks
from autopar.trace import trace
from autopar.verification import rank_step

ON_ONE_RANK = "constant changed on one rank"  # no mutation of a Program, which is one for all ranks: only numbers can tell
TOLERANCE = 1e-9  # in float64


class Subject:
    """A small model in float64, its graph, and its generated code on ranks in this process."""

    def __init__(self, name: str) -> None:
        module, args = small_models.inputs(name)
        self.name, self.module = name, module.double()
        self.args = {k: v.double() if v.is_floating_point() else v for k, v in args.items()}
        self.graph = trace(self.module, self.args)

    def programs(self, count: int) -> Iterator[Program]:
        for seed in range(count):
            yield lower(self.graph, random_plan(self.graph, MESHES[seed % len(MESHES)], Random(seed)))

    def step(self, *programs: Program) -> list[dict[str, torch.Tensor]]:
        """Outputs, gradients and buffers of each rank; rank r runs programs[r % len]."""
        made = [Compiled(self.graph, p.plan, p, emit(self.graph, p)) for p in programs]

        def rank(mesh: Any, r: int) -> dict[str, torch.Tensor]:
            outs, grads, buffers, _ = rank_step(self.module, self.args, made[r % len(made)], mesh, "train", 0)
            found = {f"output {i} {n}": t for i, (n, t) in enumerate(outs)} | {f"gradient {n}": g for n, g in grads.items()}
            return {n: t.detach() for n, t in (found | buffers).items() if t is not None}

        return run_ranks(programs[0].mesh, rank, 30.0)

    def differs(self, good: list[dict[str, torch.Tensor]], *programs: Program) -> bool:
        """Whether these programs compute anything else, or nothing at all."""
        try:
            other = self.step(*programs)
        except Exception:
            return True
        return any(a.keys() != b.keys() or not all(_same(a[n], b[n]) for n in a) for a, b in zip(good, other, strict=True))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def on_one_rank(subject: Subject, program: Program, good: list[dict[str, torch.Tensor]], rng: Random) -> bool | None:
    """Whether the numbers tell that a constant differs on the last rank of a mesh; None if there is no constant that matters."""
    mutant = mutations["constant_changed"](program, rng)
    if mutant is None or not subject.differs(good, mutant):
        return None
    return subject.differs(good, *[program] * (program.mesh.size - 1), mutant)


def table(plans: int, run: int) -> tuple[list[tuple[str, int, int, int, int]], list[str]]:
    """Rows of (kind, mutants, caught by the checker, mutants run, caught by numbers), and what neither caught."""
    made, checked, ran, told = Counter(), Counter(), Counter(), Counter()
    missed: list[str] = []

    def count(kind: str, graph: Graph, mutant: Program | None, numbers: Any, where: str) -> None:
        if mutant is None:
            return
        made[kind] += 1
        caught = bool(errors(graph, mutant))
        checked[kind] += caught
        different = None
        if numbers is not None and (ran[kind] < run or not caught):
            ran[kind] += 1
            told[kind] += (different := numbers(mutant))
        if not caught and not different:
            missed.append(f"{kind}: {where}")

    for name, make in handwritten.PAIRS.items():
        graph, program = make()
        for kind, mutate in mutations.items():
            for seed in range(8):
                count(kind, graph, mutate(program, Random(seed)), None, f"handwritten {name}, seed {seed}")
    for name in small_models.NAMES:
        subject = Subject(name)
        for seed, program in enumerate(subject.programs(plans)):
            good = subject.step(program)
            for kind, mutate in mutations.items():
                count(kind, subject.graph, mutate(program, Random(seed)), partial(subject.differs, good), f"{name}, plan {seed}")
            if ran[ON_ONE_RANK] < 3 * run and (different := on_one_rank(subject, program, good, Random(seed))) is not None:
                made[ON_ONE_RANK] += 1
                ran[ON_ONE_RANK] += 1
                told[ON_ONE_RANK] += different
                missed.extend([f"{ON_ONE_RANK}: {name}, plan {seed}"] * (not different))
    return [(k, made[k], checked[k], ran[k], told[k]) for k in (*mutations, ON_ONE_RANK)], missed


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--plans", type=int, default=4, help="random plans of each small model")
    options.add_argument("--run", type=int, default=3, help="mutants of each kind that are also run")
    args = options.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    rows, missed = table(args.plans, args.run)
    print(f"{'mutation':42}{'mutants':>8}{'checker':>9}   of those run, other numbers")
    for kind, made, checked, ran, told in rows:
        print(f"{kind.replace('_', ' '):42}{made:8}{checked:9}   {told} of {ran}")
    whole = sum(made == checked > 0 for _, made, checked, _, _ in rows)
    seconds = time.process_time() - started
    print(f"{len(rows)} kinds, {whole} by the checker alone, {len(missed)} mutants caught by neither, {seconds:.0f} CPU s")
    print(*missed, sep="\n")
    return bool(missed)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here), str(here.parent)]
    warnings.simplefilter("ignore")
    sys.exit(main())
