"""loops: runs of calls of one block that only carry values on become one `for`.
Must not know about names or printing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autopar.codegen.expr import tree_refs
from autopar.ir.graph import Guard
from autopar.lower.program import Convert, Invoke, Local, LoweredBlock


@dataclass(frozen=True)
class Loop:
    """Consecutive calls; argument position p of a call is output q of the one before for each (p, q) of carry."""

    calls: tuple[Invoke, ...]
    carry: tuple[tuple[int, int], ...]

    def carried(self) -> list[list[int]]:
        """Per carried argument: its value before the loop, then after each call."""
        return [[self.calls[0].args[p], *(c.out[q] for c in self.calls)] for p, q in self.carry]

    def fixed(self) -> list[int]:
        """Arguments that are the same in every call."""
        positions = {p for p, _ in self.carry}
        return [a for i, a in enumerate(self.calls[0].args) if i not in positions]


def find_loops(block: LoweredBlock) -> list[Any]:
    """The body with maximal runs of calls replaced by Loops."""
    count = _use_counts(block)
    out: list[Any] = []
    body = list(block.body)
    i = 0
    while i < len(body):
        run, carry = _run(body, i, count) if isinstance(body[i], Invoke) else (1, ())
        out.append(Loop(tuple(body[i : i + run]), carry) if run > 1 else body[i])
        i += run
    return out


def _run(body: list[Any], start: int, count: dict[int, int]) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Length of the loop that starts here (1: none) and what it carries."""
    first, run = body[start], 1
    carry: tuple[tuple[int, int], ...] | None = None
    stride = 0
    while start + run < len(body):
        call, before = body[start + run], body[start + run - 1]
        if not isinstance(call, Invoke) or call.block != first.block or call.writes or first.writes:
            break
        if run == 1:
            stride = 0 if base_path(call.id) == base_path(first.id) else 1
        if base_path(call.id) != sibling(first.id, run * stride):
            break
        step = tuple((p, before.out.index(a)) for p, a in enumerate(call.args) if a in before.out)
        positions = {p for p, _ in step}
        outs = [q for _, q in step]
        if not step or len(set(outs)) != len(outs) or (carry is not None and step != carry):
            break
        if any(a != b for p, (a, b) in enumerate(zip(call.args, before.args, strict=True)) if p not in positions):
            break
        # Every other output, and any further use of a carried one, would be lost.
        if any(count.get(v, 0) != (1 if q in outs else 0) for q, v in enumerate(before.out)):
            break
        carry = step
        run += 1
    if run > 1 and carry is not None:
        last = body[start + run - 1]
        if all(count.get(v, 0) == 0 for q, v in enumerate(last.out) if q not in {q for _, q in carry}):
            return run, carry
        return (run - 1, carry) if run > 2 else (1, ())
    return 1, ()


def base_path(instance: str) -> str:
    """The module path of an instance: 'a.b#1' is another call of 'a.b'."""
    return instance.partition("#")[0]


def sibling(instance: str, step: int) -> str | None:
    """The path of the module `step` places further in a list: ('layers.0', 2) -> 'layers.2'. None outside of lists."""
    path = base_path(instance)
    parent, dot, leaf = path.rpartition(".")
    if step == 0:
        return path
    return f"{parent}{dot}{int(leaf) + step}" if leaf.isdecimal() else None


def _use_counts(block: LoweredBlock) -> dict[int, int]:
    """How many times each value is used: argument positions, and being returned."""
    count: dict[int, int] = {}

    def add(ids: Any) -> None:
        for v in ids:
            count[v] = count.get(v, 0) + 1

    for item in block.body:
        if isinstance(item, Local):
            add(tree_refs((item.args, item.kwargs)))
            add(old for old, _ in item.writes)
        elif isinstance(item, Convert):
            add((item.value,))
        elif isinstance(item, Invoke):
            add(item.args)
        elif isinstance(item, Guard):
            add(tree_refs(item.value))
    add(block.outputs)
    return count
