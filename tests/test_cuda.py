"""On a CUDA device: the trace strategies that use it, one-rank generated code against eager, two ranks on one device through gloo.
Everything here skips without one; nothing else in the package needs one.
"""

from __future__ import annotations

import copy
import json

import pytest
import small_models
import torch
import torch.utils._pytree as pytree
from torch import nn
from torchrun import torchrun

import autopar
from autopar import ComputeConfig
from autopar.driver import compile_module
from autopar.ir.graph import Op

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
STRATEGIES = ("cuda", "cuda_run_cpu_offload")


class Branches(nn.Module):
    """Which way it goes depends on a parameter: `meta` cannot tell."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        y = self.proj(x)
        return y * 2 if y.sum() > -1e9 else y - 1


def to(tree, device):
    return pytree.tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, tree)


def calls(graph):
    return [(b, op.id, op.fn) for b, block in graph.blocks.items() for op in block.ops if isinstance(op, Op)]


@pytest.mark.parametrize("name", small_models.NAMES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_trace_the_same_program(strategy, name):
    module, args = small_models.inputs(name)
    before = copy.deepcopy(module.state_dict())
    graphs = [compile_module(module, args, "dp", ComputeConfig(trace_strategy=s)).graph for s in ("cpu", strategy)]
    assert calls(graphs[0]) == calls(graphs[1])
    assert all(t.device.type == "cpu" and t.equal(before[n]) for n, t in module.state_dict().items()), "the module stays as it was"


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
def test_a_branch_on_a_value(strategy, tmp_path):
    module, x = Branches(), torch.randn(4, 8)
    made = autopar.parallelize(module, {"x": x}, "dp", {"trace_strategy": strategy}, gen_savedir=tmp_path)
    assert made.device.type == "cuda"
    torch.testing.assert_close(made(x.cuda()), module.cuda()(x.cuda()))


@pytest.mark.parametrize("on", ["cpu", "cuda"])
@pytest.mark.parametrize("name", small_models.NAMES)
def test_one_rank_against_eager(name, on, tmp_path):
    """Outputs, gradients and buffers of a training step, the module handed in on either device."""
    module, args = small_models.inputs(name)
    eager = copy.deepcopy(module).cuda()
    made = autopar.parallelize(module.to(on), to(args, on), "dp", gen_savedir=tmp_path)
    assert {t.device.type for t in (*made.parameters(), *made.buffers())} <= {"cuda"}
    results = []
    for model in (eager, made):
        torch.manual_seed(3)
        out = pytree.tree_leaves(model(**to(args, "cuda")))
        sum(t.sum() for t in out if t.requires_grad).backward()
        results.append(out)
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want)
    aliases = made.named_aliases()
    for n, p in eager.named_parameters():
        torch.testing.assert_close(made.get_parameter(aliases.get(n, n)).grad, p.grad)
    for n, b in eager.named_buffers():
        torch.testing.assert_close(made.get_buffer(n), b)


@pytest.mark.procs
def test_two_ranks_share_a_device_through_gloo(tmp_path):
    """As test_launch.py has it on CPUs."""
    done = torchrun("train", tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        got = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert got["device"].startswith("cuda") and (got["backend"] == "gloo" or torch.cuda.device_count() > 1)
        assert got["losses"][::2] == pytest.approx(got["losses"][1::2], rel=1e-4) and max(got["gradients"]) < 1e-4
