"""Facts about a graph, its plan and its program that the commands print.
Must not print.
"""

from __future__ import annotations

from collections import Counter
from math import prod

import torch

from autopar.ir.graph import Graph, Guard, Op, join, op_outputs
from autopar.ir.types import TABLE, local_shape
from autopar.lower.program import Convert, Local, LoweredBlock, Program
from autopar.pas.address import address
from autopar.rules import canonical, recipe_of

QUIET = {"nothing", "slice", "place", "keep_first"}  # what a conversion does without communication


def unruled(graph: Graph) -> dict[str, list[tuple[str, Op]]]:
    """Ops that no rule knows: name -> (address, op) of each, once per distinct block."""
    found: dict[str, list[tuple[str, Op]]] = {}
    for block in graph.blocks.values():
        for op in block.ops:
            if isinstance(op, Op) and op_outputs(block, op) and recipe_of(block, op) is None:
                found.setdefault(canonical(op.fn), []).append((address(block.address, op.id), op))
    return found


def guards(graph: Graph) -> list[tuple[str, Guard]]:
    """Every guard with the path of the module that read the value."""
    return [(join(b.address, x.path), x) for b in graph.blocks.values() for x in b.ops if isinstance(x, Guard)]


def communication(block: LoweredBlock) -> tuple[Counter[str], Counter[str]]:
    """Collectives of one call of a block, forward and backward, blocks it calls not counted.

    Emitted functions that take a mesh axis ('ap.vocab_embedding') communicate by themselves and count by name.
    """
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    for s in block.body:
        if isinstance(s, Convert):
            there, back = TABLE[s.src.kind, s.dst.kind]
            forward[there] += there not in QUIET
            backward[back] += back not in QUIET and block.values[s.value].grad
        elif isinstance(s, Local) and s.fn.startswith("ap.") and "AxisRef" in repr((s.args, s.kwargs)):
            forward[s.fn] += 1
    return +forward, +backward


def parameters(graph: Graph, program: Program) -> tuple[int, int, int]:
    """(parameters of the model, those one rank holds, bytes of the latter)."""
    whole = held = size = 0
    for t in graph.tensors:
        if t.kind == "param":
            local = prod(local_shape(t.shape, program.placement(t.name), program.mesh))
            whole += prod(t.shape)
            held += local
            size += local * getattr(torch, t.dtype).itemsize
    return whole, held, size
