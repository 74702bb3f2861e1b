"""The algebra of value types: R, I, S(d), P on each mesh axis, their duals, and shortest conversions.
Must not know about tensors or processes: the communication itself is runtime/collectives.py.

A *Type* is a tuple with one AxisType per mesh axis, in mesh order; the empty tuple is a value on one device.
Where several axes shard the same dim, `nest` orders them: 0 is the outermost (its slices are the largest).
A shard may lie *inside* outer groups: a dim of 3 x 8 entries (a fused q, k, v) of type S(1/3) gives each of two ranks
entries 0-3 of each of the 3 groups. Such a dim is sharded by one axis only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import pairwise
from math import prod

import networkx as nx

from autopar.ir.mesh import Mesh


@dataclass(frozen=True, order=True)
class AxisType:
    """How the ranks along one mesh axis hold a value (design section 2)."""

    kind: str  # 'R' | 'I' | 'S' | 'P'
    dim: int = -1  # S only: the tensor dim, never negative
    nest: int = 0  # S only: position among the axes that shard the same dim
    outer: int = 1  # S only: number of equal groups of the dim, each of which is sharded

    def __repr__(self) -> str:
        if self.kind != "S":
            return self.kind
        return f"S({self.dim}{f'/{self.outer}' if self.outer > 1 else ''}{f',{self.nest}' if self.nest else ''})"

    @property
    def dual(self) -> AxisType:
        """The type of the gradient."""
        return {"R": P, "P": R}.get(self.kind, self)


R = AxisType("R")
I = AxisType("I")
P = AxisType("P")
Type = tuple[AxisType, ...]


def S(dim: int, nest: int = 0, outer: int = 1) -> AxisType:
    return AxisType("S", dim, nest, outer)


def parse_axis_type(text: str) -> AxisType:
    """Inverse of repr: 'R', 'I', 'P', 'S(1)', 'S(1,1)' (nest 1), 'S(1/3)' (inside 3 groups)."""
    text = text.strip()
    if text in ("R", "I", "P"):
        return AxisType(text)
    if m := re.fullmatch(r"S\(\s*(\d+)\s*(?:/\s*(\d+))?\s*(?:,\s*(\d+))?\s*\)", text):
        return S(int(m[1]), int(m[3] or 0), int(m[2] or 1))
    raise ValueError(f"{text!r} is not an axis type; write R, I, P, S(dim), S(dim,nest) or S(dim/groups)")


def dual(t: Type) -> Type:
    return tuple(a.dual for a in t)


def whole(mesh: Mesh) -> Type:
    """Type I on every axis."""
    return (I,) * len(mesh.axes)


def without_grad(t: Type) -> Type:
    """Values that carry no gradient do not tell R from I: both are written I."""
    return tuple(I if a.kind == "R" else a for a in t)


def local_shape(shape: tuple[int, ...], t: Type, mesh: Mesh) -> tuple[int, ...]:
    """The shape one rank holds. The caller has made sure that the split is even."""
    out = list(shape)
    for a, k in zip(t, mesh.sizes, strict=True):
        if a.kind == "S":
            assert out[a.dim] % k == 0, (shape, t, mesh)
            out[a.dim] //= k
    return tuple(out)


@dataclass(frozen=True)
class Step:
    """One single-axis conversion of a value."""

    axis: int  # index into the mesh's axes
    src: AxisType
    dst: AxisType

    @property
    def name(self) -> str:
        """The runtime function: 'i_to_r', 'p_to_s', ..."""
        return f"{self.src.kind}_to_{self.dst.kind}".lower()


# (src kind, dst kind) -> (what happens forward, what happens backward): the table of design section 2.
TABLE: dict[tuple[str, str], tuple[str, str]] = {
    ("I", "R"): ("nothing", "all_reduce"),
    ("P", "I"): ("all_reduce", "nothing"),
    ("P", "R"): ("all_reduce", "all_reduce"),
    ("P", "S"): ("reduce_scatter", "all_gather"),
    ("S", "R"): ("all_gather", "reduce_scatter"),
    ("S", "I"): ("all_gather", "slice"),
    ("I", "S"): ("slice", "all_gather"),
    ("R", "S"): ("slice", "place"),
    ("S", "S"): ("all_to_all", "all_to_all"),
    ("R", "I"): ("nothing", "keep_first"),
    ("I", "P"): ("keep_first", "nothing"),
    ("R", "P"): ("keep_first", "keep_first"),
    ("S", "P"): ("place", "slice"),
}


def _bytes(action: str, whole_bytes: float, k: int) -> float:
    """Bytes one rank sends for an action on a value whose size across the axis is whole_bytes (ring algorithms)."""
    ring = whole_bytes * (k - 1) / k
    return {"all_reduce": 2 * ring, "all_gather": ring, "reduce_scatter": ring, "all_to_all": ring / k}.get(action, 0.0)


def step_cost(step: Step, t: Type, mesh: Mesh, nbytes: float, grad: bool) -> float:
    """Bytes sent per rank by one step applied to a value of type t and logical size nbytes; local work counts a little."""
    others = prod(k for i, (a, k) in enumerate(zip(t, mesh.sizes, strict=True)) if a.kind == "S" and i != step.axis)
    size = nbytes / others
    k = mesh.sizes[step.axis]
    total = 0.0
    for action in TABLE[step.src.kind, step.dst.kind][: 2 if grad else 1]:
        moved = _bytes(action, size, k)
        # NB: every step has a positive weight, so that a shortest path never wanders through free conversions.
        total += moved + 1e-3 * size * (action != "nothing") + 1e-6 * size + 1e-9
    return total


def nesting(t: Type, dim: int) -> list[int]:
    """The axes that shard dim, outermost first."""
    return [i for _, i in sorted((a.nest, i) for i, a in enumerate(t) if a.kind == "S" and a.dim == dim)]


@cache
def is_valid(t: Type) -> bool:
    """Nest positions of each sharded dim are 0..n-1, and a dim sharded inside groups has one axis."""
    dims = {a.dim for a in t if a.kind == "S"}
    if any(a.outer > 1 and len(nesting(t, a.dim)) > 1 for a in t if a.kind == "S"):
        return False
    return all(sorted(a.nest for a in t if a.kind == "S" and a.dim == d) == list(range(len(nesting(t, d)))) for d in dims)


def apply_step(t: Type, step: Step) -> Type:
    """The type after a step. Raises ValueError where the step is not legal on t."""
    a = t[step.axis]
    if a != step.src or (step.src.kind, step.dst.kind) not in TABLE:
        raise ValueError(f"conversion {step.src} -> {step.dst} does not apply to a value of type {a}")
    if a.kind == step.dst.kind and a.dim == step.dst.dim:
        raise ValueError(f"no single step rearranges the shards of dim {a.dim}: {a} -> {step.dst}")
    if a.kind == "S" and nesting(t, a.dim)[-1] != step.axis:
        raise ValueError(f"axis {step.axis} is not the innermost shard of dim {a.dim} in {t}")
    if step.dst.kind == "S":
        rest = [i for i in nesting(t, step.dst.dim) if i != step.axis]
        if step.dst.nest != len(rest):
            raise ValueError(f"a new shard of dim {step.dst.dim} must be the innermost, nest {len(rest)}")
        if rest and (step.dst.outer > 1 or any(t[i].outer > 1 for i in rest)):
            raise ValueError(f"dim {step.dst.dim} is sharded inside groups and by another axis")
    return (*t[: step.axis], step.dst, *t[step.axis + 1 :])


def divides(shape: tuple[int, ...], t: Type, mesh: Mesh) -> bool:
    """Whether every shard of a value of this shape is even."""
    left = list(shape)
    for a, k in zip(t, mesh.sizes, strict=True):
        if a.kind == "S":
            if a.dim >= len(left) or left[a.dim] % (k * a.outer):
                return False
            left[a.dim] //= k
    return True


@lru_cache(maxsize=65536)
def _path(src: Type, dst: Type, mesh: Mesh, grad: bool, shape: tuple[int, ...] | None) -> tuple[tuple[Step, ...], float]:
    """Cheapest legal chain of single-axis conversions and its cost for one logical byte; even all the way if shape is given."""
    shards = sorted({replace(a, nest=0) for a in src + dst if a.kind == "S"})
    graph = nx.DiGraph()
    todo, seen = [src], {src}
    while todo:
        t = todo.pop()
        for i, a in enumerate(t):
            # NB: a detour through P (zeros and a reduction) may be cheap in bytes, but nobody would want to read it.
            # NB: without a gradient there is no R: a path through it would not be found in lowered values, which are written I.
            targets = [*[R] * grad, I, *[P] * (dst[i] == P), *shards]
            for target in targets:
                if target.kind == "S":
                    target = replace(target, nest=len([j for j in nesting(t, target.dim) if j != i]))
                if target == a:
                    continue
                step = Step(i, a, target)
                try:
                    new = apply_step(t, step)
                except ValueError:
                    continue
                if shape is not None and not divides(shape, new, mesh):
                    continue
                weight = step_cost(step, t, mesh, 1.0, grad)
                graph.add_edge(t, new, weight=weight, step=step)
                if new not in seen:
                    seen.add(new)
                    todo.append(new)
    nodes = nx.dijkstra_path(graph, src, dst)
    edges = [graph.edges[u, v] for u, v in pairwise(nodes)]
    return tuple(e["step"] for e in edges), sum(e["weight"] for e in edges)


def steps(src: Type, dst: Type, mesh: Mesh, *, grad: bool = True, shape: tuple[int, ...] | None = None) -> tuple[Step, ...]:
    """The cheapest chain of single-axis conversions from src to dst; empty if equal. With a shape, every step shards evenly.

    With grad=False the value carries no gradient: R and I are the same and nothing is emitted between them.
    Raises ValueError if dst cannot be reached.
    """
    return _convert(src, dst, mesh, grad, shape)[0]


def cost(src: Type, dst: Type, mesh: Mesh, nbytes: float, *, grad: bool = True) -> float:
    """Bytes one rank sends, forward and backward, to convert a value of nbytes logical bytes."""
    return _convert(src, dst, mesh, grad)[1] * nbytes


def _convert(src: Type, dst: Type, mesh: Mesh, grad: bool, shape: tuple[int, ...] | None = None) -> tuple[tuple[Step, ...], float]:
    if not grad:
        src, dst = without_grad(src), without_grad(dst)
    if src == dst:
        return (), 0.0
    # NB: a one-axis step is looked up directly; Dijkstra is for the rest.
    diff = [i for i, (a, b) in enumerate(zip(src, dst, strict=True)) if a != b]
    try:
        if len(diff) == 1:
            step = Step(diff[0], src[diff[0]], dst[diff[0]])
            if (step.src.kind, step.dst.kind) in TABLE and apply_step(src, step) == dst and is_valid(dst):
                return (step,), step_cost(step, src, mesh, 1.0, grad)
    except ValueError:
        pass
    if shape is not None:  # NB: only the sizes of dims that are sharded, so that the cache is shared
        used = {a.dim for a in src + dst if a.kind == "S"}
        shape = tuple(n if d in used else 0 for d, n in enumerate(shape))
    return _path(src, dst, mesh, grad, shape)


def with_nest(kinds: tuple[AxisType, ...]) -> Type:
    """Number the shards of each dim in mesh order (the canonical nesting: an earlier axis is the outer one)."""
    count: dict[int, int] = {}
    out = []
    for a in kinds:
        if a.kind == "S":
            out.append(replace(a, nest=count.get(a.dim, 0)))
            count[a.dim] = count.get(a.dim, 0) + 1
        else:
            out.append(a)
    return tuple(out)
