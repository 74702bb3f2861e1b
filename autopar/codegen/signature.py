"""signature: the root's forward as its caller sees it: the user's arguments, their checks, and the output tree.
Must not know about classes or blocks other than the root.
"""

from __future__ import annotations

from typing import Any

from autopar.codegen.block import Forward
from autopar.codegen.expr import Code, string
from autopar.codegen.layout import long_where
from autopar.errors import AutoparError
from autopar.ir.graph import Argument, Graph, Ref, Struct
from autopar.ir.graph import refs as graph_refs

UNPRINTABLE = "None"


class Signature:
    """Binds the root's inputs to the user's arguments; `check_lines` unpack and check them."""

    def __init__(self, graph: Graph, forward: Forward) -> None:
        self.graph, self.forward = graph, forward
        block = forward.block
        self.local = {block.values[v].origin: v for v in block.inputs}  # graph value -> lowered value
        for a in graph.arguments:
            if a.name in ("torch", "F", "ap", "math"):
                raise AutoparError(f"the forward of {graph.module} has an argument {a.name!r}, a name that generated code needs; rename it")
        for a in graph.arguments:
            if isinstance(a.tree, Ref) and not a.kind.startswith("var_") and not forward.names.known(self.local[a.tree.id]):
                forward.names.bind(self.local[a.tree.id], a.name)
        self.params = [self._param(a) for a in graph.arguments]
        self.stmts: list[str] = self._mode()
        for a in graph.arguments:
            self._check(a.tree, a.name, a.name, top=True)

    def _mode(self) -> list[str]:
        """The check of the mode, where the other one takes a path that the graph does not have."""
        src = self.graph.branch
        if src is None:
            return []
        self.forward.around.imports.used.add("ap")
        text = " ".join(src.text.split())
        return [f"ap.check_mode(self.training, {self.graph.training}, {string(long_where(src))}, {string(text)})"]

    # -- def forward(...)

    def _param(self, a: Argument) -> str:
        if a.kind == "var_positional":
            return f"*{a.name}"
        if a.kind == "var_keyword":
            return f"**{a.name}"
        return f"{a.name}={self._literal(a.default)}" if a.has_default else a.name

    def head(self) -> str:
        """`self, input_ids, *, labels=None, **kwargs`."""
        out, star, slash = ["self"], False, False
        for a, text in zip(self.graph.arguments, self.params, strict=True):
            if slash and a.kind != "positional_only":
                out.append("/")
                slash = False
            slash = slash or a.kind == "positional_only"
            if a.kind == "keyword" and not star:
                out.append("*")
                star = True
            star = star or a.kind == "var_positional"
            out.append(text)
        return ", ".join([*out, "/"] if slash else out)

    def _literal(self, x: Any) -> str:
        try:
            return self.forward.printer.code(x).text
        except AssertionError:
            return UNPRINTABLE

    # -- unpacking and checks

    def _check(self, tree: Any, access: str, label: str, top: bool = False) -> None:
        """Lines for one leaf or container of an argument; access is its expression, label what errors call it."""
        ap = self.forward.around.imports.used
        names = self.forward.names
        if isinstance(tree, Ref):
            v = self.local[tree.id]
            if not names.known(v):
                used = names.used(v)
                target = names.assign(v, -1) if used else access
                if used and target != access:
                    self.stmts.append(f"{target} = {access}")
                    access = target
            elif names(v) != access:  # one tensor was given twice
                ap.add("ap")
                self.stmts.append(f"ap.check_argument({string(f'{label} is {names(v)}')}, {access} is {names(v)}, True)")
                return
            value = self.forward.value(v)
            if value.kind != "tensor":
                return
            shape = tuple(n if self.graph.folded else None for n in value.shape)
            ap.update(("ap", "torch"))
            self.stmts.append(f"ap.check_input({string(label)}, {access}, {self._literal(shape)}, torch.{value.dtype})")
        elif not any(True for _ in graph_refs(tree)):
            ap.add("ap")
            self.stmts.append(f"ap.check_argument({string(label)}, {access}, {self._literal(tree)})")
        elif isinstance(tree, dict):
            ap.add("ap")
            self.stmts.append(f"ap.check_structure({string(label)}, {access}, {self._literal(tuple(tree))})")
            for key, x in tree.items():
                index = f"[{self._literal(key)}]"
                self._check(x, access + index, f"{label}{index}")
        elif isinstance(tree, (tuple, list)):
            ap.add("ap")
            self.stmts.append(f"ap.check_structure({string(label)}, {access}, {len(tree)})")
            for i, x in enumerate(tree):
                self._check(x, f"{access}[{i}]", f"{label}[{i}]")
        elif isinstance(tree, Struct):
            for name, x in zip(tree.names, tree.items, strict=True):
                self._check(x, f"{access}.{name}", f"{label}.{name}")
        else:
            raise AssertionError(f"argument {label} has a {type(tree).__name__} in its tree")

    # -- return

    def returned(self, output: Any) -> str:
        return f"return {_top(self.forward.printer.code(output), output)}"


def _top(code: Code, tree: Any) -> str:
    """A returned tuple needs no parentheses."""
    if isinstance(tree, tuple) and len(tree) > 1:
        return code.text[1:-1]
    return code.text
