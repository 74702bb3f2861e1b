"""Random legal plans for a graph: any op on any axis, per class of layers or per instance.
Must not know lowering.
"""

from __future__ import annotations

from random import Random

from autopar.ir.graph import Block, Graph, Op
from autopar.ir.mesh import Mesh
from autopar.pas.address import address
from autopar.pas.plan import Plan
from autopar.pas.resolve import fits
from autopar.rules import recipe_of
from autopar.rules.recipe import Recipe

MESHES = (Mesh((("tp", 2),)), Mesh((("dp", 2), ("tp", 2))), Mesh((("tp", 4),)), Mesh((("a", 2), ("b", 2), ("c", 2))))


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


def random_plan(graph: Graph, mesh: Mesh, rng: Random) -> Plan:
    """A plan that resolve accepts. Half of them treat the instances of a block alike."""
    alike, split, named = rng.random() < 0.5, rng.random(), rng.choice([0.3, 0.7, 1.0])
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
