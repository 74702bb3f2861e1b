"""Random legal plans of several kinds for a graph, and a sweep that verifies them on all ranks in this process.
Must not know lowering.

    python tests/random_plans.py --count 300 [--start 0] [--only llama,conv]
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from autopar.config import ComputeConfig
from autopar.ir.graph import Block, Graph, Op
from autopar.ir.mesh import Mesh
from autopar.pas import policies
from autopar.pas.address import address
from autopar.pas.follow import follow
from autopar.pas.plan import Plan
from autopar.pas.resolve import fits
from autopar.rules import recipe_of
from autopar.rules.recipe import Recipe

MESHES = (Mesh((("tp", 2),)), Mesh((("dp", 2), ("tp", 2))), Mesh((("tp", 4),)), Mesh((("a", 2), ("b", 2), ("c", 2))))
SIZES = ((2,), (4,), (2, 2), (3,), (2, 2, 2), (2, 3), (4, 2))
SWEPT = tuple(Mesh(tuple(zip("abc", sizes, strict=False))) for sizes in SIZES)


# ---- plans ---------------------------------------------------------------------------------------------------------------------


def choices(recipe: Recipe, size: int) -> list[str]:
    """Everything one axis may do with an op, groups of shards included."""
    names = list(recipe.choices(size))
    names += [c for n in names for k in (2, 3) if recipe.legal(c := f"{n}/{k}") and recipe.divides(c, size)]
    return ["I", "R", *(f"P:{i}" for i in range(len(recipe.linear))), *names]


def random_choice(block: Block, op: Op, recipe: Recipe | None, mesh: Mesh, rng: Random, split: float) -> tuple[str, ...]:
    """One legal choice per axis; a factor with probability `split` where there is one."""
    picked = ["I"] * len(mesh.axes)
    for k, size in enumerate(mesh.sizes):
        if recipe is None:
            break
        factors = [c for c in choices(recipe, size) if c[0] not in "IRP"]
        c = rng.choice(factors) if factors and rng.random() < split else rng.choice(choices(recipe, size))
        old, picked[k] = picked[k], c
        if not fits(block, op, recipe, tuple(picked), mesh):
            picked[k] = old
    return tuple(picked)


def random_plan(graph: Graph, mesh: Mesh, rng: Random, named: float | None = None) -> Plan:
    """A plan that resolve accepts, which names that share of the ops. Half of them treat the instances of a block alike."""
    alike, split, named = rng.random() < 0.5, rng.random(), named or rng.choice([0.3, 0.7, 1.0])
    ops: dict[str, dict[str, str]] = {}
    for block in graph.blocks.values():
        for op in block.ops:
            if not isinstance(op, Op) or rng.random() > named:
                continue
            recipe = None if op.whole else recipe_of(block, op)
            choice = random_choice(block, op, recipe, mesh, rng, split)
            for path in block.instances:
                if not alike:
                    choice = random_choice(block, op, recipe, mesh, rng, split)
                ops[address(path, op.id)] = dict(zip(mesh.names, choice, strict=True))
    return Plan(mesh, ops)


def random_placements(graph: Graph, mesh: Mesh, rng: Random) -> dict[str, dict[str, str]]:
    """A third of the parameters placed in some way of their own."""
    out: dict[str, dict[str, str]] = {}
    for t in graph.tensors:
        if t.kind != "param" or rng.random() > 0.35:
            continue
        left, entry = list(t.shape), {}
        for axis, size in mesh.axes:
            dims = [d for d, n in enumerate(left) if n % size == 0 and n > 1]
            kind = rng.choice(["R", "I", "S", "S"])
            if kind == "S" and dims:
                d = rng.choice(dims)
                left[d] //= size
                kind = f"S({d})"
            if kind != "S":
                entry[axis] = kind
        out[t.name] = entry
    return out


def by_policies(graph: Graph, mesh: Mesh, seed: int) -> Plan:
    """Every axis by one of the built-in policies."""
    rng = Random(seed)
    axes = {name: (size, rng.choice(["tp", "tp", "data"])) for name, size in mesh.axes}
    config = ComputeConfig(plan_ngpus=mesh.size, pas_config={"seed": seed})
    return policies.mesh_policy(axes)(graph, config)


KINDS = {
    "free": lambda graph, mesh, seed: policies.random_plan(graph, mesh, seed),
    "instances": lambda graph, mesh, seed: random_plan(graph, mesh, Random(seed)),
    "followed": lambda graph, mesh, seed: follow(graph, random_plan(graph, mesh, Random(seed), 0.15)),
    "placed": lambda graph, mesh, seed: replace(
        random_plan(graph, mesh, Random(seed)), params=random_placements(graph, mesh, Random(seed))
    ),
    "policies": by_policies,
}


# ---- the sweep -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One plan of the sweep: everything follows from the model and the seed."""

    model: str
    seed: int

    @property
    def mesh(self) -> Mesh:
        return SWEPT[self.seed % len(SWEPT)]

    @property
    def kind(self) -> str:
        return Random(f"kind {self.seed}").choice(list(KINDS))

    @property
    def folded(self) -> bool:
        return self.seed % 3 == 2

    @property
    def units(self) -> int:
        """Scale units; two of them sometimes on the smallest mesh."""
        return 2 if self.mesh.size == 2 and self.seed % 2 else 1

    @property
    def batches(self) -> int:
        """How many times the traced batch is run; another one than traced only where sizes are read at run time."""
        return 1 if self.folded or self.seed % 5 else 2

    def __str__(self) -> str:
        extra = " folded" * self.folded + f" units={self.units}" * (self.units > 1) + f" batches={self.batches}" * (self.batches > 1)
        return f"{self.model} {self.seed} ({self.mesh}, {self.kind}{extra})"


class Sweep:
    """Traces every model once and verifies cases on it."""

    def __init__(self) -> None:
        self.models: dict[str, Any] = {}
        self.graphs: dict[tuple[str, bool], Graph] = {}

    def compiled(self, case: Case) -> tuple[Any, ...]:
        """(module, arguments to run, compiled program, configuration)."""
        import sweep_models
        import torch

        from autopar.driver import compile_module
        from autopar.trace import trace

        if case.model not in self.models:
            self.models[case.model] = sweep_models.build(case.model)
        module, args = self.models[case.model]
        if (key := (case.model, case.folded)) not in self.graphs:
            self.graphs[key] = trace(module, args, constant_folding=case.folded)
        graph = self.graphs[key]
        config = ComputeConfig(case.mesh.size, case.mesh.size * case.units, constant_folding=case.folded)
        compiled = compile_module(module, args, KINDS[case.kind](graph, case.mesh, case.seed), config, graph=graph)
        if case.batches > 1:
            args = {k: torch.cat([v] * case.batches) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        return module, args, compiled, config

    def run(self, case: Case) -> Any:
        """The report of verifying a case, outputs and every gradient, in train and eval mode."""
        from autopar.verification import verify_compiled

        module, args, compiled, config = self.compiled(case)
        return verify_compiled(module, args, compiled, config)


def cases(count: int, start: int = 0, only: tuple[str, ...] = ()) -> Iterator[Case]:
    """`count` cases, the models in turn, every model on every mesh in time."""
    import sweep_models

    names = only or sweep_models.NAMES
    for n in range(count):
        yield Case(names[n % len(names)], start + n // len(names))


def main() -> int:
    import torch

    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--count", type=int, default=300)
    options.add_argument("--start", type=int, default=0, help="first seed")
    options.add_argument("--only", default="", help="models, separated by commas")
    args = options.parse_args()
    torch.set_num_threads(1)
    sweep, started = Sweep(), time.time()
    good: dict[str, Counter[str]] = defaultdict(Counter)
    kinds: Counter[str] = Counter()
    compared, failed = 0, []
    only = tuple(filter(None, args.only.split(",")))
    for case in cases(args.count, args.start, only):
        try:
            report = sweep.run(case)
            compared += len(report.differences)
            problem = None if report.ok else str(report)
        except Exception as e:  # the sweep goes on: every failure is of interest
            problem = f"{type(e).__name__}: {e}"
        if problem:
            failed.append(case)
            print(f"FAILED {case}\n  {problem[:1500]}", flush=True)
        else:
            good[case.model][str(case.mesh)] += 1
            kinds[case.kind] += 1
    print(table(good))
    print(f"by kind: {', '.join(f'{v} {k}' for k, v in sorted(kinds.items()))}")
    print(f"{args.count - len(failed)} of {args.count} plans verified, {compared} tensors compared, {time.time() - started:.0f} s")
    return 1 if failed else 0


def table(good: dict[str, Counter[str]]) -> str:
    """Verified plans, a row per graph and a column per mesh."""
    columns = [str(m).removeprefix("mesh") for m in SWEPT]
    rows = [["graph", *columns, "all"]]
    for name, count in good.items():
        rows.append([name, *(str(count[f"mesh{c}"]) for c in columns), str(count.total())])
    rows.append(["all", *(str(sum(c[f"mesh{k}"] for c in good.values())) for k in columns), str(sum(c.total() for c in good.values()))])
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here), str(here.parent), str(here.parent / "benchmarks")]
    warnings.simplefilter("ignore")
    sys.exit(main())
