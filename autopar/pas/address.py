"""Addresses of ops and parameters, and the patterns that name many of them at once.
Must not know what a choice or a recipe is.

An op's address is '<module path>/<function>', 'model.layers.3.mlp.up_proj/linear'; the path of an op of the root module
is empty: '/add'. In a pattern `*` stands for (part of) one path component or of the function name, `**` for any number
of components; a pattern that ends in `**` and has no function part takes in every function.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import lru_cache

from autopar.ir.graph import Graph, Op, join


def address(instance: str, op_id: str) -> str:
    """The address of an op of a block instance: ('model.layers.3', 'mlp.up_proj/linear') -> 'model.layers.3.mlp.up_proj/linear'."""
    path, _, fn = op_id.rpartition("/")
    return f"{join(instance, path)}/{fn}"


def split_address(text: str) -> tuple[tuple[str, ...], str]:
    """An address or pattern as (path components, function part)."""
    if "/" in text:
        path, _, fn = text.rpartition("/")
    elif text == "**" or text.endswith(".**"):
        path, fn = text, "*"
    else:
        path, _, fn = text.rpartition(".")
    return tuple(p for p in path.split(".") if p), fn


@lru_cache(maxsize=65536)
def glob(pattern: str, text: str) -> bool:
    """Whether one component fits a pattern in which `*` is any run of characters."""
    if "*" not in pattern:
        return pattern == text
    return re.fullmatch(".*".join(map(re.escape, re.split(r"\*+", pattern))), text) is not None


class Trie:
    """Many patterns as one automaton over path components: its cost does not grow with the number of patterns that do not match.

    A state is a frozenset of node numbers; instances that lead to the same state are treated alike by every pattern.
    """

    def __init__(self) -> None:
        self.literal: list[dict[str, int]] = [{}]
        self.globs: list[dict[str, int]] = [{}]
        self.any: list[int | None] = [None]  # the child for '**'
        self.loops: list[bool] = [False]  # this node is a '**': it stays on every component
        self.ends: list[list[tuple[str, int]]] = [[]]  # (function pattern, entry number)

    def _node(self, loops: bool = False) -> int:
        self.literal.append({})
        self.globs.append({})
        self.any.append(None)
        self.loops.append(loops)
        self.ends.append([])
        return len(self.literal) - 1

    def add(self, path: tuple[str, ...], last: str, entry: int) -> None:
        n = 0
        for part in path:
            if part == "**":
                if self.any[n] is None:
                    self.any[n] = self._node(loops=True)
                n = self.any[n]
            else:
                table = self.globs[n] if "*" in part else self.literal[n]
                if part not in table:
                    table[part] = self._node()
                n = table[part]
        self.ends[n].append((last, entry))

    def _close(self, nodes: Iterable[int]) -> frozenset[int]:
        out, todo = set(), list(nodes)
        while todo:
            n = todo.pop()
            if n not in out:
                out.add(n)
                if self.any[n] is not None:
                    todo.append(self.any[n])
        return frozenset(out)

    @property
    def start(self) -> frozenset[int]:
        return self._close([0])

    def walk(self, state: frozenset[int], path: str) -> frozenset[int]:
        """The state after the components of a path."""
        for part in filter(None, path.split(".")):
            nodes = []
            for n in state:
                if part in self.literal[n]:
                    nodes.append(self.literal[n][part])
                nodes += [child for pattern, child in self.globs[n].items() if glob(pattern, part)]
                if self.loops[n]:
                    nodes.append(n)
            state = self._close(nodes)
        return state

    def entries(self, state: frozenset[int], last: str) -> list[int]:
        """The entries that end here with a matching function part, in the order they were added."""
        return sorted(e for n in state for pattern, e in self.ends[n] if glob(pattern, last))


def matches(pattern: str, text: str) -> bool:
    """Whether an op address fits a pattern."""
    trie = Trie()
    trie.add(*split_address(pattern), 0)
    path, fn = split_address(text)
    return bool(trie.entries(trie.walk(trie.start, ".".join(path)), fn))


def parameter_trie(patterns: Iterable[str]) -> Trie:
    """Patterns of parameter names, 'model.layers.*.mlp.**' or 'lm_head.weight'."""
    trie = Trie()
    for i, pattern in enumerate(patterns):
        path, _, last = pattern.rpartition(".")
        if last == "**":
            path, last = pattern, "*"
        trie.add(tuple(p for p in path.split(".") if p), last, i)
    return trie


def addresses(graph: Graph) -> list[str]:
    """Every op address once, repeated blocks by their common pattern."""
    return [address(b.address, op.id) for b in graph.blocks.values() for op in b.ops if isinstance(op, Op)]


def nearest(text: str, valid: Iterable[str]) -> str:
    """A sentence ending that names the most similar address, or where to see them all."""
    near = difflib.get_close_matches(text, list(dict.fromkeys(valid)), n=1, cutoff=0.3)
    return f"the nearest is {near[0]!r}" if near else "print(graph) lists them"
