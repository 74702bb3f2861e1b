"""follow: complete a partial plan. Ops that no entry names follow how their inputs arrive, axis by axis.
Must not invent a split: a factor is chosen only where an input already arrives sharded on it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod

from autopar.ir.graph import Block, Call, Graph, Guard, Op, Value, op_inputs, op_outputs, refs
from autopar.ir.mesh import Mesh
from autopar.ir.types import AxisType, I, P, R, cost, parse_axis_type
from autopar.pas.build import plan_of
from autopar.pas.plan import Plan
from autopar.pas.resolve import Resolved, Variant, fits, recipe_of, resolve_partial
from autopar.rules.recipe import Recipe

ITEM = {"float64": 8, "int64": 8, "complex64": 8, "float16": 2, "bfloat16": 2, "int16": 2, "bool": 1, "uint8": 1, "int8": 1}


@dataclass(frozen=True)
class Arrival:
    """One tensor input of an op as it arrives on one axis. type None: a parameter, held as its uses ask.

    `held`: all types the value has by now, for other uses; `shared`: whether it has other uses at all.
    """

    value: Value
    type: AxisType | None
    held: frozenset[AxisType] = frozenset()
    shared: bool = False


@dataclass(frozen=True)
class Want:
    """A type that an op with a named choice requires of an output of the op in question."""

    position: int
    value: Value
    type: AxisType


@dataclass(frozen=True)
class Question:
    """An unnamed op on one axis: how its inputs arrive, what is wanted of its outputs, the choices that invent nothing."""

    recipe: Recipe
    arrivals: list[Arrival]
    outputs: tuple[Value, ...]
    wants: list[Want]
    choices: list[str]
    size: int  # of the axis


Held = dict[int, AxisType | None]
Copies = dict[int, set[AxisType]]
Decide = Callable[[Question], str]


def follow(graph: Graph, plan: Plan, *, start: Mapping[str, Mapping[str, str]] | None = None) -> Plan:
    """A total plan: what the plan names, and for every other op and axis the choice with the least conversion cost.

    Choices: I; R if all inputs with a gradient arrive R; P if a linear group arrives as P; a factor on which an input arrives
    sharded (ties prefer these). start: argument name -> {axis: 'S(d)'} takes graph inputs as sharded already.
    Raises PlanError as resolve does.
    """
    return plan_of(graph, follow_resolved(graph, resolve_partial(graph, plan), cheapest, start=start))


def follow_resolved(
    graph: Graph, partial: Resolved, decide: Decide, *, axes: tuple[str, ...] = (), start: Mapping[str, Mapping[str, str]] | None = None
) -> Resolved:
    """Fill the unnamed choices ('') of the given axes (default: all, in mesh order) by a rule of one's own."""
    for axis in axes or partial.plan.mesh.names:
        partial = _Walker(graph, partial, axis, decide, start or {}).run()
    return partial


def cheapest(q: Question) -> str:
    """The choice that costs least to convert to and, where the next op is named, from; a split before P, R and I in a tie."""
    mesh = Mesh((("x", q.size),))
    graded = {a.type for a in q.arrivals if a.value.grad}
    lone = not any(a.shared for a in q.arrivals if a.type == P)
    # NB: without an R among the inputs, R only moves the all-reduce of an I -> R about; I is then the plainer program. A P that
    # has other uses is summed for them anyway; one that has none is left for a later sum.
    rank = {"I": 3, "R": 2 if R in graded else 5, "P": 1 if lone else 4}

    def price(choice: str) -> tuple[float, int]:
        ins, outs = q.recipe.types(choice)
        needs = {(a.value, a.held, replace(t, nest=0)) for a, t in zip(q.arrivals, ins, strict=True) if a.type is not None}
        needs |= {(w.value, frozenset([replace(outs[w.position], nest=0)]), replace(w.type, nest=0)) for w in q.wants}
        if choice[:1] == "P" and not q.wants:  # somebody will need the sum; a split's sum is paid for by the work it saves
            needs |= {(v, frozenset([P]), I) for v, t in zip(q.outputs, outs, strict=True) if t == P}
        total = sum(min(cost((h,), (t,), mesh, nbytes(v), grad=v.grad) for h in held) for v, held, t in sorted(needs, key=_order))
        return float(f"{total:.6g}"), rank.get(choice[0] if choice[:2] == "P:" else choice, 0)

    return min(q.choices, key=price)


def _order(need: tuple[Value, frozenset[AxisType], AxisType]) -> tuple[int, AxisType]:
    return need[0].id, need[2]


def keep_split(q: Question) -> str:
    """Keep what arrives sharded sharded whatever it costs; what carries no shard is R if it can be, so that gradients stay partial."""
    splits = [c for c in q.choices if q.recipe.parse(c)[0] in q.recipe.factors]
    if splits:
        return cheapest(replace(q, choices=splits))
    graded = [a.type for a in q.arrivals if a.value.grad]
    sharded = any(a.type is not None and a.type.kind == "S" for a in q.arrivals)
    return "R" if graded and not sharded and set(graded) <= {R, None} else cheapest(q)


def nbytes(v: Value) -> float:
    return float(max(1, prod(v.shape)) * ITEM.get(v.dtype, 4))


def offered(recipe: Recipe, arrivals: list[Arrival], wants: list[Want]) -> list[str]:
    """Choices that invent no split, and no replication that the next op does not want."""
    out = []
    for i, a in enumerate(arrivals):
        if a.type is not None and a.type.kind == "S" and (c := recipe.choice_for(i, replace(a.type, nest=0))) is not None:
            out.append(c)
    for n, group in enumerate(recipe.linear):
        kinds = {arrivals[i].type for i in group}
        if P in kinds and kinds <= {P, None}:
            out.append(f"P:{n}" if n else "P")
    graded = [a.type for a in arrivals if a.value.grad]
    if (R in graded and set(graded) <= {R, None}) or any(w.type == R and w.value.grad for w in wants):
        out.append("R")
    return [*dict.fromkeys(out), "I"]


class _Walker:
    """One axis: the type of every value on it, block by block. A variant is walked once per way its inputs arrive."""

    def __init__(self, graph: Graph, partial: Resolved, axis: str, decide: Decide, start: Mapping[str, Mapping[str, str]]) -> None:
        self.graph, self.partial, self.decide = graph, partial, decide
        self.mesh = partial.plan.mesh
        self.axis, self.size = self.mesh.index(axis), dict(self.mesh.axes)[axis]
        self.start = self._start(axis, start)
        self.recipes: dict[tuple[str, str], Recipe | None] = {}
        self.counted: dict[str, Counter[int]] = {}
        self.wanted: dict[str, dict[int, list[AxisType]]] = {}
        self.done: dict[tuple[str, tuple], tuple[dict[str, str], tuple, list]] = {}

    def _start(self, axis: str, start: Mapping[str, Mapping[str, str]]) -> tuple[AxisType, ...]:
        named = {}
        for a in self.graph.arguments:
            if a.name in start and axis in start[a.name]:
                t = parse_axis_type(start[a.name][axis])
                named.update({r.id: t for r in refs(a.tree) if t.kind != "S" or self._divides(r.id, t)})
        return tuple(named.get(i, I) for i in self.graph.body.inputs)

    def _divides(self, value: int, t: AxisType) -> bool:
        shape = self.graph.body.values[value].shape
        return t.dim < len(shape) and shape[t.dim] % (self.size * t.outer) == 0

    def run(self) -> Resolved:
        weight: dict[tuple[str, tuple], int] = defaultdict(int)
        weight[self.partial.root, self.start] = 1
        variants = {}
        for name, v in reversed(self.partial.variants.items()):  # callers before callees
            # NB: layers of a stack share one decision: that of the way most of them are reached.
            arrivals = [(n, a) for (w, a), n in weight.items() if w == name]
            best = max(arrivals, key=lambda x: x[0])[1]
            choices, _, calls = self.walk(v, best)
            for callee, types in calls:
                weight[callee, types] += sum(n for n, _ in arrivals)
            variants[name] = replace(v, choices={i: self._with(v, i, c) for i, c in choices.items()})
        return replace(self.partial, variants=dict(reversed(variants.items())))

    def _with(self, v: Variant, op_id: str, choice: str) -> tuple[str, ...]:
        old = v.choices[op_id]
        return (*old[: self.axis], choice, *old[self.axis + 1 :])

    def walk(self, v: Variant, arrivals: tuple) -> tuple[dict[str, str], tuple, list]:
        """(choice per op, output types, calls made with the types they get) for a variant whose inputs arrive so."""
        if (v.name, arrivals) in self.done:
            return self.done[v.name, arrivals]
        block = self.graph.blocks[v.block]
        held: Held = dict(zip(block.inputs, arrivals, strict=True))
        held.update({p.value: None for p in block.params})
        copies: Copies = defaultdict(set)
        for value, t in held.items():
            copies[value].update([] if t is None else [t])
        choices: dict[str, str] = {}
        calls = []
        for op in block.ops:
            if isinstance(op, Guard):
                continue
            if isinstance(op, Call):
                callee = self.partial.variants[v.callees[op.id]]
                # NB: a block takes no P: the sum is made before the call, once for all uses.
                types = tuple(I if held.get(a, I) == P else held.get(a, I) for a in op.args)
                for a, t in zip(op.args, types, strict=True):
                    copies[a].update([] if t is None else [t])
                calls.append((callee.name, types))
                made = dict(zip(op.out, self.walk(callee, types)[1], strict=True)) | {new: I for _, new in op.writes}
                held.update(made)
                for value, t in made.items():
                    copies[value].update([] if t is None else [t])
                continue
            recipe = self.recipe(block, op)
            choice = choices[op.id] = v.choices[op.id][self.axis] or self.choose(block, v, op, recipe, held, copies)
            ins, outs = self.types(recipe, choice, op_inputs(block, op), op_outputs(block, op))
            for value, t in ins if outs else ():  # NB: a size is read from any type
                if held.get(value.id, I) is not None:
                    copies[value.id].add(t)
            for value, t in outs:
                held[value.id] = t
                copies[value.id].add(t)
        self.done[v.name, arrivals] = (choices, tuple(held.get(o, I) for o in block.outputs), calls)
        return self.done[v.name, arrivals]

    @staticmethod
    def types(recipe: Recipe | None, choice: str, ins: tuple[Value, ...], outs: tuple[Value, ...]) -> tuple[list, list]:
        """(value, type) of the inputs and of the outputs of an op under a choice."""
        if recipe is None or choice in ("I", "R"):
            kinds = [(R if choice == "R" else I,) * len(values) for values in (ins, outs)]
        else:
            kinds = recipe.types(choice)
        plain = lambda v, t: I if t == R and not v.grad else replace(t, nest=0)  # noqa: E731
        return tuple([(v, plain(v, t)) for v, t in zip(values, k, strict=True)] for values, k in zip((ins, outs), kinds, strict=True))

    def uses(self, block: Block) -> Counter[int]:
        """How often each value of a block is read."""
        if block.name not in self.counted:
            count: Counter[int] = Counter(block.outputs)
            for op in block.ops:
                count.update(op.args if isinstance(op, Call) else [v.id for v in op_inputs(block, op)] if isinstance(op, Op) else [])
            self.counted[block.name] = count
        return self.counted[block.name]

    def recipe(self, block: Block, op: Op) -> Recipe | None:
        key = (block.name, op.id)
        if key not in self.recipes:
            self.recipes[key] = recipe_of(block, op)
        return self.recipes[key]

    def choose(self, block: Block, v: Variant, op: Op, recipe: Recipe | None, held: Held, copies: Copies) -> str:
        if recipe is None or op.whole or not op_outputs(block, op):
            return "I"
        uses = self.uses(block)
        arrivals = [
            Arrival(value, held.get(value.id, I), frozenset(copies.get(value.id, ())), uses[value.id] > 1) for value in op_inputs(block, op)
        ]
        others = tuple(c or "I" for c in v.choices[op.id])

        def legal(c: str) -> bool:
            return c in ("I", "R") or fits(block, op, recipe, (*others[: self.axis], c, *others[self.axis + 1 :]), self.mesh)

        wants = [
            Want(i, value, t)
            for i, value in enumerate(op_outputs(block, op))
            for t in dict.fromkeys(self.wants(block, v).get(value.id, ()))
        ]
        choices = [c for c in offered(recipe, arrivals, wants) if legal(c)]
        return self.decide(Question(recipe, arrivals, op_outputs(block, op), wants, choices, self.size))

    def wants(self, block: Block, v: Variant) -> dict[int, list[AxisType]]:
        """What the named ops of a variant require of each value on this axis."""
        if v.name not in self.wanted:
            table = self.wanted[v.name] = defaultdict(list)
            for op in block.ops:
                choice = v.choices[op.id][self.axis] if isinstance(op, Op) else ""
                if choice and (recipe := self.recipe(block, op)) is not None:
                    for value, t in zip(op_inputs(block, op), recipe.types(choice)[0], strict=True):
                        table[value.id].append(replace(t, nest=0))
        return self.wanted[v.name]
