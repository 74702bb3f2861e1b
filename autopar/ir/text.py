"""A graph as text that a person reads: blocks, one line per op with shapes, module path and source line.
Must not know how the graph was made; the text is for people and is not parsed back (ir/codec.py is the saved form).
"""

from __future__ import annotations

import os
import re
from typing import Any

from autopar.ir import graph as ir
from autopar.ir.graph import AxisRef, Block, Call, Global, Graph, Guard, Op, Ref, Scaled, Source, Struct, Value

DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


def short_dtype(dtype: str) -> str:
    """'float32' -> 'f32', 'int64' -> 'i64', 'bool' -> 'bool', 'float8_e4m3fn' -> 'f8_e4m3fn'."""
    m = re.fullmatch(r"(float|bfloat|int|uint|complex)(\d.*)", dtype)
    return DTYPES[m[1]] + m[2] if m else dtype


def format_value(v: Value) -> str:
    """'f32[4,6,64]' for tensors, 'int' for scalars."""
    return f"{short_dtype(v.dtype)}[{','.join(map(str, v.shape))}]" if v.is_tensor else v.dtype


def format_tree(tree: Any) -> str:
    """An argument tree as Python-like text; values are %id."""
    if isinstance(tree, tuple):
        return "(" + ", ".join(map(format_tree, tree)) + ("," if len(tree) == 1 else "") + ")"
    if isinstance(tree, list):
        return "[" + ", ".join(map(format_tree, tree)) + "]"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{k!r}: {format_tree(v)}" for k, v in tree.items()) + "}"
    if isinstance(tree, slice):
        text = ":".join("" if x is None else format_tree(x) for x in (tree.start, tree.stop))
        return text + (f":{format_tree(tree.step)}" if tree.step is not None else "")
    if isinstance(tree, Struct):
        return (
            f"{tree.cls.rpartition(':')[2]}("
            + ", ".join(f"{n}={format_tree(x)}" for n, x in zip(tree.names, tree.items, strict=True))
            + ")"
        )
    if isinstance(tree, Global):
        return tree.name.rpartition(":")[2]
    if isinstance(tree, Scaled):
        return f"{format_tree(tree.ref)} // {tree.divisor}"
    if isinstance(tree, AxisRef):
        return f"@{tree.name}"
    return "..." if tree is Ellipsis else repr(tree)


def short_fn(fn: str) -> str:
    """The function as a reader knows it: 'linear', 'Tensor.view' as 'view', 'apply:pkg:Class' as 'Class.apply'."""
    last = re.split(r"[.:]", fn.removesuffix(".__get__"))[-1]
    return f"{last}.apply" if fn.startswith("apply:") else last.removeprefix("__").removesuffix("__") if last.startswith("__") else last


def format_call(fn: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    parts = [format_tree(a) for a in args] + [f"{k}={format_tree(v)}" for k, v in kwargs.items()]
    return f"{short_fn(fn)}({', '.join(parts)})"


def where(path: str, src: Source) -> str:
    """The trailing comment: module path and source line."""
    line = f"{os.path.basename(src.file)}:{src.line}" if src.file else ""
    return "  # " + "  ".join(filter(None, [path, line])) if path or line else ""


def pairs(writes: tuple[tuple[int, int], ...]) -> str:
    """' writes %3 -> %7' or nothing."""
    return " writes " + ", ".join(f"%{a} -> %{b}" for a, b in writes) if writes else ""


def notes(op: Any) -> str:
    """What is unusual about an op's run: no_grad, autocast, in-place writes, unsplittable."""
    words = [] if op.ctx.grad else ["no_grad"]
    words += [f"autocast({d}, {t})" if on else f"autocast({d}, off)" for d, t, on in op.ctx.autocast]
    words += ["whole"] * getattr(op, "whole", False) + ["training"] * op.training
    return pairs(op.writes) + (f" [{', '.join(words)}]" if words else "")


def format_guard(g: Guard) -> str:
    return f"guard {g.read}({format_tree(g.value)}) == {g.expected!r}{where(g.path, g.src)}"


def results(ids: list[int], show: Any) -> str:
    """The left side of a line: '%12 q: f32[4,6,64] = '."""
    return ", ".join(map(show, ids)) + " = " if ids else ""


def _line(x: Op | Call | Guard, b: Block) -> str:
    show = lambda i: f"%{i} {b.values[i].name}: {format_value(b.values[i])}"  # noqa: E731
    if isinstance(x, Guard):
        return format_guard(x)
    if isinstance(x, Call):
        return f"{results(list(x.out), show)}{x.block}({', '.join(f'%{i}' for i in x.args)}){pairs(x.writes)}  # {x.id}"
    out = [r.id for r in ir.refs(x.out)]
    # NB: a tree other than one value or a flat tuple is shown as a pattern in front.
    flat = x.out is None or isinstance(x.out, Ref) or (isinstance(x.out, tuple) and all(isinstance(r, Ref) for r in x.out))
    pattern = "" if flat else f"{format_tree(x.out)} <- "
    return f"{results(out, show)}{pattern}{format_call(x.fn, x.args, x.kwargs)}{notes(x)}{where(x.path, x.src)}"


def format_block(b: Block) -> str:
    """One block as text."""
    n = len(b.instances)
    count = f"{b.address or 'root'}, {n} instances" if n > 1 else b.address or "root"
    lines = [f"block {b.name}{' recompute' if b.recompute else ''}  # {count}  {b.cls}"]
    lines += [f"  input %{i} {b.values[i].name}: {format_value(b.values[i])}" for i in b.inputs]
    lines += [f"  {p.kind} %{p.value} {p.name}: {format_value(b.values[p.value])}" for p in b.params]
    lines += [f"  {_line(x, b)}" for x in b.ops]
    lines.append("  return " + ", ".join(f"%{i}" for i in b.outputs))
    return "\n".join(lines)


def format_graph(graph: Graph) -> str:
    """A graph as text."""
    mode = ["train" if graph.training else "eval", "sizes folded" if graph.folded else "sizes symbolic"]
    ops = sum(len(b.ops) for b in graph.blocks.values())
    lines = [f"graph {graph.module}: {len(graph.blocks)} blocks, {ops} ops, {len(graph.tensors)} tensors, {', '.join(mode)}"]
    for a in graph.arguments:
        if a.given:
            lines.append(f"  argument {a.name} = {format_tree(a.tree)}")
    lines.append(f"  output {format_tree(graph.output)}")
    if graph.branch:
        lines.append(f"  refuses {'eval' if graph.training else 'train'} mode: {graph.branch} `{graph.branch.text}`")
    lines += [f"  tied {' = '.join((t.name, *t.aliases))}" for t in graph.tensors if t.aliases]
    lines += [f"  warning {w}" for w in graph.warnings]
    return "\n\n".join(["\n".join(lines), *(format_block(b) for b in reversed(graph.blocks.values()))]) + "\n"
