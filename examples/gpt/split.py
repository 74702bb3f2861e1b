"""How the GPT is split over the devices of a unit, by the names of its layers.
Must not import the model: a policy sees its graph.
"""

from __future__ import annotations

import autopar


def split(graph: autopar.Graph, config: autopar.ComputeConfig) -> autopar.Plan:
    """Megatron's split by names: columns of q, k, v and up; rows of out and down. Everything else follows."""
    columns = {f"blocks.*.{name}/linear": {"tp": "n"} for name in ("attention.q", "attention.k", "attention.v", "up")}
    rows = {f"blocks.*.{name}/linear": {"tp": "k"} for name in ("attention.out", "down")}
    mesh = autopar.Mesh((("tp", config.plan_ngpus),))
    return autopar.follow(graph, autopar.plan_from(graph, mesh, columns | rows))
