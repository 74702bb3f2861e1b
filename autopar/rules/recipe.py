"""Recipe: how one op may be split, as immutable data. The only thing the passes see of a rule.
Must not know op names or notations (notation.py parses them, registry.py finds them).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from autopar.ir.graph import AxisRef, Scaled
from autopar.ir.types import AxisType, I, P, R, S

__all__ = ["Dims", "Emitted", "Factor", "Recipe", "Scaled", "Split", "TrainingOnly"]

Dims = tuple[tuple[str, ...], ...]  # per tensor dim: the names of its factors, outermost first; () for a dim of size 1 or a number


@dataclass(frozen=True)
class Factor:
    """A named size shared by dims of the inputs and outputs of one op.

    `reduce` says what an output that lacks the factor becomes when the op is split on it:
    None: not allowed; 'sum': P, the op's local results add up; 'inner': I, the emitted form communicates by itself
    (then inputs that lack the factor are needed as I, not R).
    `positional`: the local form depends on which entries a rank holds (a vocabulary), so groups ('n/3') are not allowed.
    """

    name: str
    size: int
    split: bool
    reduce: str | None = None
    positional: bool = False


@dataclass(frozen=True)
class Recipe:
    """What the compiler knows of one op application (shapes known).

    inputs, outputs: one entry per tensor input (ir.graph.op_inputs order) and tensor output (op_outputs order);
        None marks an input the notation leaves out ('?'): it is needed as I (R when it may carry a gradient and the op is split).
    linear: groups of input positions; the op is linear in each group jointly (all of them P -> outputs P, the
        other inputs R), e.g. add: ((0, 1),); mul: ((0,), (1,)).
    partial_bias: input positions that enter as P when the op is split on a factor that is reduced (bias of linear).
    inner: factors that may be split although another factor lies outside them in the same dim, as in a split of
        "b (c n) -> b n, b n, b n"; only where the outer sizes are literals (they become part of the type).
    """

    inputs: tuple[Dims | None, ...]
    outputs: tuple[Dims | None, ...]
    factors: dict[str, Factor]
    linear: tuple[tuple[int, ...], ...] = ()
    partial_bias: tuple[int, ...] = ()
    inner: frozenset[str] = frozenset()
    random: bool = False
    flops: float = 0.0  # forward, of the whole op
    matmul: bool = False  # its flops count as matrix-multiply flops

    def __hash__(self) -> int:
        return id(self)

    def place(self, dims: Dims | None, factor: str) -> tuple[int, int] | None:
        """(tensor dim, number of outer groups) a split on the factor shards; outer groups only for names in `inner`."""
        for i, names in enumerate(dims or ()):
            live = [n for n in names if self.factors[n].size > 1]
            if factor in live:
                outer = prod(self.factors[n].size for n in live[: live.index(factor)])
                return (i, outer) if outer == 1 or factor in self.inner else None
        return None

    def dim_of(self, dims: Dims | None, factor: str) -> int | None:
        """The tensor dim a split on the factor shards; None where the value lacks it (or it lies inside another)."""
        place = self.place(dims, factor)
        return None if place is None else place[0]

    def carries(self, dims: Dims | None, factor: str) -> bool:
        return any(factor in names for names in dims or ())

    def legal(self, factor: str) -> bool:
        """Whether the op may be split on the factor at all (before asking whether an axis divides it).

        A choice 'n/3' splits factor n inside each of 3 equal groups of it.
        """
        factor, groups = self.parse(factor)
        f = self.factors.get(factor)
        if f is not None and groups > 1 and (f.size % groups or f.positional or f.reduce == "inner"):
            return False
        if f is None or not f.split or f.size < 2:
            return False
        for dims in self.inputs + self.outputs:
            if self.carries(dims, factor) and self.dim_of(dims, factor) is None:
                return False  # an inner factor of a composed dim
        if not any(self.carries(d, factor) for d in self.inputs + self.outputs):
            return False
        return f.reduce is not None or all(self.carries(d, factor) for d in self.outputs)

    @staticmethod
    def parse(choice: str) -> tuple[str, int]:
        """'n' -> ('n', 1), 'n/3' -> ('n', 3)."""
        name, slash, groups = choice.partition("/")
        return (name, int(groups)) if slash and groups.isdigit() else (choice, 1)

    def divides(self, choice: str, size: int) -> bool:
        """Whether an axis (or a product of axes) of this size divides the factor of a choice."""
        name, groups = self.parse(choice)
        return self.factors[name].size % (groups * size) == 0

    def choice_for(self, position: int, t: AxisType) -> str | None:
        """The legal choice under which input `position` is sharded as t; None if there is none."""
        dims = self.inputs[position]
        if t.kind != "S" or dims is None or t.dim >= len(dims):
            return None
        for name in dims[t.dim]:
            place = self.place(dims, name)
            if place is not None and t.outer % place[1] == 0:
                choice = name if t.outer == place[1] else f"{name}/{t.outer // place[1]}"
                if self.legal(choice):
                    return choice
        return None

    def choices(self, size: int) -> tuple[str, ...]:
        """Factors that an axis of the given size can split."""
        return tuple(n for n, f in self.factors.items() if self.legal(n) and f.size % size == 0)

    def types(self, choice: str) -> tuple[tuple[AxisType, ...], tuple[AxisType, ...]]:
        """(input types, output types) on one axis for a choice: a factor name, 'I', 'R', 'P' or 'P:<group>'.

        Shards come with nest 0; the caller numbers them over all axes. Raises KeyError for an unknown choice.
        """
        n, m = len(self.inputs), len(self.outputs)
        if choice == "I":
            return (I,) * n, (I,) * m
        if choice == "R":
            return (R,) * n, (R,) * m
        if choice == "P" or choice.startswith("P:"):
            group = self.linear[int(choice[2:] or 0) if ":" in choice else 0]
            return tuple(P if i in group else R for i in range(n)), (P,) * m
        choice, groups = self.parse(choice)
        f = self.factors[choice]
        rest = I if f.reduce == "inner" else R
        ins = []
        for i, dims in enumerate(self.inputs):
            place = self.place(dims, choice)
            lost = f.reduce == "sum" and i in self.partial_bias
            ins.append(S(place[0], 0, place[1] * groups) if place else P if lost else rest)
        outs = []
        for dims in self.outputs:
            place = self.place(dims, choice)
            outs.append(S(place[0], 0, place[1] * groups) if place else I if f.reduce == "inner" else P)
        return tuple(ins), tuple(outs)


@dataclass(frozen=True)
class Split:
    """One axis of the mesh splitting one factor of an op."""

    axis: str
    size: int
    factor: str

    @property
    def ref(self) -> AxisRef:
        return AxisRef(self.axis)


@dataclass(frozen=True)
class Emitted:
    """The local form of an op: what one rank runs. `divide` divides every output by a number afterwards (mean)."""

    fn: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    divide: int = 1


@dataclass(frozen=True)
class TrainingOnly:
    """A literal that depends on the mode at run time. Prints `(value if self.training else otherwise)`, and `self.training`
    for (True, False). In a graph traced in eval mode it stands for `value`, as recorded.
    """

    value: Any
    otherwise: Any
