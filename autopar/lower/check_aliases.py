"""Aliases: which lowered values share storage, so that the checker can judge in-place writes.
Must not know about types or rules: only the order of ops, views, writes and conversions.

Two values of the source share storage if a chain of views and in-place versions connects them. In the lowered block the same
chain must connect the values that hold them, with no conversion in between: a conversion may copy, and a write to the copy would
leave the other value unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from autopar.ir.graph import Block, Call, Op, refs
from autopar.lower.program import Convert, Invoke, Local, LoweredBlock
from autopar.rules import canonical

# Canonical names of functions whose result may be a view of their first tensor argument.
VIEWS = frozenset(re.findall(r"\w+", """
    view view_as reshape reshape_as transpose permute movedim squeeze unsqueeze expand expand_as chunk split tensor_split hsplit vsplit
    dsplit unbind select narrow diagonal flatten unflatten t T mT H mH adjoint real imag detach contiguous to type_as unfold as_strided
    getitem broadcast_to view_as_real view_as_complex atleast_1d atleast_2d atleast_3d alias data
"""))  # fmt: skip

# NB: their running statistics are written beside each other, not through one another.
NORMS = frozenset(["batch_norm", "instance_norm"])


class Classes:
    """Union-find over value ids; the representative of a class is the member it began with."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}

    def find(self, i: int) -> int:
        while i in self.parent:
            i = self.parent[i]
        return i

    def join(self, first: int, other: int) -> None:
        a, b = self.find(first), self.find(other)
        if a != b:
            self.parent[b] = a


def _classes(items: Any, tensor: Callable[[int], bool]) -> Classes:
    found = Classes()
    for o in items:
        if isinstance(o, (Op, Local)) and canonical(o.fn) in VIEWS:
            first = next((r.id for r in refs((o.args, o.kwargs)) if tensor(r.id)), None)
            for r in refs(o.out):
                if first is not None and tensor(r.id):
                    found.join(first, r.id)
        if isinstance(o, (Op, Local, Call, Invoke)):
            for old, new in o.writes:
                found.join(old, new)
    return found


class Aliases:
    """Storage classes of a source block and of its lowered form. `writing` maps the lowered callees to the inputs they write."""

    def __init__(self, src: Block, low: LoweredBlock, writing: dict[str, set[int]]) -> None:
        self.src, self.low = src, low
        self.of_src = _classes(src.ops, lambda i: src.values[i].is_tensor)
        self.of_low = _classes(low.body, lambda i: 0 <= i < len(low.values) and low.values[i].kind == "tensor")
        self.converted = {c.out for c in low.body if isinstance(c, Convert)}
        self.written: set[int] = set()
        for o in low.body:
            if isinstance(o, (Local, Invoke)):
                self.written |= {self.of_low.find(old) for old, _ in o.writes}
            if isinstance(o, Invoke):
                self.written |= {self.of_low.find(o.args[n]) for n in writing.get(o.block, ()) if n < len(o.args)}
        self.kept = {self.of_src.find(p.value) for p in src.params}

    def is_written(self, i: int) -> bool:
        """Whether a lowered value, or a view or a later version of it, is written in place."""
        return self.of_low.find(i) in self.written

    def is_kept(self, i: int) -> bool:
        """Whether a lowered value shares storage with a tensor of the module, in the source."""
        return self.of_src.find(self.low.values[i].origin) in self.kept

    def written_inputs(self) -> set[int]:
        return {n for n, i in enumerate(self.low.inputs) if self.is_written(i)}

    def wrong_writes(self, writes: Any, fn: str) -> list[str]:
        """In-place writes that some alias would not see: lowered (old, new) pairs of one op or call."""
        out = []
        source = lambda i: self.of_src.find(self.low.values[i].origin)  # noqa: E731
        several = len({source(old) for old, _ in writes}) > 1 and canonical(fn) not in NORMS
        first: dict[int, int] = {}
        for old, _ in writes:
            name, start = self.low.values[old].name, self.of_low.find(old)
            other = first.setdefault(source(old), old)
            if self.of_low.find(other) != start:
                out.append(f"writes %{old} {name!r}, which shares storage with %{other} in the source but is a copy here")
            elif start in self.converted and (several or source(old) in self.kept):
                out.append(f"writes %{old} {name!r}, a converted copy: what it was made from would keep its old value")
        return out
