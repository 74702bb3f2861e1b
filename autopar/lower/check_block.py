"""The checks of one lowered block against its source block: wiring, types, local forms, conversions, calls, in-place writes.
Must not know how lowering works, nor anything of other blocks but their interfaces.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

from autopar import rules
from autopar.ir.graph import Block, Call, Graph, Guard, Op, Ref, Struct, map_refs, op_inputs, op_outputs, refs
from autopar.ir.types import TABLE, I, Step, Type, apply_step, is_valid, with_nest, without_grad
from autopar.lower.check_aliases import Aliases
from autopar.lower.program import Convert, Invoke, Local, LoweredBlock, Program, TypedValue
from autopar.rules.recipe import Emitted, Recipe, Scaled, Split

SET_BUFFER = "autopar:set_buffer"
SHARING = ("nothing", "slice", "keep_first")  # what a conversion may do forward without making a new tensor


class Shared:
    """What the checks of all blocks have in common."""

    def __init__(self, graph: Graph, program: Program) -> None:
        self.graph, self.program, self.mesh = graph, program, program.mesh
        self.errors: list[str] = []
        self.done: set[str] = set()  # lowered blocks checked so far
        self.writing: dict[str, set[int]] = {}  # lowered block -> positions of inputs it writes in place
        self.buffers: list[tuple[str, str, TypedValue]] = []  # (lowered block, name, value) of buffers that are set
        self.recipes: dict[tuple[str, str], Recipe | None] = {}

    def recipe(self, block: Block, op: Op) -> Recipe | None:
        key = (block.name, op.id)
        if key not in self.recipes:
            self.recipes[key] = rules.recipe_of(block, op)
        return self.recipes[key]

    def guarded(self, where: str, f: Callable[[], None]) -> None:
        """Run a check; a program so broken that the check itself fails is an error like any other."""
        try:
            f()
        except (LookupError, ValueError, TypeError, AttributeError, AssertionError) as e:
            self.errors.append(f"{where}: cannot be checked: {type(e).__name__}: {e}")


class BlockCheck:
    """The checks of one lowered block against its source block."""

    def __init__(self, shared: Shared, src: Block, low: LoweredBlock) -> None:
        self.shared, self.src, self.low, self.mesh = shared, src, low, shared.mesh
        self.defined: dict[int, str] = {}
        self.stale: dict[int, str] = {}  # origin -> what overwrote it
        self.aliases = Aliases(src, low, shared.writing)
        shared.writing[low.name] = self.aliases.written_inputs()
        self.here = ""

    def wrong(self, message: str) -> None:
        self.shared.errors.append(f"{self.low.name}: {self.here}{message}")

    def run(self) -> None:
        src, low = self.src, self.low
        for i, v in enumerate(low.values):
            self.value(i, v)
        if any(v.id != i for i, v in enumerate(low.values)):
            return
        params = [p.value for p in low.params], [p.value for p in src.params]
        for what, ids, origins in (("inputs", low.inputs, src.inputs), ("params", *params)):
            if [self.origin(i) for i in ids] != list(origins):
                self.wrong(f"{what} hold {self.names(ids)}, expected {[src.values[i].name for i in origins]}")
            for i in ids:
                self.define(i, what)
        if [(p.name, p.kind) for p in low.params] != [(p.name, p.kind) for p in src.params]:
            self.wrong(f"params are {[p.name for p in low.params]}, expected {[p.name for p in src.params]}")
        if low.recompute != src.recompute:
            self.wrong(f"recompute is {low.recompute}, expected {src.recompute}")
        self.body()
        self.here = ""
        if [self.origin(i) for i in low.outputs] != list(src.outputs):
            self.wrong(f"outputs hold {self.names(low.outputs)}, expected {[src.values[i].name for i in src.outputs]}")
        for i in low.outputs:
            self.use(i, "output")
        if low.name == self.shared.program.root:
            self.tree(self.shared.graph.output, self.shared.program.output, "module output", lambda want, got, at: self.ref(want, got, at))

    # values

    def value(self, i: int, v: TypedValue) -> None:
        if v.id != i or not 0 <= v.origin < len(self.src.values):
            self.wrong(f"value {i} has id {v.id} and origin {v.origin}")
            return
        o = self.src.values[v.origin]
        for name in ("kind", "shape", "dtype", "grad"):
            if getattr(v, name) != getattr(o, name):
                self.wrong(f"value %{i} {v.name!r}: {name} is {getattr(v, name)}, expected {getattr(o, name)}")
        if v.kind == "scalar":
            if set(without_grad(v.type)) - {I}:
                self.wrong(f"value %{i} {v.name!r}: a scalar is the same everywhere, but it has type {show(v.type)}")
            return
        for message in wrong_type(o.shape, v.type, self.mesh):
            self.wrong(f"value %{i} {v.name!r}: {message}")
        if v.dtype == "bool" and any(a.kind == "P" for a in v.type):
            self.wrong(f"value %{i} {v.name!r}: truth values cannot be partial sums")

    def origin(self, i: int) -> int:
        return self.low.values[i].origin if 0 <= i < len(self.low.values) else -1

    def names(self, ids: Any) -> list[str]:
        return [self.low.values[i].name if 0 <= i < len(self.low.values) else f"%{i}?" for i in ids]

    def define(self, i: int, by: str) -> None:
        if not 0 <= i < len(self.low.values):
            self.wrong(f"defines %{i}, which is no value of the block")
        elif i in self.defined:
            self.wrong(f"defines %{i} {self.low.values[i].name!r}, which {self.defined[i]} has defined")
        else:
            self.defined[i] = by

    def use(self, i: int, at: str) -> TypedValue | None:
        if i not in self.defined:
            self.wrong(f"{at} uses %{i} before it is computed")
            return None
        v = self.low.values[i]
        if v.origin in self.stale:
            self.wrong(f"{at} uses %{i} {v.name!r}, a stale copy: {self.stale[v.origin]} has overwritten it in place")
        return v

    def ref(self, want: Ref, got: Ref, at: str) -> TypedValue | None:
        """A use of a lowered value where the source uses the value `want`."""
        v = self.use(got.id, at)
        if v is not None and v.origin != want.id:
            self.wrong(f"{at} is %{v.id} {v.name!r}, expected the value {self.src.values[want.id].name!r}")
            return None
        return v

    def typed(self, v: TypedValue, want: Type, at: str, grad: bool = True) -> None:
        if v.kind == "tensor" and not same(v.type, want, v.grad and grad):
            self.wrong(f"{at} %{v.id} {v.name!r} has type {show(v.type)}, expected {show(want)}")

    # the body

    def body(self) -> None:
        place = {key(o): n for n, o in enumerate(self.src.ops)}
        next_, seen = 0, set()
        for item in self.low.body:
            self.here = ""
            if isinstance(item, Convert):
                self.shared.guarded(self.low.name, lambda item=item: self.convert(item))
                continue
            n = place.get(key(item))
            if n is None:
                self.wrong(f"{key(item)[1]} is not in the source block")
                continue
            o = self.src.ops[n]
            self.here = f"{o.id} ({o.src} `{o.src.text}`): " if not isinstance(o, Call) else f"call {o.id}: "
            if n in seen:
                self.wrong("runs twice")
            elif n < next_:
                self.wrong("runs later than in the source")
            elif n > next_:
                self.wrong(f"runs before {', '.join(x.id for x in self.src.ops[next_:n])}")
            seen.add(n)
            next_ = max(next_, n + 1)
            f = {Op: self.local, Call: self.invoke, Guard: self.guard}[type(o)]
            self.shared.guarded(f"{self.low.name}: {o.id}", lambda: f(o, item))  # noqa: B023
        self.here = ""
        for n, o in enumerate(self.src.ops):
            if n not in seen:
                self.wrong(f"{o.id} was dropped" + (f" ({o.src} `{o.src.text}`)" if not isinstance(o, Call) else ""))

    def convert(self, c: Convert) -> None:
        self.here = f"conversion %{c.value} -> %{c.out} {c.src} -> {c.dst} on {c.axis!r}: "
        v = self.use(c.value, "input")
        self.define(c.out, "a conversion")
        if v is None or not 0 <= c.out < len(self.low.values):
            return
        out = self.low.values[c.out]
        if out.origin != v.origin:
            self.wrong(f"makes {out.name!r} out of {v.name!r}")
        if v.kind != "tensor":
            self.wrong("scalars are not converted")
        if c.axis not in self.mesh.names:
            self.wrong(f"the {self.mesh} has no such axis")
            return
        try:
            t = apply_step(v.type, Step(self.mesh.names.index(c.axis), c.src, c.dst))
        except ValueError as e:
            self.wrong(f"is not possible on a value of type {show(v.type)}: {e}")
            return
        if not same(out.type, t, v.grad):
            self.wrong(f"gives type {show(t)}, but its result is written as {show(out.type)}")
        # NB: on an axis of one rank the result is the input itself: writing it is writing the input, which is stale afterwards
        shares = TABLE[c.src.kind, c.dst.kind][0] in SHARING and self.mesh.sizes[self.mesh.index(c.axis)] > 1
        if not c.copy and shares and self.aliases.is_written(c.out):
            self.wrong("its result may share memory with its input and is written in place, so it must copy")

    def guard(self, g: Guard, low: Guard) -> None:
        if replace(low, value=None) != replace(g, value=None):
            self.wrong("is not the source's guard")
        v = self.ref(g.value, low.value, "value")
        if v is not None:
            self.typed(v, (I,) * len(self.mesh.axes), "value", grad=False)

    def invoke(self, call: Call, inv: Invoke) -> None:
        callee = self.shared.program.blocks.get(inv.block)
        if callee is None or callee.source != call.block:
            self.wrong(f"calls {inv.block}, which is no lowering of {call.block}")
            return
        if callee.name not in self.shared.done:
            self.wrong(f"calls {inv.block}, which comes later in the program")
        reads = set(inv.args)
        for what, ids, want, inner in (("argument", inv.args, call.args, callee.inputs), ("result", inv.out, call.out, callee.outputs)):
            if not len(ids) == len(want) == len(inner):
                self.wrong(f"has {len(ids)} {what}s, expected {len(want)}")
                continue
            if what == "result":
                self.overwrite(inv.writes, call.writes, "", reads)
                for i in dict.fromkeys((*ids, *(new for _, new in inv.writes))):
                    self.define(i, f"call {call.id}")
            for n, (i, origin, j) in enumerate(zip(ids, want, inner, strict=True)):
                v = self.ref(Ref(origin), Ref(i), f"{what} {n}")
                if v is not None:
                    self.typed(v, callee.values[j].type, f"{what} {n}", grad=callee.values[j].grad)

    def overwrite(self, writes: Any, want: Any, fn: str, read: set[int]) -> None:
        """Record in-place writes: (old, new) pairs must be the source's, old versions become stale."""
        if [(self.origin(a), self.origin(b)) for a, b in writes] != [tuple(w) for w in want]:
            expected = [[self.src.values[i].name for i in w] for w in want]
            self.wrong(f"writes {[self.names(w) for w in writes]} in place, expected {expected}")
        for old, new in writes:
            if (v := self.use(old, "in-place write")) is None or not 0 <= new < len(self.low.values):
                continue
            now, held = self.low.values[new].type, [self.low.values[i] for i in read]
            if old not in read and any(x.origin == v.origin for x in held):
                self.wrong(f"writes %{old} {v.name!r} in place, but reads another variable of that value")
            kept = old not in read or self.aliases.is_kept(old)
            if not same(v.type, now, False) if kept else shards(v.type) != shards(now):
                self.wrong(f"writes %{old} {v.name!r} of type {show(v.type)} in place, but leaves {show(now)} there")
        for message in self.aliases.wrong_writes(writes, fn):
            self.wrong(message)
        for old, _ in writes:
            self.stale[self.origin(old)] = self.here.rstrip(": ")

    def local(self, op: Op, low: Local) -> None:
        for name in ("src", "ctx", "path", "training"):
            if getattr(low, name) != getattr(op, name):
                self.wrong(f"{name} is {getattr(low, name)}, expected {getattr(op, name)}")
        block, probe, origins = distinct(self.src, op)
        recipe = None if op.whole else self.shared.recipe(self.src, op)
        if len(low.choice) != len(self.mesh.axes):
            self.wrong(f"has choice {low.choice} for {self.mesh}")
            return
        if recipe is None and set(low.choice) - {"I"}:
            self.wrong(f"has choice {low.choice}, but " + ("it must stay whole" if op.whole else "no rule knows it") + ": expected 'I'")
            return
        ins, outs = self.types(block, probe, recipe, low.choice)
        splits = tuple(Split(a, k, c) for (a, k), c in zip(self.mesh.axes, low.choice, strict=True) if is_factor(c))
        form: Emitted = rules.localise(block, probe, recipe, splits)  # type: ignore[arg-type]  # no splits where no recipe
        positions = {v.id: n for n, v in enumerate(op_inputs(block, probe))}
        flows = op.ctx.grad and any(v.grad for v in op_outputs(self.src, op))
        read: list[TypedValue] = []

        def use(want: Ref, got: Ref, at: str) -> None:
            v = self.ref(Ref(origins.get(want.id, want.id)), got, at)
            if v is None or v.kind != "tensor":
                return
            read.append(v)
            if not only_sizes and op.fn != SET_BUFFER:
                self.typed(v, ins[positions[want.id]], at, grad=flows)

        only_sizes = recipe is None and reads_sizes(op)
        if op.fn == SET_BUFFER and isinstance(low.args[1], Ref):  # its type is the buffer's, see check._instances
            self.shared.buffers.append((self.low.name, low.args[0], self.low.values[low.args[1].id]))
        if low.fn != form.fn:
            self.wrong(f"runs {low.fn}, expected {form.fn}")
        self.tree(form.args, low.args, "argument", use)
        self.tree(form.kwargs, low.kwargs, "argument", use)
        times = size_factor(op, read[0], self.mesh) if only_sizes and read else 1
        for name, want, why in (
            ("divide", form.divide, "the divisor of a mean over a split factor"),
            ("times", times, "a size read from a sharded value"),
        ):
            if getattr(low, name) != want:
                self.wrong(f"{name} is {getattr(low, name)}, expected {want} ({why})")
        drawn = recipe is not None and recipe.random and not form.fn.startswith("ap.")  # those draw by themselves
        rng = {s.axis for s in splits} if drawn else set()
        if set(low.rng) != rng:
            self.wrong(f"draws different numbers along {low.rng}, expected {tuple(sorted(rng))}")
        self.overwrite(low.writes, op.writes, op.fn, {v.id for v in read})
        made = [r.id for r in refs(low.out)]
        made += [new for _, new in low.writes if new not in made]
        for i in made:
            self.define(i, op.id)
        self.tree(op.out, low.out, "result", lambda want, got, at: self.ref(want, got, at))
        tensors = [self.low.values[i] for i in made if 0 <= i < len(self.low.values) and self.low.values[i].kind == "tensor"]
        if len(tensors) != len(outs):
            self.wrong(f"makes {len(tensors)} tensors, expected {len(outs)}")
        for n, (v, want) in enumerate(zip(tensors, outs, strict=False)):
            self.typed(v, want, f"result {n}")

    def types(self, block: Block, op: Op, recipe: Recipe | None, choice: tuple[str, ...]) -> tuple[list[Type], list[Type]]:
        """The types the op needs and makes, after checking that the choices are legal."""
        inputs, outputs = op_inputs(block, op), op_outputs(block, op)
        if recipe is None:
            whole = (I,) * len(choice)
            return [whole] * len(inputs), [whole] * len(outputs)
        if (len(recipe.inputs), len(recipe.outputs)) != (len(inputs), len(outputs)):
            has = f"{len(recipe.inputs)} inputs and {len(recipe.outputs)} outputs"
            self.wrong(f"its rule has {has}, the op {len(inputs)} and {len(outputs)}")
        degree: dict[str, int] = defaultdict(lambda: 1)
        for c, k in zip(choice, self.mesh.sizes, strict=True):
            if is_factor(c):
                degree[c] *= k
                if not recipe.legal(c):
                    self.wrong(f"may not be split on {c!r}")
                elif not recipe.divides(c, degree[c]):
                    self.wrong(f"factor {c!r} of size {recipe.factors[recipe.parse(c)[0]].size} is not divided by {degree[c]}")
        per_axis = [recipe.types(c) for c in choice]
        both = []
        for side, values in ((0, inputs), (1, outputs)):
            both.append([with_nest(tuple(t[side][n] for t in per_axis)) for n in range(len(values))])
            for n, (t, v) in enumerate(zip(both[side], values, strict=True)):
                for message in wrong_type(v.shape, t, self.mesh):
                    self.wrong(f"{('input', 'output')[side]} {n} under choice {choice}: {message}")
        return both[0], both[1]

    def tree(self, want: Any, got: Any, at: str, use: Any) -> None:
        """Compare two trees; `use` sees each pair of Refs."""
        if isinstance(want, Ref) and isinstance(got, Ref):
            use(want, got, at)
        elif type(want) is not type(got):
            self.wrong(f"{at} is {got!r}, expected {want!r}")
        elif isinstance(want, (tuple, list)):
            if len(want) != len(got):
                self.wrong(f"{at} has {len(got)} items, expected {len(want)}")
            for n, (a, b) in enumerate(zip(want, got, strict=False)):
                self.tree(a, b, f"{at} {n}" if at == "argument" else f"{at}[{n}]", use)
        elif isinstance(want, dict):
            if list(want) != list(got):
                self.wrong(f"{at} has keys {list(got)}, expected {list(want)}")
            for k in want.keys() & got.keys():
                self.tree(want[k], got[k], f"{at} {k}" if at == "argument" else f"{at}[{k!r}]", use)
        elif isinstance(want, slice):
            self.tree((want.start, want.stop, want.step), (got.start, got.stop, got.step), at, use)
        elif isinstance(want, Struct):
            if (want.cls, want.names) != (got.cls, got.names):
                self.wrong(f"{at} is {got.cls}{got.names}, expected {want.cls}{want.names}")
            self.tree(want.items, got.items, at, use)
        elif isinstance(want, Scaled):
            if want.divisor != got.divisor:
                self.wrong(f"{at} is a size divided by {got.divisor}, expected {want.divisor}")
            self.tree(want.ref, got.ref, at, use)
        elif repr(want) != repr(got) if isinstance(want, (float, complex)) else want != got:  # repr: nan, -0.0
            self.wrong(f"{at} is {got!r}, expected {want!r}")


def key(item: Any) -> tuple[str, str]:
    """What identifies an op, call or guard of a block, lowered or not."""
    kind = {Op: "op", Local: "op", Call: "call", Invoke: "call", Guard: "guard"}[type(item)]
    return kind, item.op if isinstance(item, Local) else item.id


def show(t: Type) -> str:
    return repr(t[0]) if len(t) == 1 else repr(t)


def same(a: Type, b: Type, grad: bool) -> bool:
    return a == b if grad else without_grad(a) == without_grad(b)


def shards(t: Type) -> Type:
    return tuple(a if a.kind == "S" else I for a in t)


def is_factor(choice: str) -> bool:
    return choice not in ("I", "R", "P") and not choice.startswith("P:")


def wrong_type(shape: tuple[int, ...], t: Type, mesh: Any) -> list[str]:
    """What is wrong with a type of a value of this shape: length, dims, nesting, uneven shards."""
    if len(t) != len(mesh.axes):
        return [f"type {show(t)} has {len(t)} axes, the mesh {len(mesh.axes)}"]
    out = []
    if any(a.kind not in "RISP" for a in t) or not is_valid(t):
        out.append(f"type {show(t)} is not well formed")
    for dim in sorted({a.dim for a in t if a.kind == "S"}):
        if not 0 <= dim < len(shape):
            out.append(f"type {show(t)} shards dim {dim} of a value of shape {shape}")
            continue
        degree = prod(k * a.outer for a, k in zip(t, mesh.sizes, strict=True) if a.kind == "S" and a.dim == dim)
        if shape[dim] % degree:
            out.append(f"type {show(t)} does not divide dim {dim} of shape {shape} evenly")
    return out


def distinct(block: Block, op: Op) -> tuple[Block, Op, dict[int, int]]:
    """The op with every use of a tensor made a value of its own, so that Refs in its local form name input positions."""
    used = [v.id for v in op_inputs(block, op)]
    if len(set(used)) == len(used):
        return block, op, {}
    values, origins = list(block.values), {}
    first: set[int] = set()

    def fresh(r: Ref) -> Ref:
        if not values[r.id].is_tensor or r.id not in first:
            first.add(r.id)
            return r
        origins[len(values)] = r.id
        values.append(replace(values[r.id], id=len(values)))
        return Ref(len(values) - 1)

    args, kwargs = map_refs((op.args, op.kwargs), fresh)
    return replace(block, values=tuple(values)), replace(op, args=args, kwargs=kwargs), origins


SIZES = frozenset(["size", "numel", "nelement", "len"])


def reads_sizes(op: Op) -> bool:
    return rules.canonical(op.fn) in SIZES


def size_factor(op: Op, v: TypedValue, mesh: Any) -> int:
    """By how much the size read from a local tensor is too small."""
    args = (*op.args[1:], *op.kwargs.values())
    if rules.canonical(op.fn) == "size" and args:
        dims = {args[0] % len(v.shape)}
    else:
        dims = {0} if rules.canonical(op.fn) == "len" else set(range(len(v.shape)))
    return prod(k for a, k in zip(v.type, mesh.sizes, strict=True) if a.kind == "S" and a.dim in dims)
