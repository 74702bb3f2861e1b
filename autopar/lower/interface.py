"""Types at block boundaries and of parameters: chosen from what all uses require, before any block is lowered.
Must not know about the statements inside a lowered block.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from math import prod

from autopar.ir.graph import Call, Graph, Guard, Op, Tensor, join, op_inputs, op_outputs, refs
from autopar.ir.types import AxisType, I, P, R, Type, cost, divides, is_valid, whole, with_nest, without_grad
from autopar.lower.optypes import VariantTypes, is_size_read
from autopar.pas.resolve import Resolved

ITEM = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "complex64": 8, "float16": 2, "bfloat16": 2, "int16": 2}


class Interfaces:
    """Input and output types of every variant, and the placement of every parameter.

    After construction: `inputs[variant]`, `outputs[variant]`: types per position; `placements[name]`: type of a parameter.
    """

    def __init__(self, graph: Graph, resolved: Resolved) -> None:
        self.graph, self.resolved, self.mesh = graph, resolved, resolved.plan.mesh
        self.types = {name: VariantTypes(graph, v, self.mesh) for name, v in resolved.variants.items()}
        self.inputs: dict[str, list[Type]] = {}
        self.outputs: dict[str, list[Type]] = {}
        self._wants: dict[str, dict[int, list[Type]]] = {}
        self._forced: dict[str, set[int]] = {}
        for name in resolved.variants:  # callees before callers
            self._wants[name], self._forced[name] = self._collect(name)
        self._arrivals: dict[tuple[str, int], Counter[Type]] = defaultdict(Counter)  # how often each type is handed in
        self._produced: dict[tuple[str, tuple[Type, ...]], list[Type]] = {}
        self.placements: dict[str, Type] = self._place_parameters()
        for name in reversed(resolved.variants):  # callers before callees
            self._bind(name)

    # ---- what every value is asked for -------------------------------------------------------------------------

    def _collect(self, name: str) -> tuple[dict[int, list[Type]], set[int]]:
        """Types each value of a variant is required in (through calls too), and the values that are written in place."""
        vt = self.types[name]
        wants: dict[int, list[Type]] = defaultdict(list)
        written = set(vt.written)
        for op in vt.block.ops:
            if isinstance(op, Guard):
                for r in refs(op.value):
                    if vt.block.values[r.id].is_tensor:
                        wants[r.id].append(whole(self.mesh))
            elif isinstance(op, Call):
                callee = self.resolved.variants[vt.variant.callees[op.id]]
                block = self.graph.blocks[callee.block]
                for arg, inner in zip(op.args, block.inputs, strict=True):
                    wants[arg] += self._wants[callee.name].get(inner, [])
                    if inner in self._forced[callee.name]:
                        written.add(arg)
            elif not is_size_read(vt.block, op):
                for v, t in zip(op_inputs(vt.block, op), vt.of(op).inputs, strict=True):
                    wants[v.id].append(t)
        return wants, written

    def _place_parameters(self) -> dict[str, Type]:
        """The placement of every tensor from its uses in all blocks, or as the plan forces it."""
        # NB: tensors of all instances of a block have the same uses, so the work is done once per distinct tuple of uses.
        uses: dict[str, list[tuple[str, int]]] = defaultdict(list)
        set_whole: set[str] = set()
        for name, variant in self.resolved.variants.items():
            block = self.types[name].block
            for p in block.params:
                for path in variant.instances:
                    uses[join(path, p.name)].append((name, p.value))
            for op in block.ops:
                if isinstance(op, Op) and op.fn == "autopar:set_buffer":
                    set_whole.update(join(path, op.args[0]) for path in variant.instances)
        known: dict[tuple, Type] = {}
        out = {}
        for t in self.graph.tensors:
            forced = self.resolved.params.get(t.name, {})
            where = tuple(uses.get(t.name, ()))
            key = (where, t.shape, t.grad, t.name in set_whole, tuple(forced.items()))
            if key not in known:
                known[key] = self._place(where, t, forced, t.name in set_whole)
            out[t.name] = known[key]
        return out

    def _place(self, uses: tuple[tuple[str, int], ...], t: Tensor, forced: dict[str, AxisType], set_whole: bool) -> Type:
        """The placement of one tensor: forced, else what its writers or (if nobody writes it) its readers ask for."""
        wants = [w for name, v in uses for w in self._wants[name].get(v, [])]
        written = [w for name, v in uses if v in self.types[name].written for w in self._wants[name].get(v, [])]
        if set_whole:
            written = [whole(self.mesh)]
        asked = written or wants
        kinds = tuple(forced.get(axis) or _placement([u[i] for u in asked], bool(written)) for i, axis in enumerate(self.mesh.names))
        kinds = with_nest(kinds if t.grad else without_grad(kinds))
        return kinds if is_valid(kinds) and divides(t.shape, kinds, self.mesh) else (R if t.grad else I,) * len(kinds)

    # ---- block inputs and outputs ------------------------------------------------------------------------------

    def _bind(self, name: str) -> None:
        """Fix the input types of a variant, then tell its callees what arrives at their call sites."""
        vt, variant = self.types[name], self.resolved.variants[name]
        root = name == self.resolved.root
        inputs = []
        for position, v in enumerate(vt.block.inputs):
            value = vt.block.values[v]
            if root or not value.is_tensor or v in self._forced[name]:
                inputs.append(whole(self.mesh))
            else:
                inputs.append(self._choose(name, v, self._arrivals[name, position]))
        self.inputs[name] = inputs
        held: dict[int, Type] = dict(zip(vt.block.inputs, inputs, strict=True))
        for p in vt.block.params:
            held[p.value] = self.placements[join(variant.instances[0], p.name)]
        count = max(1, len(variant.instances))
        for op in vt.block.ops:
            if isinstance(op, Op):
                for v, t in zip(op_outputs(vt.block, op), vt.of(op).outputs, strict=True):
                    held[v.id] = t
                for old, new in op.writes:
                    held.setdefault(new, held.get(old, whole(self.mesh)))
            elif isinstance(op, Call):
                callee = vt.variant.callees[op.id]
                for position, arg in enumerate(op.args):
                    if vt.block.values[arg].is_tensor:
                        self._arrivals[callee, position][held[arg]] += count
                for v, t in zip(op.out, self._output_types(callee, tuple(held.get(a, ()) for a in op.args)), strict=True):
                    held[v] = t
                for _, new in op.writes:
                    held.setdefault(new, whole(self.mesh))
        self.outputs[name] = [held.get(v, whole(self.mesh)) for v in vt.block.outputs]

    def _output_types(self, name: str, arrivals: tuple[Type, ...]) -> list[Type]:
        """Types of a callee's outputs as its ops produce them; an input that is passed through is taken as it arrives."""
        if (name, arrivals) in self._produced:
            return self._produced[name, arrivals]
        vt = self.types[name]
        held: dict[int, Type] = dict(zip(vt.block.inputs, arrivals, strict=True))
        for p in vt.block.params:
            held[p.value] = self.placements[join(vt.variant.instances[0], p.name)]
        for op in vt.block.ops:
            if isinstance(op, Op):
                for v, t in zip(op_outputs(vt.block, op), vt.of(op).outputs, strict=True):
                    held[v.id] = t
            elif isinstance(op, Call):
                inner = self._output_types(vt.variant.callees[op.id], tuple(held.get(a, ()) for a in op.args))
                held.update(zip(op.out, inner, strict=True))
        out = self._produced[name, arrivals] = [held.get(v, whole(self.mesh)) for v in vt.block.outputs]
        return out

    def _choose(self, name: str, value: int, arrivals: Counter[Type]) -> Type:
        """The input type with the least communication over all call sites and all uses inside; ties prefer a use's type."""
        v = self.types[name].block.values[value]
        wants = list(dict.fromkeys(self._wants[name].get(value, [])))
        if not v.grad:
            wants = list(dict.fromkeys(without_grad(t) for t in wants))
        nbytes = float(prod(v.shape) * ITEM.get(v.dtype, 1)) or 1.0
        candidates = [t for t in dict.fromkeys([*wants, *arrivals, whole(self.mesh)]) if P not in t]
        instances = max(1, arrivals.total())

        def total(t: Type) -> float:
            outside = sum(n * cost(a, t, self.mesh, nbytes, grad=v.grad) for a, n in arrivals.items())
            return outside + instances * sum(cost(t, w, self.mesh, nbytes, grad=v.grad) for w in wants)

        return min(candidates, key=total)


def _placement(uses: list[AxisType], written: bool) -> AxisType:
    """One axis: what a parameter is held as. A use as P enters on the first rank only, which I gives without communication."""
    kinds = list(dict.fromkeys(I if u == P else u for u in uses)) or [I]
    if len(kinds) == 1:
        return kinds[0]
    assert not written, f"a buffer is written under different types: {kinds}"
    return R
