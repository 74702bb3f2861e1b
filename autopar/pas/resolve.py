"""resolve: a plan's addresses and patterns applied to a graph: one choice per op and axis, checked against the rules.
Must not know about conversions or types of values (lower does).
"""

from __future__ import annotations

from dataclasses import dataclass

from autopar.ir.graph import Graph
from autopar.ir.types import AxisType
from autopar.pas.plan import Plan


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


def resolve(graph: Graph, plan: Plan) -> Resolved:
    """Apply a plan to a graph.

    Raises PlanError: made for another graph (lists what differs), an address that matches nothing, an unknown axis,
    a choice that is no factor of the op, a factor that may not be split or that the axis does not divide
    (names the op, its source line, the dim, its size and the degree).
    """
    raise NotImplementedError
