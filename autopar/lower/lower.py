"""lower: apply a plan to a graph. One walk over each block: convert inputs, localise the op, type its outputs.
Must not know any rule or any policy; what it makes is proven by check.py, written apart from it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autopar.errors import PlanError
from autopar.ir.graph import Block, Call, Graph, Guard, Op, Param, Ref, join, map_refs, op_inputs, op_outputs, refs
from autopar.ir.types import Step, Type, apply_step, cost, steps, whole
from autopar.lower.interface import Interfaces
from autopar.lower.optypes import is_size_read, normal
from autopar.lower.program import Convert, Invoke, Local, LoweredBlock, Placement, Program, TypedValue
from autopar.pas.plan import Plan
from autopar.pas.resolve import Resolved, Variant, resolve
from autopar.rules import localise

NO_COPY = frozenset({"i_to_r", "r_to_i", "i_to_s", "r_to_s", "s_to_p", "i_to_p", "r_to_p"})  # may share memory with their input


def lower(graph: Graph, plan: Plan) -> Program:
    """The program every rank of a unit runs under the plan. Raises PlanError as resolve does."""
    resolved = resolve(graph, plan)
    faces = Interfaces(graph, resolved)
    blocks = {name: _BlockLowering(graph, resolved, faces, v).run() for name, v in resolved.variants.items()}
    root = graph.body
    out_refs = [r.id for r in refs(graph.output)]
    lowered = blocks[resolved.root]
    position = {origin: lowered.outputs[i] for i, origin in enumerate(root.outputs)}
    inputs = dict(zip(root.inputs, lowered.inputs, strict=True))
    missing = [i for i in out_refs if i not in position and i not in inputs]
    assert not missing, f"graph outputs {missing} are not outputs of the root block"
    output = map_refs(graph.output, lambda r: Ref(position[r.id] if r.id in position else inputs[r.id]))
    placements = tuple(Placement(t.name, faces.placements[t.name]) for t in graph.tensors)
    return Program(plan.mesh, resolved.root, blocks, placements, output, plan)


class _BlockLowering:
    """The walk over one variant of a block."""

    def __init__(self, graph: Graph, resolved: Resolved, faces: Interfaces, variant: Variant) -> None:
        self.graph, self.variant, self.faces = graph, variant, faces
        self.block: Block = graph.blocks[variant.block]
        self.types = faces.types[variant.name]
        self.mesh = resolved.plan.mesh
        self.is_root = variant.name == resolved.root
        self.values: list[TypedValue] = []
        self.body: list[Local | Convert | Invoke | Guard] = []
        self.held: dict[int, dict[Type, int]] = {}  # graph value -> type -> lowered value
        self.primary: dict[int, int] = {}  # graph value -> the lowered value it was produced as

    def run(self) -> LoweredBlock:
        b, name = self.block, self.variant.name
        inputs = tuple(self.new(v, t) for v, t in zip(b.inputs, self.faces.inputs[name], strict=True))
        params = []
        for p in b.params:
            full = join(self.variant.instances[0] if self.variant.instances else "", p.name)
            params.append(Param(p.name, self.new(p.value, self.faces.placements[full]), p.kind))
        for op in b.ops:
            if isinstance(op, Guard):
                self.body.append(replace(op, value=map_refs(op.value, lambda r: Ref(self.need(r.id, whole(self.mesh))))))
            elif isinstance(op, Call):
                self.call(op)
            elif is_size_read(b, op):
                self.size_read(op)
            else:
                self.op(op)
        if self.is_root:
            outputs = tuple(self.need(v, whole(self.mesh)) for v in b.outputs)
        else:
            outputs = tuple(self.need(v, t) for v, t in zip(b.outputs, self.faces.outputs[name], strict=True))
        return LoweredBlock(
            name, b.name, inputs, outputs, tuple(params), tuple(self.values), tuple(self.body), b.recompute, self.variant.instances
        )

    # ---- values ------------------------------------------------------------------------------------------------

    def new(self, origin: int, t: Type, register: bool = True) -> int:
        v = self.block.values[origin]
        t = normal(v, t) if v.is_tensor else ()
        i = len(self.values)
        self.values.append(TypedValue(i, origin, v.name, v.kind, v.shape, v.dtype, v.grad, t))
        if register:
            self.held.setdefault(origin, {})[t] = i
            self.primary.setdefault(origin, i)
        return i

    def need(self, origin: int, t: Type) -> int:
        """The value in type t, converted (and kept for the next consumer) if it is not held so yet."""
        v = self.block.values[origin]
        if not v.is_tensor:
            return self.primary[origin]
        held, t = self.held[origin], normal(v, t)
        if t not in held:
            start = min(held, key=lambda h: cost(h, t, self.mesh, 1.0, grad=v.grad))
            self.convert(origin, held[start], steps(start, t, self.mesh, grad=v.grad, shape=v.shape))
        return self.held[origin][t]

    def convert(self, origin: int, at: int, chain: tuple[Step, ...], fresh: bool = False) -> int:
        """Append the conversions; fresh=True gives a copy that may be written in place and is not shared."""
        for n, step in enumerate(chain):
            t = apply_step(self.values[at].type, step)
            last = fresh and n == len(chain) - 1
            known = None if fresh else self.held[origin].get(normal(self.block.values[origin], t))
            if known is not None:
                at = known
                continue
            out = self.new(origin, t, register=not fresh)
            axis = self.mesh.names[step.axis]
            self.body.append(Convert(at, out, axis, step.src, step.dst, copy=last and step.name in NO_COPY))
            at = out
        return at

    def writable(self, origin: int, t: Type) -> int:
        """The value in type t as memory that may be written: where it was produced, or a fresh copy."""
        v = self.block.values[origin]
        t = normal(v, t)
        at = self.primary[origin]
        if self.values[at].type == t:
            return at
        return self.convert(origin, at, steps(self.values[at].type, t, self.mesh, grad=v.grad, shape=v.shape), fresh=True)

    # ---- statements ----------------------------------------------------------------------------------------------

    def op(self, op: Op) -> None:
        b, ot = self.block, self.types.of(op)
        emitted = localise(b, op, ot.recipe, ot.splits)
        written = {old for old, _ in op.writes}
        uses: dict[int, list[int]] = {}
        for v, t in zip(op_inputs(b, op), ot.inputs, strict=True):
            uses.setdefault(v.id, []).append(self.writable(v.id, t) if v.id in written else self.need(v.id, t))
        if len({len(set(u)) for u in uses.values()} - {1}) and _uses(emitted.args, emitted.kwargs) != _uses(op.args, op.kwargs):
            raise PlanError(f"{op.src}: {op.id} uses one tensor in two types, and its local form changes the arguments")

        def local(r: Ref) -> Ref:
            queue = uses.get(r.id)
            if queue is None:
                return Ref(self.primary[r.id])  # a run-time scalar
            return Ref(queue[0] if len(set(queue)) == 1 else queue.pop(0))

        args, kwargs = map_refs((emitted.args, emitted.kwargs), local)
        out_types = {v.id: t for v, t in zip(op_outputs(b, op), ot.outputs, strict=True)}
        old_ids = {}
        for old, new in op.writes:
            t = out_types.get(new, whole(self.mesh))
            old_ids[new] = uses[old][0] if old in uses else self.need(old, t)
        out = map_refs(op.out, lambda r: Ref(self.new(r.id, out_types.get(r.id, ()))))
        writes = []
        for _, new in op.writes:
            made = self.primary[new] if new in self.primary else self.new(new, out_types.get(new, self.values[old_ids[new]].type))
            writes.append((old_ids[new], made))
        rng = ()
        if ot.recipe is not None and ot.recipe.random and not emitted.fn.startswith("ap."):
            rng = tuple(s.axis for s in ot.splits)
        self.body.append(
            Local(
                op.id,
                emitted.fn,
                args,
                kwargs,
                out,
                self.variant.choices[op.id],
                op.src,
                op.ctx,
                op.path,
                tuple(writes),
                divide=emitted.divide,
                rng=rng,
                training=op.training,
            )
        )

    def size_read(self, op: Op) -> None:
        """A size means the logical size: the local one times the axes that shard the dim."""
        b = self.block
        emitted = localise(b, op, None, ())
        source = op_inputs(b, op)[0]
        at = self.primary[source.id]
        dim = _read_dim(op, len(source.shape))
        times = 1
        for a, k in zip(self.values[at].type, self.mesh.sizes, strict=True):
            if a.kind == "S" and (dim is None or a.dim == dim):
                times *= k
        args, kwargs = map_refs((emitted.args, emitted.kwargs), lambda r: Ref(at if r.id == source.id else self.primary[r.id]))
        out = map_refs(op.out, lambda r: Ref(self.new(r.id, ())))
        choice = self.variant.choices.get(op.id, ("I",) * len(self.mesh.axes))
        self.body.append(Local(op.id, emitted.fn, args, kwargs, out, choice, op.src, op.ctx, op.path, times=times))

    def call(self, call: Call) -> None:
        callee = self.variant.callees[call.id]
        in_types, out_types = self.faces.inputs[callee], self.faces.outputs[callee]
        written = {old for old, _ in call.writes}
        args = tuple(self.writable(a, t) if a in written else self.need(a, t) for a, t in zip(call.args, in_types, strict=True))
        passed = dict(zip(call.args, args, strict=True))
        old_ids = {new: passed[old] if old in passed else self.need(old, whole(self.mesh)) for old, new in call.writes}
        out = tuple(self.new(v, t) for v, t in zip(call.out, out_types, strict=True))
        writes = []
        for _, new in call.writes:
            made = self.primary[new] if new in self.primary else self.new(new, whole(self.mesh))
            writes.append((old_ids[new], made))
        self.body.append(Invoke(call.id, callee, args, out, tuple(writes)))


def _uses(args: Any, kwargs: Any) -> list[int]:
    return [r.id for r in refs((args, kwargs))]


def _read_dim(op: Op, ndim: int) -> int | None:
    """The dim a size read asks for; None for all of them (numel)."""
    rest = [a for a in op.args[1:] if isinstance(a, int)] + [v for k, v in op.kwargs.items() if k == "dim"]
    if rest:
        return rest[0] % ndim
    return 0 if op.fn.endswith("len__") else None
