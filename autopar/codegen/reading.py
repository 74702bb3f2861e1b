"""reading: what makes a forward read well: section headers, scopes shared by neighbours, types as comments, the user's names.
Must not know how statements are made.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from functools import cache
from itertools import takewhile
from typing import Any

from autopar.codegen.layout import Stmt
from autopar.ir.graph import Guard
from autopar.ir.mesh import Mesh
from autopar.ir.types import AxisType, Type
from autopar.lower.program import Local

# The scopes that the statements before and after share; never no_grad around what carries a gradient (see join_scopes).
AROUND, AROUND_GRAD = ("*",), ("*grad",)


@cache
def operand_names(text: str) -> tuple[str, str]:
    """The variables on both sides of a line's only binary operator, '' where a side is none; ('', '') for other lines."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return "", ""
    found = [n for n in ast.walk(tree) if isinstance(n, ast.BinOp)]
    if len(found) != 1:
        return "", ""
    left, right = (s.id if isinstance(s, ast.Name) else "" for s in (found[0].left, found[0].right))
    return left, right


def type_note(t: Type, mesh: Mesh) -> str:
    """'S(2)' on a mesh of one axis, 'dp:S(0) tp:P' on several; axes of type I are left out."""
    shown = [(n, a) for n, a in zip(mesh.names, t, strict=False) if a.kind != "I"]
    if len(mesh.names) == 1:
        return " ".join(repr(a) for _, a in shown)
    return " ".join(f"{n}:{a!r}" for n, a in shown)


def shard_arguments(a: AxisType) -> str:
    """The arguments a shard adds to a conversion."""
    if a.kind != "S":
        return ""
    return f", {a.dim}" if a.outer == 1 else f", ({a.dim}, {a.outer})"


def sections(items: list[Any]) -> list[str | None]:
    """The header each op stands under: its module, or the parent of a small leaf module (a linear, a dropout)."""
    paths = [x.path if isinstance(x, (Local, Guard)) else None for x in items]
    known = sorted({p for p in paths if p})
    direct = set(known)
    children: dict[str, set[str]] = {}
    for p in known:
        for q in _prefixes(p):
            children.setdefault(q, set()).add(p[len(q) + 1 :].partition(".")[0])
    containers = children.keys()
    out: list[str | None] = [None] * len(items)
    i = 0
    while i < len(items):
        if paths[i] is None:
            i += 1
            continue
        j = i
        while j < len(items) and paths[j] in (paths[i], None):
            j += 1
        path = paths[i] or ""
        section = path
        if path not in containers and sum(p is not None for p in paths[i:j]) <= 2:
            section = path.rpartition(".")[0]
            while section and section not in direct and len(children[section]) == 1:  # a ModuleList or ModuleDict around one leaf
                section = section.rpartition(".")[0]
        for k in range(i, j):
            out[k] = section if paths[k] is not None else None
        i = j
    return out


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def join_scopes(stmts: list[Stmt]) -> list[Stmt]:
    """AROUND and AROUND_GRAD replaced by the scopes that the neighbours share."""
    out = list(stmts)
    for i, s in enumerate(stmts):
        if s.scopes not in (AROUND, AROUND_GRAD):
            continue
        before = out[i - 1].scopes if i else ()
        after = next((t.scopes for t in stmts[i + 1 :] if t.scopes not in (AROUND, AROUND_GRAD)), ())
        shared = []
        for a, b in zip(before, after):
            if a != b or a.startswith("if") or "random" in a or ("no_grad" in a and s.scopes == AROUND_GRAD):
                break
            shared.append(a)
        out[i] = replace(s, scopes=tuple(shared))
    return _keep_open(out)


def _keep_open(stmts: list[Stmt]) -> list[Stmt]:
    """Nest the contexts of a statement inside those that its predecessor left open; torch's own commute."""
    out: list[Stmt] = []
    before: tuple[str, ...] = ()
    for s in stmts:
        if all(x.startswith("with torch.") for x in (*before, *s.scopes)):
            kept = tuple(takewhile(s.scopes.__contains__, before))
            s = replace(s, scopes=kept + tuple(x for x in s.scopes if x not in kept))
        before = s.scopes
        out.append(s)
    return out
