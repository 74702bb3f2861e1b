"""The types an op requires of its inputs and gives its outputs under a choice per axis.
Must not know about conversions or other ops.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from autopar.ir.graph import Block, Graph, Op, Value, op_inputs, op_outputs
from autopar.ir.mesh import Mesh
from autopar.ir.types import I, R, Type, with_nest, without_grad
from autopar.pas.resolve import Variant
from autopar.rules import canonical, recipe_of
from autopar.rules.recipe import Recipe, Split

SIZE_READS = frozenset({"size", "numel", "len", "shape"})


@dataclass(frozen=True)
class OpTypes:
    """One op under the choices of a variant: types line up with op_inputs and op_outputs."""

    recipe: Recipe | None
    inputs: tuple[Type, ...]
    outputs: tuple[Type, ...]
    splits: tuple[Split, ...]


def is_size_read(block: Block, op: Op) -> bool:
    """Whether the op reads a logical size: it takes its tensor in any type and yields run-time scalars only."""
    return not op_outputs(block, op) and canonical(op.fn) in SIZE_READS


def normal(v: Value, t: Type) -> Type:
    """The type as written for a value: without gradient R is I."""
    return t if v.grad else without_grad(t)


def op_types(block: Block, op: Op, choice: tuple[str, ...], mesh: Mesh) -> OpTypes:
    """Combine the single-axis typings of an op's choices (recipe.types) over all axes."""
    ins, outs = op_inputs(block, op), op_outputs(block, op)
    if not mesh.axes or all(c == "I" for c in choice):
        whole = (I,) * len(mesh.axes)
        return OpTypes(recipe_of(block, op), (whole,) * len(ins), (whole,) * len(outs), ())
    recipe = recipe_of(block, op)
    if recipe is None:
        assert all(c in "RI" for c in choice), (op.id, choice)
        column = tuple(R if c == "R" else I for c in choice)
        return OpTypes(None, tuple(normal(v, column) for v in ins), tuple(normal(v, column) for v in outs), ())
    columns = [recipe.types(c) for c in choice]
    splits = tuple(
        Split(axis, size, c) for (axis, size), c in zip(mesh.axes, choice, strict=True) if recipe.parse(c)[0] in recipe.factors
    )
    return OpTypes(
        recipe,
        tuple(normal(v, with_nest(tuple(c[0][i] for c in columns))) for i, v in enumerate(ins)),
        tuple(normal(v, with_nest(tuple(c[1][i] for c in columns))) for i, v in enumerate(outs)),
        splits,
    )


class VariantTypes:
    """All op types of one variant, derived once."""

    def __init__(self, graph: Graph, variant: Variant, mesh: Mesh) -> None:
        self.variant, self.mesh = variant, mesh
        self.block = graph.blocks[variant.block]
        self._cache: dict[str, OpTypes] = {}

    def of(self, op: Op) -> OpTypes:
        if op.id not in self._cache:
            self._cache[op.id] = op_types(self.block, op, self.variant.choices[op.id], self.mesh)
        return self._cache[op.id]

    @cached_property
    def written(self) -> frozenset[int]:
        """Values that an op or a call of this block writes in place."""
        return frozenset(old for op in self.block.ops for old, _ in getattr(op, "writes", ()))
