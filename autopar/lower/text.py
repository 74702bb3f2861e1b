"""A lowered program as text that a person reads: typed values, conversions, local ops.
Must not know how it was lowered nor how it is printed as Python (codegen).
"""

from __future__ import annotations

from autopar.ir import graph as ir
from autopar.ir.graph import Guard
from autopar.ir.mesh import Mesh
from autopar.ir.text import format_call, format_guard, format_tree, notes, pairs, results, short_dtype, where
from autopar.ir.types import Type
from autopar.lower.program import Convert, Invoke, Local, LoweredBlock, Program, TypedValue


def format_type(t: Type, mesh: Mesh) -> str:
    """'@tp:S(2)'; axes on which a value is I are left out."""
    parts = [f"{name}:{a}" for (name, _), a in zip(mesh.axes, t, strict=True) if a.kind != "I"]
    return " @" + " ".join(parts) if parts else ""


def format_typed(v: TypedValue, mesh: Mesh) -> str:
    """'f32[4,6,64 @tp:S(2)]': the global shape and how the ranks hold it."""
    if v.kind != "tensor":
        return v.dtype
    return f"{short_dtype(v.dtype)}[{','.join(map(str, v.shape))}{format_type(v.type, mesh)}]"


def _line(x: Local | Convert | Invoke | Guard, b: LoweredBlock, mesh: Mesh) -> str:
    show = lambda i: f"%{i} {b.values[i].name}: {format_typed(b.values[i], mesh)}"  # noqa: E731
    if isinstance(x, Guard):
        return format_guard(x)
    if isinstance(x, Convert):
        return f"{results([x.out], show)}%{x.value}: {x.src} -> {x.dst} on {x.axis}{' [copy]' if x.copy else ''}"
    if isinstance(x, Invoke):
        return f"{results(list(x.out), show)}{x.block}({', '.join(f'%{i}' for i in x.args)}){pairs(x.writes)}  # {x.id}"
    split = [f"{name}:{c}" for (name, _), c in zip(mesh.axes, x.choice, strict=True) if c != "I"]
    words = [f"split {' '.join(split)}"] * bool(split) + [f"/ {x.divide}"] * (x.divide != 1) + [f"* {x.times}"] * (x.times != 1)
    words += [f"random per {', '.join(x.rng)}"] * bool(x.rng)
    extra = f" [{', '.join(words)}]" if words else ""
    out = results([r.id for r in ir.refs(x.out)], show)
    return f"{out}{format_call(x.fn, x.args, x.kwargs)}{notes(x)}{extra}{where(x.path, x.src)}"


def format_lowered(b: LoweredBlock, mesh: Mesh) -> str:
    """One lowered block as text."""
    address = ir.generalise(b.instances) if b.instances else ""
    lines = [f"block {b.name}{' recompute' if b.recompute else ''}  # {address or 'root'}, from {b.source}"]
    lines += [f"  input %{i} {b.values[i].name}: {format_typed(b.values[i], mesh)}" for i in b.inputs]
    lines += [f"  {p.kind} %{p.value} {p.name}: {format_typed(b.values[p.value], mesh)}" for p in b.params]
    lines += [f"  {_line(x, b, mesh)}" for x in b.body]
    lines.append("  return " + ", ".join(f"%{i}" for i in b.outputs))
    return "\n".join(lines)


def format_program(program: Program) -> str:
    """A program as text."""
    mesh = ", ".join(f"{n}={k}" for n, k in program.mesh.axes)
    steps = [x for b in program.blocks.values() for x in b.body]
    conversions = sum(isinstance(x, Convert) for x in steps)
    lines = [f"program on mesh({mesh}): {len(program.blocks)} blocks, {len(steps)} steps, {conversions} of them conversions"]
    lines.append(f"  output {format_tree(program.output)}")
    blocks = (format_lowered(b, program.mesh) for b in reversed(program.blocks.values()))
    return "\n\n".join(["\n".join(lines), *blocks]) + "\n"
