"""Helpers to write policies: find ops by pattern, choices by tensor dim, and per-block choices turned into a plan.
Must not decide anything by itself: following types is follow.py, the built-in policies are policies.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from autopar.errors import PlanError
from autopar.ir.graph import Block, Graph, Op, generalise, op_inputs, op_outputs
from autopar.ir.mesh import Mesh
from autopar.ir.types import AxisType, parse_axis_type
from autopar.pas.address import Trie, address, addresses, matches, nearest, split_address
from autopar.pas.plan import Plan
from autopar.pas.resolve import Resolved, Variant, recipe_of, resolve, resolve_partial
from autopar.rules.recipe import Dims, Recipe


@dataclass(frozen=True)
class FoundOp:
    """An op of a distinct block, with what policies ask of it."""

    address: str  # the pattern all its instances share
    block: Block
    op: Op
    recipe: Recipe | None
    count: int  # instances

    @property
    def module(self) -> str:
        """Path of the module that made the call, by the same pattern."""
        return self.address.rpartition("/")[0]

    @property
    def matmul_flops(self) -> float:
        """Forward matrix-multiply flops of all instances together."""
        return self.recipe.flops * self.count if self.recipe is not None and self.recipe.matmul else 0.0


def find_ops(graph: Graph, pattern: str = "**", *, fn: str = "", matmul: bool = False, missing_ok: bool = False) -> list[FoundOp]:
    """Ops of distinct blocks by address pattern, by the last part of the function's name, and by being a matrix product.

    Raises PlanError if the pattern matches nothing, unless missing_ok.
    """
    found, known = [], False
    trie = Trie()
    trie.add(*split_address(pattern), 0)
    for b in graph.blocks.values():
        states = {trie.walk(trie.start, path) for path in (b.address, *b.instances)}
        for op in b.ops:
            where, _, name = op.id.rpartition("/")
            if isinstance(op, Op) and any(trie.entries(trie.walk(state, where), name) for state in states):
                known = True
                if fn and op.fn.replace(":", ".").rpartition(".")[2] != fn:
                    continue
                recipe = recipe_of(b, op)
                if not matmul or (recipe is not None and recipe.matmul):
                    found.append(FoundOp(address(b.address, op.id), b, op, recipe, max(1, len(b.instances))))
    if not known and not missing_ok:
        raise PlanError(f"pattern {pattern!r} matches no op of this graph; {nearest(pattern, addresses(graph))}")
    return found


def choice_at(recipe: Recipe, dims: Dims | None, t: AxisType) -> str | None:
    """The legal choice that shards a tensor with these dims as t: the factor outermost in the dim ('n', or 'n/3' for S(1/3))."""
    if t.kind != "S" or dims is None or t.dim >= len(dims):
        return None
    for name in dims[t.dim]:
        place = recipe.place(dims, name)
        if place is not None and t.outer % place[1] == 0:
            choice = name if t.outer == place[1] else f"{name}/{t.outer // place[1]}"
            if recipe.legal(choice):
                return choice
    return None


def read_choice(block: Block, op: Op, recipe: Recipe | None, text: str, size: int) -> str | None:
    """The choice of an op that a policy's text stands for.

    A text is a choice itself ('n', 'I', 'R', 'P'), 'S(d)' for the factor at dim d of the first output, or 'in:S(d)' at dim d of
    the first tensor input that is no parameter; d may be negative, and 'S(-1/3)' shards inside 3 groups. With a final '?' an op
    without such a factor, or with one that an axis of this size does not divide, is left unnamed instead of being an error.
    """
    bare, optional = text.removesuffix("?"), text.endswith("?")
    spec = bare.removeprefix("in:")
    if spec[:2] != "S(":
        return None if optional and not _fits_alone(op, recipe, bare, size) else bare
    choice, values = None, op_outputs(block, op)
    dims, where = recipe.outputs[:1] if recipe is not None else (), "first output"
    if bare != spec:
        # NB: addmm(bias, x, weight): the data is the first input that is no parameter.
        params, values = {p.value for p in block.params}, op_inputs(block, op)
        first = next((i for i, v in enumerate(values) if v.id not in params), 0)
        values, dims, where = values[first:], recipe.inputs[first : first + 1] if recipe is not None else (), "first data input"
    if values and dims and not op.whole:
        choice = choice_at(recipe, dims[0], _type(spec, len(values[0].shape), text))
    if choice is None and not optional:
        shape = f" of shape {values[0].shape}" if values else ""
        why = f"no rule knows {op.fn}" if recipe is None else f"its factors are {', '.join(recipe.factors) or 'none'}"
        raise PlanError(f"{op.id} ({op.src}): {text!r} asks for a split of its {where}{shape}, which has none there: {why}")
    return None if optional and not _fits_alone(op, recipe, choice, size) else choice


def _fits_alone(op: Op, recipe: Recipe | None, choice: str | None, size: int) -> bool:
    """Whether one axis may have this choice, apart from what other axes do."""
    if choice in ("I", "R"):
        return choice == "I" or not op.whole
    if choice is None or recipe is None or op.whole:
        return False
    if choice == "P" or choice.startswith("P:"):
        return bool(recipe.linear)
    return recipe.legal(choice) and recipe.divides(choice, size)


def _type(spec: str, ndim: int, text: str) -> AxisType:
    negative = spec.startswith("S(-")
    try:
        t = parse_axis_type(spec.replace("S(-", "S(", 1))
    except ValueError as e:
        raise PlanError(f"{text!r} is not a choice: {e}") from None
    return replace(t, dim=ndim - t.dim) if negative and t.dim <= ndim else t


def plan_from(
    graph: Graph,
    mesh: Mesh,
    ops: Mapping[str, Mapping[str, str]],
    *,
    params: Mapping[str, Mapping[str, str]] | None = None,
    policy: str = "",
) -> Plan:
    """A plan from patterns and texts as read_choice takes them; ops and axes no pattern names are left open.

    Example: plan_from(graph, mesh, {"**.up_proj/linear": {"tp": "S(-1)"}, "**.down_proj/linear": {"tp": "in:S(-1)"}}).
    Raises PlanError as resolve does.
    """
    written = Plan(mesh, {k: dict(v) for k, v in ops.items()}, {k: dict(v) for k, v in (params or {}).items()}, policy=policy)
    return plan_of(graph, resolve_partial(graph, written, translate=read_choice), keep_i=True)


def plan_of(graph: Graph, chosen: Resolved, *, keep_i: bool = False) -> Plan:
    """The plan that resolves to these choices, one entry per op of a variant, in graph order.

    An unnamed axis ('') is left out; so is an op with nothing but I, unless keep_i or another entry's pattern takes it in.
    """
    mesh, entries = chosen.plan.mesh, {}
    taken = {path: name for name, v in chosen.variants.items() for path in v.instances}
    for name, v in reversed(chosen.variants.items()):
        for pattern in _patterns(name, v, taken):
            for op_id, choice in v.choices.items():
                entry = {a: c for a, c in zip(mesh.names, choice, strict=True) if c}
                if entry and (keep_i or set(entry.values()) != {"I"}):
                    entries[address(pattern, op_id)] = entry
    plan = replace(chosen.plan, ops=entries, graph=fingerprint(graph))
    return replace(plan, ops={**entries, **_corrections(graph, plan, chosen)})


def _patterns(name: str, v: Variant, taken: dict[str, str]) -> Iterable[str]:
    """One pattern for all instances of a variant if it takes in no other's, else every path."""
    if len(v.instances) == 1:
        return v.instances
    pattern = generalise(v.instances)
    inside = [path for path in taken if matches(f"{pattern}/x", f"{path}/x")]
    return (pattern,) if sorted(inside) == sorted(v.instances) else v.instances


def _corrections(graph: Graph, plan: Plan, chosen: Resolved) -> dict[str, dict[str, str]]:
    """Exact entries for ops that the plan's patterns get wrong, because another block's path fits them too."""
    got = {path: v.choices for v in resolve_partial(graph, plan).variants.values() for path in v.instances}
    fixed: dict[str, dict[str, str]] = defaultdict(dict)
    for v in chosen.variants.values():
        known: dict[int, list[tuple[str, str, str]]] = {}  # instances of one variant of the plan's need the same entries
        for path in v.instances:
            found = got[path]
            if id(found) not in known:
                known[id(found)] = [
                    (op_id, axis, w or "I")
                    for op_id, want in v.choices.items()
                    for axis, w, g in zip(plan.mesh.names, want, found[op_id], strict=True)
                    if (w or "I") != (g or "I")
                ]
            for op_id, axis, w in known[id(found)]:
                fixed[address(path, op_id)][axis] = w
    return dict(fixed)


def fingerprint(graph: Graph) -> str:
    return graph.fingerprint


def split_share(graph: Graph, plan: Plan) -> float:
    """The share of the forward matrix-multiply flops that a plan really splits; 1.0 if there are none."""
    return flops_split(graph, resolve(graph, plan))


def flops_split(graph: Graph, resolved: Resolved) -> float:
    """As split_share, of a resolved plan. An op split on some axis of size above 1 counts whole."""
    total = split = 0.0
    for v in resolved.variants.values():
        block = graph.blocks[v.block]
        for op in block.ops:
            recipe = recipe_of(block, op) if isinstance(op, Op) else None
            if recipe is None or not recipe.matmul:
                continue
            flops = recipe.flops * len(v.instances)
            total += flops
            if any(k > 1 and recipe.parse(c)[0] in recipe.factors for k, c in zip(resolved.plan.mesh.sizes, v.choices[op.id], strict=True)):
                split += flops
    return split / total if total else 1.0
