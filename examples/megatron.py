"""Megatron-style tensor parallelism for Llama-like models and GPT-2, with sequence parallelism as an option.
Must not know shapes: which factor a split means is asked of the rules, all unnamed ops follow their inputs.

    parallelize(module, inputs, megatron, ComputeConfig(plan_ngpus=8))
"""

from autopar.config import ComputeConfig
from autopar.ir.graph import Graph
from autopar.ir.mesh import Mesh
from autopar.pas.build import find_ops, plan_from
from autopar.pas.follow import follow
from autopar.pas.plan import Plan

COLUMN = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "c_fc", "lm_head"}  # split the output features
FUSED = {"c_attn": 3, "qkv_proj": 3, "gate_up_proj": 2}  # the same, inside each of the fused projections
ROW = {"o_proj", "down_proj", "c_proj"}  # split the input features: partial sums
RESIDUAL = ("**.*norm*/*", "**.ln_*/*", "**.layers.*/add*", "**.h.*/add*")  # what sequence parallelism splits on dim 1


def megatron(graph: Graph, config: ComputeConfig, *, sequence: bool = False) -> Plan:
    """Two all-reduces per layer and direction; with `sequence`, an all-gather and a reduce-scatter in place of each."""
    ops = {p: {"tp": "S(1)?"} for p in RESIDUAL} if sequence else {}
    ops = {p: c for p, c in ops.items() if find_ops(graph, p, missing_ok=True)}
    for found in find_ops(graph, matmul=True):
        name = found.module.rpartition(".")[2]
        if name in COLUMN:
            ops[found.address] = {"tp": "S(-1)"}
        elif name in FUSED:
            ops[found.address] = {"tp": f"S(-1/{FUSED[name]})"}
        elif name in ROW:
            ops[found.address] = {"tp": "in:S(-1)"}
    for found in find_ops(graph, fn="embedding", missing_ok=True):
        ops[found.address] = {"tp": "v?"}  # the vocabulary, as lm_head
    mesh = Mesh((("tp", config.plan_ngpus),))
    return follow(graph, plan_from(graph, mesh, ops, policy="megatron"))
