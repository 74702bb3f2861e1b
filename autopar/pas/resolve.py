"""resolve: a plan's addresses and patterns applied to a graph: one choice per op and axis, checked against the rules.
Must not know about conversions or types of values (lower does).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from autopar.errors import PlanError, suggest
from autopar.ir.graph import Block, Call, Graph, Op, join, op_inputs, op_outputs
from autopar.ir.mesh import Mesh
from autopar.ir.types import AxisType, is_valid, parse_axis_type, with_nest
from autopar.pas.address import Trie, address, addresses, nearest, parameter_trie, split_address
from autopar.pas.plan import Plan
from autopar.rules.recipe import Recipe


@dataclass(frozen=True)
class Variant:
    """A block under one set of choices. Instances of a block that a plan treats differently become several variants."""

    name: str  # the block's name, or '<name>_<n>' for further variants
    block: str
    choices: dict[str, tuple[str, ...]]  # op id -> choice per mesh axis, every Op of the block present
    callees: dict[str, str]  # Call id -> variant name
    instances: tuple[str, ...]


@dataclass(frozen=True)
class Resolved:
    """A plan made concrete for a graph."""

    plan: Plan
    root: str  # variant name
    variants: dict[str, Variant]  # callees before callers
    params: dict[str, dict[str, AxisType]]  # qualified parameter name -> axis name -> forced placement


Translate = Callable[[Block, Op, Recipe | None, str, int], str | None]
Forced = tuple[tuple[str, tuple[tuple[str, AxisType], ...]], ...]  # (name relative to an instance, placement per axis) of its tensors


def recipe_of(block: Block, op: Op) -> Recipe | None:
    """The rule of an op. NB: imported late, so that plans can be read and compared without loading the rules."""
    from autopar.rules import recipe_of as find

    return find(block, op)


def resolve(graph: Graph, plan: Plan) -> Resolved:
    """Apply a plan to a graph.

    Raises PlanError: made for another graph (lists what differs), an address that matches nothing, an unknown axis,
    a choice that is no factor of the op, a factor that may not be split or that the axis does not divide
    (names the op, its source line, the dim, its size and the degree).
    """
    return resolve_partial(graph, plan, unnamed="I")


def resolve_partial(graph: Graph, plan: Plan, *, unnamed: str = "", translate: Translate | None = None) -> Resolved:
    """As resolve, but an op and axis that no entry names has the choice `unnamed`, so that a policy can fill it in.

    translate(block, op, recipe, text, axis size) -> choice reads the text of an entry for one op; None leaves the op unnamed.
    """
    if plan.graph:
        _check_graph(graph, plan)
    for table in (plan.ops, plan.params):
        for pattern, entry in table.items():
            for axis in entry:
                if axis not in plan.mesh.names:
                    names = suggest(axis, plan.mesh.names) if plan.mesh.names else "the mesh has no axes"
                    raise PlanError(f"plan entry {pattern!r} names an unknown mesh axis {axis!r}; {names}")
    return _Resolver(graph, plan, unnamed, translate).run()


class _Resolver:
    """One walk over the tree of calls; a block reached again in the same pattern state is not walked again."""

    def __init__(self, graph: Graph, plan: Plan, unnamed: str, translate: Translate | None) -> None:
        self.graph, self.plan, self.unnamed, self.translate = graph, plan, unnamed, translate
        self.trie, self.entries = Trie(), list(plan.ops.items())
        for i, (pattern, _) in enumerate(self.entries):
            self.trie.add(*split_address(pattern), i)
        self.used: set[int] = set()
        self.recipes: dict[tuple[str, str], Recipe | None] = {}
        self.legal: set[tuple[str, str, tuple[str, ...]]] = set()
        self.memo: dict[tuple[str, frozenset[int], Forced], str] = {}  # (block, pattern state, placements) -> variant
        self.by_content: dict[Any, str] = {}
        self.count: dict[str, int] = defaultdict(int)
        self.variants: dict[str, tuple[str, dict[str, tuple[str, ...]], dict[str, str]]] = {}

    def run(self) -> Resolved:
        self.params = resolve_params(self.graph, self.plan)
        self.forced = forced_under(self.params)
        root = self.variant(self.graph.root, self.trie.start, "")
        for i, (pattern, _) in enumerate(self.entries):
            if i not in self.used:
                raise PlanError(f"plan entry {pattern!r} matches no op of this graph; {nearest(pattern, addresses(self.graph))}")
        instances = self.instances(root)
        variants = {n: Variant(n, b, ch, ca, tuple(instances[n])) for n, (b, ch, ca) in self.variants.items()}
        return Resolved(self.plan, root, variants, self.params)

    def variant(self, name: str, state: frozenset[int], path: str) -> str:
        forced = self.forced.get(path, ())
        if (name, state, forced) in self.memo:
            return self.memo[name, state, forced]
        block, choices, callees = self.graph.blocks[name], {}, {}
        states: dict[str, frozenset[int]] = {}
        for op in block.ops:
            if isinstance(op, Call):
                where = instance_of(op.id)
                callees[op.id] = self.variant(op.block, self.trie.walk(state, where), join(path, where))
            elif isinstance(op, Op):
                where, _, fn = op.id.rpartition("/")
                if where not in states:
                    states[where] = self.trie.walk(state, where)
                choices[op.id] = self.choice(block, op, self.trie.entries(states[where], fn), path)
        own = {p.name for p in block.params}
        content = (name, tuple(choices.items()), tuple(callees.items()), tuple(f for f in forced if f[0] in own))
        if content not in self.by_content:
            self.by_content[content] = new = self.fresh(name)
            self.variants[new] = (name, choices, callees)
        self.memo[name, state, forced] = self.by_content[content]
        return self.by_content[content]

    def fresh(self, block: str) -> str:
        self.count[block] += 1
        name = block if self.count[block] == 1 else f"{block}_{self.count[block]}"
        while name != block and name in self.graph.blocks:
            name += "_"
        return name

    def choice(self, block: Block, op: Op, entries: list[int], path: str) -> tuple[str, ...]:
        self.used.update(entries)
        named: dict[str, str] = {}
        for i in entries:
            named.update(self.entries[i][1])
        if (block.name, op.id) not in self.recipes and set(named.values()) - {"I"}:
            self.recipes[block.name, op.id] = recipe_of(block, op)
        recipe = self.recipes.get((block.name, op.id))
        if self.translate:
            sizes = dict(self.plan.mesh.axes)
            read = {a: self.translate(block, op, recipe, c, sizes[a]) for a, c in named.items()}
            named = {a: c for a, c in read.items() if c is not None}
        choice = tuple(named.get(a, self.unnamed) for a in self.plan.mesh.names)
        key = (block.name, op.id, choice)
        if key not in self.legal:
            check_choice(block, op, recipe, tuple(c or "I" for c in choice), self.plan.mesh, address(path, op.id))
            self.legal.add(key)
        return choice

    def instances(self, root: str) -> dict[str, list[str]]:
        """Absolute paths of every variant, callers before callees so that each list is complete when it is used."""
        found: dict[str, list[str]] = {n: [] for n in self.variants}
        found[root].append("")
        for name in reversed(self.variants):
            order = {path: i for i, path in enumerate(self.graph.blocks[self.variants[name][0]].instances)}
            found[name] = sorted(dict.fromkeys(found[name]), key=lambda p: order.get(p, len(order)))
            for call, callee in self.variants[name][2].items():
                found[callee] += [join(p, instance_of(call)) for p in found[name]]
        return found


def instance_of(call_id: str) -> str:
    """The path of a call's instance: a module that is called again has the ids 'path', 'path#1', ..."""
    return call_id.partition("#")[0]


def check_choice(block: Block, op: Op, recipe: Recipe | None, choice: tuple[str, ...], mesh: Mesh, name: str) -> None:
    """Whether an op may be split this way. Raises PlanError that names the op, its source line and what would be legal."""
    if set(choice) <= {"I"}:
        return
    at = f"{name} ({op.src}: {op.src.text})" if op.src.text else f"{name} ({op.src})"
    asked = ", ".join(f"{c!r} on axis {a!r}" for a, c in zip(mesh.names, choice, strict=True) if c != "I")
    if op.whole:
        raise PlanError(f"{at}: the plan asks for {asked}, but a mutation is seen through an alias here: the op must stay 'I'")
    if recipe is None:
        if set(choice) <= {"I", "R"}:
            return
        raise PlanError(f"{at}: the plan asks for {asked}, but no rule knows {op.fn}: it can only be 'I' or 'R' (register_op adds a rule)")
    split: dict[str, list[int]] = defaultdict(list)
    for i, (axis, k, c) in enumerate(zip(mesh.names, mesh.sizes, choice, strict=True)):
        if c in ("I", "R"):
            continue
        if c == "P" or c.startswith("P:"):
            _check_linear(at, axis, c, recipe)
            continue
        factor, _ = recipe.parse(c)
        if factor not in recipe.factors:
            raise PlanError(f"{at}: {c!r} on axis {axis!r} is not a factor of {op.fn}. {_offer(recipe, k)}")
        if not recipe.legal(c):
            raise PlanError(f"{at}: factor {c!r} may not be split: {_why(recipe, c)}. {_offer(recipe, k)}")
        split[factor].append(i)
    for factor, on in split.items():
        groups = max(recipe.parse(choice[i])[1] for i in on)
        if groups > 1 and len(on) > 1:
            raise PlanError(f"{at}: factor {factor!r} is split inside {groups} groups, which only one axis may do, but {asked}")
        degree, shown = prod(mesh.sizes[i] for i in on), _dim(block, op, recipe, factor)
        if not recipe.divides(choice[on[0]], degree):
            axes = " x ".join(f"{mesh.names[i]}={mesh.sizes[i]}" for i in on)
            total = f"{axes} = {degree}" if len(on) > 1 else axes
            size = f"size {recipe.factors[factor].size}" + f" / {groups} groups" * (groups > 1)
            raise PlanError(f"{at}: factor {factor!r} has {size} ({shown}), which {total} does not divide. {_offer(recipe, degree)}")
    per_axis = [recipe.types(c) for c in choice]
    for word, side in (("input", 0), ("output", 1)):
        for n, types in enumerate(zip(*(t[side] for t in per_axis), strict=True)):
            if not is_valid(with_nest(types)):
                raise PlanError(f"{at}: {asked} would shard one dim of {word} {n} along several axes and inside groups: {types}")


def fits(block: Block, op: Op, recipe: Recipe | None, choice: tuple[str, ...], mesh: Mesh) -> bool:
    """Whether check_choice has nothing to say."""
    try:
        check_choice(block, op, recipe, choice, mesh, op.id)
    except PlanError:
        return False
    return True


def _check_linear(at: str, axis: str, choice: str, recipe: Recipe) -> None:
    group = choice[2:] if ":" in choice else "0"
    if not recipe.linear:
        raise PlanError(f"{at}: {choice!r} on axis {axis!r}, but the op is not linear in any input: partial sums cannot pass through it")
    if not group.isdigit() or int(group) >= len(recipe.linear):
        groups = ", ".join(f"'P:{i}' (inputs {', '.join(map(str, g))})" for i, g in enumerate(recipe.linear))
        raise PlanError(f"{at}: {choice!r} on axis {axis!r} names no linear group of the op; it has {groups}")


def _offer(recipe: Recipe, degree: int) -> str:
    fit = recipe.choices(degree)
    sized = [f"{n} (size {f.size}{'' if n in fit else f', not divided by {degree}' if recipe.legal(n) else ', may not be split'})"
             for n, f in recipe.factors.items()]  # fmt: skip
    rest = ["'I'", "'R'"] + ["'P'"] * bool(recipe.linear)
    return f"Its factors: {', '.join(sized) or 'none'}; {', '.join(rest)} always fit"


def _why(recipe: Recipe, choice: str) -> str:
    name, groups = recipe.parse(choice)
    f = recipe.factors[name]
    if not f.split:
        return "the op needs it whole"
    if f.size < 2:
        return f"its size is {f.size}"
    if groups > 1 and f.size % groups:
        return f"its size {f.size} does not make {groups} equal groups"
    if groups > 1 and (f.positional or f.reduce == "inner"):
        return "the local form depends on which entries a rank holds, so it cannot be split inside groups"
    if any(recipe.carries(d, name) and recipe.dim_of(d, name) is None for d in recipe.inputs + recipe.outputs):
        return "it is an inner factor of a dim made of several"
    return "an output lacks it and the op does not sum over it"


def _dim(block: Block, op: Op, recipe: Recipe, factor: str) -> str:
    """Where a factor is seen: 'dim 2 of output 0, shape (4, 8, 10)'."""
    for word, dims, values in (("output", recipe.outputs, op_outputs(block, op)), ("input", recipe.inputs, op_inputs(block, op))):
        for i, (d, v) in enumerate(zip(dims, values, strict=False)):
            if (at := recipe.dim_of(d, factor)) is not None:
                return f"dim {at} of {word} {i}, shape {v.shape}"
    return "of no tensor"


def forced_under(params: dict[str, dict[str, AxisType]]) -> dict[str, Forced]:
    """Module path -> the placements a plan forces in it, so that instances that differ in them become different variants."""
    found: dict[str, list] = defaultdict(list)
    for name, entry in params.items():
        parts = name.split(".")
        for n in range(len(parts)):
            found[".".join(parts[:n])].append((".".join(parts[n:]), tuple(entry.items())))
    return {path: tuple(entries) for path, entries in found.items()}


def resolve_params(graph: Graph, plan: Plan) -> dict[str, dict[str, AxisType]]:
    """Parameter placements by original name. Raises PlanError like resolve."""
    trie, entries = parameter_trie(plan.params), list(plan.params.items())
    found: dict[str, dict[str, str]] = {}
    used: set[int] = set()
    for t in graph.tensors if entries else ():
        hits: set[int] = set()
        for name in (t.name, *t.aliases):
            path, _, last = name.rpartition(".")
            hits.update(trie.entries(trie.walk(trie.start, path), last))
        for i in sorted(hits):
            found.setdefault(t.name, {}).update(entries[i][1])
        used |= hits
    for i, (pattern, _) in enumerate(entries):
        if i not in used:
            valid = [n for t in graph.tensors for n in (t.name, *t.aliases)]
            raise PlanError(f"plan entry {pattern!r} of params matches no parameter or buffer; {nearest(pattern, valid)}")
    return {name: _placement(graph, plan.mesh, name, entry) for name, entry in found.items()}


def _placement(graph: Graph, mesh: Mesh, name: str, entry: dict[str, str]) -> dict[str, AxisType]:
    shape = graph.tensor(name).shape
    degree: dict[int, int] = defaultdict(lambda: 1)
    out: dict[str, AxisType] = {}
    for axis, k in mesh.axes:
        if axis not in entry:
            continue
        where = f"params[{name!r}] on axis {axis!r}"
        try:
            t = parse_axis_type(entry[axis])
        except ValueError as e:
            raise PlanError(f"{where}: {e}") from None
        if t.kind == "P":
            raise PlanError(f"{where}: a parameter cannot be placed 'P'; write R, I or S(dim)")
        if t.kind == "S":
            if t.dim >= len(shape):
                raise PlanError(f"{where}: {t} of a tensor of shape {shape}, which has no dim {t.dim}")
            degree[t.dim] *= k * t.outer
            if shape[t.dim] % degree[t.dim]:
                raise PlanError(f"{where}: dim {t.dim} has size {shape[t.dim]}, which {degree[t.dim]} does not divide")
            t = replace(t, nest=sum(o.kind == "S" and o.dim == t.dim for o in out.values()))
        out[axis] = t
        if not is_valid(tuple(out.values())):
            raise PlanError(f"{where}: dim {t.dim} is sharded inside groups, which only one axis may do")
    return out


def _check_graph(graph: Graph, plan: Plan) -> None:
    if plan.graph == graph.fingerprint:
        return
    trie = Trie()
    for i, pattern in enumerate(plan.ops):
        trie.add(*split_address(pattern), i)
    used: set[int] = set()
    for b in graph.blocks.values():
        for path in b.instances:
            state = trie.walk(trie.start, path)
            for op in b.ops:
                if isinstance(op, Op):
                    where, _, fn = op.id.rpartition("/")
                    used.update(trie.entries(trie.walk(state, where), fn))
    lost = [p for i, p in enumerate(plan.ops) if i not in used]
    names = parameter_trie(plan.params)
    known = {e for t in graph.tensors for n in (t.name, *t.aliases)
             for e in names.entries(names.walk(names.start, n.rpartition(".")[0]), n.rpartition(".")[2])}  # fmt: skip
    lost_params = [p for i, p in enumerate(plan.params) if i not in known]
    told = []
    if lost:
        told.append(f"these op addresses are not in this graph: {_some(lost)} (for the first, {nearest(lost[0], addresses(graph))})")
    if lost_params:
        told.append(f"these parameters are not in this graph: {_some(lost_params)}")
    if not told:
        told.append(
            "every address of the plan exists in it, so shapes, arguments or constants differ; its 'graph' set to '' applies it anyway"
        )
    raise PlanError(f"the plan was made for graph {plan.graph[:12]}, this one is {graph.fingerprint[:12]}: {'; '.join(told)}")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
