"""autopar show: what a folder of generated code holds, and how two of them differ.
Must not know how they were made; everything comes from graph.json, plan.json, manifest.json and the code.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

from autopar.cli import facts
from autopar.cli.diff import diff
from autopar.cli.folder import find_folder
from autopar.ir.codec import load_graph
from autopar.ir.graph import Source
from autopar.lower.lower import lower
from autopar.pas.build import split_share
from autopar.pas.plan import Plan


def run(args: Namespace) -> int:
    if args.diff:
        print(diff(args.savedir, args.diff))
        return 0
    folder = find_folder(args.savedir)
    graph = load_graph(folder)
    if args.graph:
        print(graph, end="")
    elif args.guards:
        print(guards(graph))
    elif args.unruled:
        print(unruled(graph))
    elif args.plan:
        print((folder / "plan.json").read_text(), end="")
    else:
        program = lower(graph, Plan.load(folder / "plan.json"))
        print(str(program).rstrip("\n") if args.types else summary(folder, graph, program))
    return 0


def summary(folder: Path, graph: Any, program: Any) -> str:
    """The default view."""
    plan = program.plan
    manifest = json.loads((folder / "manifest.json").read_text())
    lines = len((folder / "model.py").read_text().splitlines())
    whole, held, size = facts.parameters(graph, program)
    units = manifest["code"]["runtime_ngpus"] // manifest["code"]["plan_ngpus"]
    mode, sizes = "train" if graph.training else "eval", "folded" if graph.folded else "symbolic"
    made = f" by policy {plan.policy}" if plan.policy else ""
    rows = [
        ("module", f"{graph.module}, traced in {mode} mode, sizes {sizes}"),
        ("plan", f"{plan.mesh if plan.mesh.axes else 'one device'}{made}, {units} scale unit{'s' * (units > 1)}"),
        ("code", f"{folder / 'model.py'}, {lines} lines"),
        ("matmul flops split", f"{100 * split_share(graph, plan):.1f}%"),
        ("parameters per rank", f"{held:,} of {whole:,}, {size / 1e6:,.1f} MB"),
        ("guards", f"{len(facts.guards(graph))}, and {len(graph.warnings)} warnings"),
        ("ops without a rule", str(sum(map(len, facts.unruled(graph).values())))),
    ]
    text = [f"{name:<20} {value}" for name, value in rows]
    blocks = [("block", "instances", "steps", "collectives forward", "backward")]
    for b in reversed(program.blocks.values()):
        forward, backward = map(_counted, facts.communication(b))
        blocks.append((b.name, str(max(1, len(b.instances))), str(len(b.body)), forward, backward))
    widths = [max(map(len, column)) for column in zip(*blocks, strict=True)]
    text += ["", *("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in blocks)]
    return "\n".join(text)


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counter.items())) or "none"


def guards(graph: Any) -> str:
    """What the trace took for granted: guards that generated code checks, and reads it cannot check."""
    text = []
    for path, g in facts.guards(graph):
        text.append(f"{place(g.src)}  {path or 'root'}: {g.read}(...) was {g.expected!r}  | {g.src.text}")
    head = "checked at run time:" if text else "checked at run time: nothing; no input's value was read"
    text = [head, *(f"  {t}" for t in text)]
    return "\n".join(text + ["taken for granted:" if graph.warnings else "taken for granted: nothing", *(f"  {w}" for w in graph.warnings)])


def unruled(graph: Any) -> str:
    """Ops without a rule, by name, with address and source line."""
    text = []
    for name, uses in facts.unruled(graph).items():
        text.append(f"{name}: replicated; tell autopar how it may be split with register_op (docs/rules.md)")
        text += [f"  {where}  {place(op.src)}  | {op.src.text}" for where, op in uses]
    return "\n".join(text) or "every op has a rule"


def place(src: Source) -> str:
    """file:line, the file as seen from here if it is below."""
    file = os.path.relpath(src.file) if src.file else "?"
    return f"{src.file if file.startswith('..') else file}:{src.line}"
