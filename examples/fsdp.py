"""FSDP by types alone: the batch is split, and every parameter that can be is placed S(0), a slice per device.
Must not know the model: a parameter's conversion to R at its use is the all-gather, its backward the reduce-scatter.
"""

from dataclasses import replace

from autopar.config import ComputeConfig
from autopar.ir.graph import Graph, join
from autopar.pas.plan import Plan
from autopar.pas.policies import data


def fsdp(graph: Graph, config: ComputeConfig) -> Plan:
    """The `data` policy with sharded parameters: gathered at each use, never kept."""
    n = config.plan_ngpus
    params = {}
    for block in graph.blocks.values():
        for p in block.params:
            shape = block.values[p.value].shape
            if p.kind == "param" and shape and shape[0] % n == 0:
                params[join(block.address, p.name)] = {"dp": "S(0)"}
    return replace(data(graph, config), params=params if n > 1 else {}, policy="fsdp")
