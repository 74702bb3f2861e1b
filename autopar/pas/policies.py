"""The built-in policies dp, tp and data, random plans for tests, and policies for several axes put together from them.
Must not know how plans are resolved or lowered. A policy is a pure function (Graph, ComputeConfig) -> Plan.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from autopar.config import ComputeConfig
from autopar.errors import ConfigError, PlanError, suggest
from autopar.ir.graph import Block, Graph, Op, refs
from autopar.ir.mesh import Mesh
from autopar.pas.build import plan_of
from autopar.pas.follow import cheapest, follow_resolved, keep_split
from autopar.pas.plan import Plan
from autopar.pas.resolve import Resolved, fits, recipe_of, resolve, resolve_partial
from autopar.rules.recipe import Recipe

logger = logging.getLogger(__name__)
Policy = Callable[[Graph, ComputeConfig], Plan]
Start = dict[str, dict[str, str]]
RANDOM_SHARE = 0.25  # of the ops that are no matrix products, how many `tp` splits at random


def dp(graph: Graph, config: ComputeConfig) -> Plan:
    """Every device runs the whole module; the scale units share the batch. Needs plan_ngpus=1 and takes no settings."""
    check_settings(config, (), "dp")
    if config.plan_ngpus != 1:
        raise ConfigError(
            f"policy 'dp' does not split the module, so plan_ngpus must be 1, not {config.plan_ngpus}; "
            f"set plan_ngpus=1 and runtime_ngpus={config.runtime_ngpus}, or use 'data' to split the batch inside a unit"
        )
    return Plan(policy="dp", graph=graph.fingerprint)


def tp(graph: Graph, config: ComputeConfig) -> Plan:
    """Tensor parallelism: every matrix product is split on a legal factor drawn with pas_config['seed'] (default 1).

    So are a quarter of the other ops; the rest follow their inputs. Decided once per distinct block. Meant for tests.
    """
    check_settings(config, ("seed",), "tp")
    mesh = _mesh("tp", config)
    return (
        plan_of(graph, tp_axis(graph, _empty(graph, mesh, "tp"), "tp", config)) if mesh.axes else Plan(policy="tp", graph=graph.fingerprint)
    )


def data(graph: Graph, config: ComputeConfig) -> Plan:
    """Every op that carries the batch dim is split on it; the others are the same on all devices. Takes no settings."""
    check_settings(config, (), "data")
    mesh = _mesh("dp", config)
    return (
        plan_of(graph, data_axis(graph, _empty(graph, mesh, "data"), "dp", config))
        if mesh.axes
        else Plan(policy="data", graph=graph.fingerprint)
    )


policies: dict[str, Policy] = {"dp": dp, "tp": tp, "data": data}


def get_policy(policy: str | Policy) -> Policy:
    """A policy by name, or the user's own function. Raises ConfigError that names the nearest valid name."""
    if callable(policy):
        return partial(_own, policy)
    if not isinstance(policy, str) or policy not in policies:
        raise ConfigError(f"unknown policy {policy!r:.60}: {suggest(policy, policies)}; or pass a function (graph, config) -> Plan")
    return policies[policy]


def _own(policy: Policy, graph: Graph, config: ComputeConfig) -> Plan:
    name = getattr(policy, "__name__", None) or type(policy).__name__
    plan = policy(graph, config)
    if not isinstance(plan, Plan):
        raise PlanError(f"policy {name} returned {type(plan).__name__}, not a Plan")
    if plan.mesh.size != config.plan_ngpus:
        raise PlanError(f"policy {name} made a plan for {plan.mesh} of {plan.mesh.size} devices, but plan_ngpus is {config.plan_ngpus}")
    return replace(plan, graph=plan.graph or graph.fingerprint, policy=plan.policy or name)


def check_settings(config: ComputeConfig, known: tuple[str, ...], policy: str) -> None:
    """Raises ConfigError for a key of pas_config that the policy does not know; keys that begin with '_' are free."""
    for key in config.pas_config:
        if key not in known and not str(key).startswith("_"):
            valid = suggest(key, known) if known else "it takes none"
            raise ConfigError(f"policy {policy!r} has no setting {key!r}: {valid} (keys that begin with '_' are free)")


# ---- one axis at a time: what the policies above and meshes of several axes are made of ------------------------------------


def tp_axis(graph: Graph, chosen: Resolved, axis: str, config: ComputeConfig) -> Resolved:
    """Fill one axis as `tp` does, given what other axes already have."""
    seed = config.pas_config.get("seed", 1)
    if not isinstance(seed, int):
        raise ConfigError(f"pas_config['seed'] is {seed!r}; it must be a whole number")

    def draw(block: Block, op: Op, recipe: Recipe, legal: list[str], rng: random.Random) -> str:
        share = rng.random()
        return rng.choice(legal) if legal and (recipe.matmul or share < RANDOM_SHARE) else ""

    return follow_resolved(graph, _draw(graph, chosen, axis, f"tp:{seed}", draw), cheapest, axes=(axis,))


def data_axis(graph: Graph, chosen: Resolved, axis: str, config: ComputeConfig) -> Resolved:
    """Fill one axis as `data` does: dim 0 of the inputs is the batch and is kept as far as the factors carry it."""
    size = dict(chosen.plan.mesh.axes)[axis]
    shapes = [graph.body.values[i].shape for i in graph.body.inputs]
    if not any(s and s[0] % size == 0 for s in shapes):
        logger.warning("policy 'data': no input has a batch (dim 0) that %s=%d divides (%s); nothing is split", axis, size, shapes)
        return follow_resolved(graph, chosen, cheapest, axes=(axis,))
    return follow_resolved(graph, chosen, keep_split, axes=(axis,), start=batch_start(graph, (axis,)))


def batch_start(graph: Graph, axes: tuple[str, ...]) -> Start:
    """Every tensor argument as sharded on dim 0, for `start` of follow; those that an axis does not divide stay whole."""
    tensors = [a.name for a in graph.arguments if any(graph.body.values[r.id].shape for r in refs(a.tree))]
    return {name: dict.fromkeys(axes, "S(0)") for name in tensors}


def mesh_policy(axes: Mapping[str, tuple[int, str | Policy]]) -> Policy:
    """A policy for several axes: axis name -> (size, policy of that axis), decided in this order.

    mesh_policy({"dp": (2, "data"), "tp": (2, "tp")}) is a 2x2 mesh. A function is called with plan_ngpus set to the axis's size and
    must return a plan with at most one axis of that size; the built-in ones take care not to ask for more than a factor can give.
    """
    mesh = Mesh(tuple((name, size) for name, (size, _) in axes.items()))

    def policy(graph: Graph, config: ComputeConfig) -> Plan:
        if mesh.size != config.plan_ngpus:
            raise ConfigError(f"{mesh} has {mesh.size} devices, but plan_ngpus is {config.plan_ngpus}")
        chosen = _empty(graph, mesh, policy.__name__)
        for axis, (size, how) in axes.items():
            if isinstance(how, str) and how in AXIS_POLICIES:
                chosen = AXIS_POLICIES[how](graph, chosen, axis, config)
            else:
                inner = get_policy(how)(graph, replace(config, plan_ngpus=size, runtime_ngpus=size))
                chosen = _merge(graph, chosen, resolve(graph, inner), axis)
        return plan_of(graph, chosen)

    policy.__name__ = "+".join(how if isinstance(how, str) else getattr(how, "__name__", "policy") for _, how in axes.values())
    return policy


def _merge(graph: Graph, chosen: Resolved, inner: Resolved, axis: str) -> Resolved:
    """A plan of one axis put in as the named axis of another."""
    own, new = plan_of(graph, chosen, keep_i=True), plan_of(graph, inner, keep_i=True)
    ops, params = dict(own.ops), dict(own.params)
    for table, entries in ((ops, new.ops), (params, new.params)):
        for key, entry in entries.items():
            table[key] = table.get(key, {}) | {axis: c for c in entry.values()}  # noqa: B035  at most one
    # NB: exact addresses correct what patterns take in by mistake (plan_of), so they must stay last.
    ops = dict(sorted(ops.items(), key=lambda e: "*" not in e[0]))
    return resolve_partial(graph, replace(chosen.plan, ops=ops, params=params))


AXIS_POLICIES: dict[str, Callable[[Graph, Resolved, str, ComputeConfig], Resolved]] = {"tp": tp_axis, "data": data_axis}


def random_plan(graph: Graph, mesh: Mesh, seed: int) -> Plan:
    """A random legal plan: for every op of every distinct block and every axis one of I, R, P and the factors that fit."""

    def draw(block: Block, op: Op, recipe: Recipe, legal: list[str], rng: random.Random) -> str:
        linear = [f"P:{i}" if i else "P" for i in range(len(recipe.linear))]
        # NB: factors count double, or most plans would split little.
        return rng.choice([*legal, *legal, *linear, "R", "I"])

    chosen = _empty(graph, mesh, f"random {seed}")
    for axis in mesh.names:
        chosen = _draw(graph, chosen, axis, f"random:{seed}", draw)
    return plan_of(graph, chosen)


def _draw(graph: Graph, chosen: Resolved, axis: str, seed: str, draw: Callable[..., str]) -> Resolved:
    """Draw a choice for every op that has a rule and none yet. The draws depend on seed, axis, block and op only."""
    mesh, index = chosen.plan.mesh, chosen.plan.mesh.index(axis)
    variants: dict[str, Any] = {}
    for name, v in chosen.variants.items():
        block, choices = graph.blocks[v.block], dict(v.choices)
        for op in block.ops:
            recipe = recipe_of(block, op) if isinstance(op, Op) and not op.whole and not choices[op.id][index] else None
            if recipe is None:
                continue
            full = tuple(c or "I" for c in choices[op.id])
            place = lambda c, full=full: (*full[:index], c, *full[index + 1 :])  # noqa: E731
            legal = [c for c in recipe.choices(mesh.sizes[index]) if fits(block, op, recipe, place(c), mesh)]
            drawn = draw(block, op, recipe, legal, random.Random(f"{seed}:{axis}:{name}:{op.id}"))
            old = choices[op.id]
            choices[op.id] = (*old[:index], drawn, *old[index + 1 :])
        variants[name] = replace(v, choices=choices)
    return replace(chosen, variants=variants)


def _mesh(axis: str, config: ComputeConfig) -> Mesh:
    return Mesh(((axis, config.plan_ngpus),)) if config.plan_ngpus > 1 else Mesh()


def _empty(graph: Graph, mesh: Mesh, policy: str) -> Resolved:
    return resolve_partial(graph, Plan(mesh, policy=policy))
