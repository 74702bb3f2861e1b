"""autopar show --diff: two plans op by op, and what two folders were made from.
Must not know how plans are made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autopar.cli.folder import find_folder
from autopar.codegen.savedir import read_manifest
from autopar.ir.codec import load_graph
from autopar.ir.graph import Graph, Op
from autopar.pas.address import address
from autopar.pas.plan import Plan
from autopar.pas.resolve import resolve


def diff(one: str, other: str) -> str:
    """What differs between two folders or plan files.

    Where a graph is at hand that both plans fit, the choices of its ops are compared, whatever patterns name them; else the
    entries as they are written.
    """
    (a, plan_a, manifest_a, graph_a), (b, plan_b, manifest_b, graph_b) = _read(one), _read(other)
    text = [f"- {a}", f"+ {b}"]
    if manifest_a and manifest_b:
        for part in ("graph", "code"):
            text += _fields(f"{part}: ", manifest_a[part], manifest_b[part], "nothing")
    if plan_a.mesh != plan_b.mesh:
        text.append(f"mesh: {plan_a.mesh} | {plan_b.mesh}")
    graph = next((g for g in (graph_a, graph_b) if g and {plan_a.graph, plan_b.graph} <= {"", g.fingerprint}), None)
    if plan_a.graph != plan_b.graph and plan_a.graph and plan_b.graph:
        text.append("the plans are for different graphs; entries are compared as they are written")
    ops = _ops(graph, plan_a, plan_b) if graph is not None else _fields("", plan_a.ops, plan_b.ops)
    text += [*ops, *_fields("parameter ", plan_a.params, plan_b.params)]
    return "\n".join(text) if len(text) > 2 else f"{a} and {b} are the same"


def _read(text: str) -> tuple[Path, Plan, dict[str, Any] | None, Graph | None]:
    if text.endswith(".json") or Path(text).is_file():
        return Path(text), Plan.load(text), None, None
    folder = find_folder(text)
    return folder, Plan.load(folder / "plan.json"), read_manifest(folder), load_graph(folder)


def _choices(graph: Graph, plan: Plan) -> dict[str, str]:
    """What every op does, by address: 'tp=n', 'I' where it is not split."""
    found = {}
    for v in resolve(graph, plan).variants.values():
        for op_id, choice in v.choices.items():
            text = " ".join(f"{a}={c}" for a, c in zip(plan.mesh.names, choice, strict=True) if c != "I") or "I"
            for path in v.instances:
                found[address(path, op_id)] = text
    return found


def _ops(graph: Graph, a: Plan, b: Plan) -> list[str]:
    """One row per op that differs; instances of a block that differ alike share a row."""
    old, new = _choices(graph, a), _choices(graph, b)
    rows = []
    for block in reversed(graph.blocks.values()):
        for op in (op for op in block.ops if isinstance(op, Op)):
            pairs: dict[tuple[str, str], list[str]] = {}
            for path in block.instances:
                where = address(path, op.id)
                pairs.setdefault((old[where], new[where]), []).append(where)
            for (x, y), places in pairs.items():
                if x != y:
                    name = address(block.address, op.id) if len(pairs) == 1 else ", ".join(places)
                    rows.append(f"{name}: {x} | {y}")
    return rows


def _fields(prefix: str, a: dict[str, Any], b: dict[str, Any], absent: str = "I") -> list[str]:
    """'name: old | new' for what differs."""
    keys = [*a, *(k for k in b if k not in a)]
    rows = [(k, a.get(k), b.get(k)) for k in keys]
    return [f"{prefix}{k}: {_shown(x, absent)} | {_shown(y, absent)}" for k, x, y in rows if (x or None) != (y or None)]


def _shown(x: Any, absent: str) -> str:
    if isinstance(x, dict) and all(isinstance(v, str) for v in x.values()):
        return " ".join(f"{k}={v}" for k, v in x.items()) or "I"
    return absent if x is None else repr(x)
