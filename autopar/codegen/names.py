"""names: which Python variable holds each value of a block: the user's own names, reused when the old value is dead.
Must not know how statements are printed.

Versions of one tensor (in-place writes) share a *cell*; a cell has one variable, or is an attribute path (a parameter).
"""

from __future__ import annotations

import builtins
import keyword
import math
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from autopar.codegen.expr import RESERVED, tree_refs
from autopar.codegen.loops import Loop
from autopar.ir.graph import Guard
from autopar.lower.program import Convert, Invoke, Local, LoweredBlock, TypedValue


def identifier(hint: str) -> str:
    """A valid variable name near the hint."""
    name = re.sub(r"\W", "_", hint.rpartition(".")[2]).strip("_")
    if not name or name[0].isdigit():
        name = f"x_{name}" if name else "x"
    return f"{name}_" if keyword.iskeyword(name) or hasattr(builtins, name) else name


def uses(item: Any) -> Iterator[int]:
    """Values a statement reads."""
    if isinstance(item, Local):
        yield from tree_refs((item.args, item.kwargs))
    elif isinstance(item, Convert):
        yield item.value
    elif isinstance(item, Invoke):
        yield from item.args
    elif isinstance(item, Loop):
        for call in item.calls:
            yield from call.args
    elif isinstance(item, Guard):
        yield from tree_refs(item.value)


def defines(item: Any) -> Iterator[int]:
    """Values a statement binds a name to (not the new versions of what it writes)."""
    if isinstance(item, Local):
        yield from tree_refs(item.out)
    elif isinstance(item, Convert):
        yield item.out
    elif isinstance(item, Invoke):
        yield from item.out
    elif isinstance(item, Loop):
        for call in item.calls:
            yield from call.out


def writes(item: Any) -> Iterator[tuple[int, int]]:
    for call in item.calls if isinstance(item, Loop) else (item,):
        yield from getattr(call, "writes", ())


class Names:
    """Cells, their life times and their variables, for one block. `index` counts the items of the body."""

    def __init__(self, block: LoweredBlock, items: list[Any], reserved: Iterable[str] = (), hints: dict[int, str] | None = None) -> None:
        self.block = block
        self.hints = hints or {}  # value -> name, where it is not the value's own
        self.reserved = {*RESERVED, *reserved}
        self._parent = list(range(len(block.values)))
        for item in items:
            for old, new in writes(item):
                self._join(old, new)
            if isinstance(item, Loop):
                for values in item.carried():
                    for a, b in pairwise(values[1:]):
                        self._join(a, b)
        self.last: dict[int, float] = {}
        for i, item in enumerate(items):
            for v in uses(item):
                self.last[self.cell(v)] = i
        for v in block.outputs:
            self.last[self.cell(v)] = math.inf
        for i, item in enumerate(items):
            # NB: the carried value of a loop may also feed it: they share a variable where the first one dies there.
            if isinstance(item, Loop):
                for p, values in enumerate(item.carried()):
                    self._merge_start(i, item, values, {self.cell(v[0]) for q, v in enumerate(item.carried()) if q != p})
        self.expressions: dict[int, str] = {}  # cell -> variable or attribute path
        self._holders: dict[str, int] = {}  # variable -> cell it holds

    def _join(self, a: int, b: int) -> None:
        a, b = self.cell(a), self.cell(b)
        self._parent[max(a, b)] = min(a, b)

    def _merge_start(self, index: int, loop: Loop, values: list[int], others: set[int]) -> None:
        start, rest = self.cell(values[0]), self.cell(values[1])
        others |= {self.cell(p.value) for p in self.block.params} | {self.cell(a) for a in loop.fixed()}
        same_name = self.hint(start) == self.hint(rest)
        if same_name and start not in others and self.last.get(start) == index and start != rest:
            last = max(self.last.get(start, -1), self.last.get(rest, -1))
            self._join(start, rest)
            self.last[self.cell(start)] = last

    def hint(self, value: int) -> str:
        return identifier(self.hints.get(value) or self.block.values[value].name)

    def cell(self, value: int) -> int:
        while self._parent[value] != value:
            value = self._parent[value]
        return value

    def used(self, value: int) -> bool:
        return self.cell(value) in self.last

    def dies(self, value: int) -> float:
        """Index of the last item that reads the value (-1: none, inf: it is returned)."""
        return self.last.get(self.cell(value), -1)

    def bind(self, value: int, expression: str) -> None:
        """Give a value an expression from outside: an argument or an attribute."""
        cell = self.cell(value)
        self.expressions[cell] = expression
        if expression.isidentifier():
            self._holders[expression] = cell

    def known(self, value: int) -> bool:
        return self.cell(value) in self.expressions

    def __call__(self, value: int) -> str:
        """The expression of a value already bound."""
        return self.expressions[self.cell(value)]

    def busy(self, name: str, index: int) -> bool:
        """Whether the variable holds something that is read after item `index`."""
        return name in self.reserved or (name in self._holders and self.last.get(self._holders[name], -1) > index)

    def assign(self, value: int, index: int, suffix: str = "", avoid: Iterable[str] = ()) -> str:
        """A variable for a value bound by item `index`: its own name, else with the suffix, else numbered."""
        if self.known(value):
            return self(value)
        base = self.hint(value)
        base = base.lower() if base in self.reserved else base
        taken = set(avoid)
        candidates = [base] + ([f"{base}_{suffix}"] if suffix else [])
        n = 1
        while True:
            for name in candidates:
                if name not in taken and not self.busy(name, index):
                    self.bind(value, name)
                    return name
            candidates = [f"{base}_{n}"]
            n += 1

    def rebind(self, value: int, name: str) -> None:
        """Another variable for a value that has one."""
        old = self(value)
        if self._holders.get(old) == self.cell(value):
            del self._holders[old]
        self.bind(value, name)

    def loose(self, value: int) -> bool:
        """Whether the value's variable may be another one from here on: it is no attribute."""
        return self(value).isidentifier()

    def holder(self, name: str, index: int) -> int | None:
        """The value (a cell) a variable holds that is read after item `index`."""
        return self._holders[name] if name in self._holders and name not in self.reserved and self.busy(name, index) else None

    def scratch(self, hint: str, index: int) -> str:
        """A variable that holds no value of the block, such as that of a loop."""
        name, n = identifier(hint), 1
        while self.busy(name, index - 1):
            name, n = f"{identifier(hint)}_{n}", n + 1
        self._holders.pop(name, None)
        return name

    def held(self) -> Iterator[tuple[str, TypedValue]]:
        """Variables with the value each was bound for, in the order of binding."""
        for name, cell in self._holders.items():
            yield name, self.block.values[cell]

    def forget(self, name: str) -> None:
        """The variable was deleted."""
        del self._holders[name]
