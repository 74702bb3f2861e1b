"""Small edits of a Program that the mutations are made of: rename uses, replace an item, pick one, ask whether it matters.
Must not be imported by the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

from autopar.ir.graph import Ref, map_refs, refs
from autopar.lower.program import Convert, Invoke, Local, LoweredBlock, Program, TypedValue
from autopar.rules.recipe import Scaled


def map_tree(tree: Any, f: Callable[[Any], Any]) -> Any:
    """The tree with f applied to every leaf, Refs inside Scaled included."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tree(x, f) for x in tree)
    if isinstance(tree, dict):
        return {k: map_tree(v, f) for k, v in tree.items()}
    if isinstance(tree, slice):
        return slice(*(map_tree(x, f) for x in (tree.start, tree.stop, tree.step)))
    if isinstance(tree, Scaled):
        return replace(tree, ref=map_tree(tree.ref, f))
    return map_refs(tree, f) if hasattr(tree, "names") else f(tree)


def leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    map_tree(tree, lambda x: found.append(x) or x)
    return found


def rename(item: Any, table: dict[int, int]) -> Any:
    """A body item with its uses (not its results) renamed."""
    one = lambda i: table.get(i, i)  # noqa: E731
    ref = lambda x: Ref(one(x.id)) if isinstance(x, Ref) else x  # noqa: E731
    if isinstance(item, Local):
        writes = tuple((one(a), b) for a, b in item.writes)
        return replace(item, args=map_tree(item.args, ref), kwargs=map_tree(item.kwargs, ref), writes=writes)
    if isinstance(item, Convert):
        return replace(item, value=one(item.value))
    if isinstance(item, Invoke):
        return replace(item, args=tuple(map(one, item.args)), writes=tuple((one(a), b) for a, b in item.writes))
    return replace(item, value=map_tree(item.value, ref))


def rewire(p: Program, b: LoweredBlock, body: list[Any], table: dict[int, int], start: int = 0, **changes: Any) -> Program:
    """The program with uses renamed from body position `start` on, and in the outputs."""
    body = body[:start] + [rename(x, table) for x in body[start:]]
    outputs = tuple(table.get(i, i) for i in b.outputs)
    if b.name == p.root:
        p = replace(p, output=map_refs(p.output, lambda r: Ref(table.get(r.id, r.id))))
    return put(p, replace(b, body=tuple(body), outputs=outputs, **changes))


def put(p: Program, *blocks: LoweredBlock) -> Program:
    return replace(p, blocks={**p.blocks, **{b.name: b for b in blocks}})


def edit(p: Program, b: LoweredBlock, n: int, item: Any) -> Program:
    return put(p, replace(b, body=(*b.body[:n], item, *b.body[n + 1 :])))


def items(p: Program, kind: type) -> Iterator[tuple[LoweredBlock, int, Any]]:
    for b in p.blocks.values():
        for n, item in enumerate(b.body):
            if isinstance(item, kind):
                yield b, n, item


def pick(found: Any, rng: Random) -> Any:
    found = list(found)
    return rng.choice(found) if found else None


def users(p: Program, b: LoweredBlock, i: int) -> list[Any]:
    """Who reads a value: body items, and 'output'."""
    out: list[Any] = [x for x in b.body if rename(x, {i: -1}) != x]
    if i in b.outputs or (b.name == p.root and any(r.id == i for r in refs(p.output))):
        out.append("output")
    return out


def backward_matters(p: Program, b: LoweredBlock, i: int) -> bool:
    """Whether a gradient flows into a value from some use of it."""
    v = b.values[i]
    if not v.grad:
        return False
    for x in users(p, b, i):
        if x == "output" or isinstance(x, Invoke):
            return True
        if isinstance(x, Convert) and backward_matters(p, b, x.out):
            return True
        made = [*(r.id for r in refs(x.out)), *(new for _, new in x.writes)] if isinstance(x, Local) else []
        if made and x.ctx.grad and any(b.values[j].grad for j in made):
            return True
    return False


def matters(p: Program, b: LoweredBlock, c: Convert) -> bool:
    """Whether leaving a conversion out changes a result or a gradient."""
    if not users(p, b, c.out) or p.mesh.sizes[p.mesh.index(c.axis)] == 1:
        return False
    return {c.src.kind, c.dst.kind} != {"R", "I"} or backward_matters(p, b, c.out)


def conversions(p: Program) -> list[tuple[LoweredBlock, int, Convert]]:
    return [(b, n, c) for b, n, c in items(p, Convert) if matters(p, b, c)]


def retype(b: LoweredBlock, i: int, t: Any) -> tuple[TypedValue, ...]:
    return (*b.values[:i], replace(b.values[i], type=t), *b.values[i + 1 :])


def last(fn: str) -> str:
    return fn.rpartition(".")[2]


def divisible(v: TypedValue, dim: int, by: int) -> bool:
    return v.shape[dim] % by == 0
