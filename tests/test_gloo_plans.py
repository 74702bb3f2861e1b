"""Plans under real gloo processes: outputs, gradients and buffers equal those of the in-process ranks, which equal the original.
Must not know lowering. The processes are forked (tests/procs.py).
"""

from __future__ import annotations

import random
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import sweep_models
import torch
from procs import run_processes
from random_plans import KINDS

from autopar.config import ComputeConfig
from autopar.driver import compile_module
from autopar.ir.mesh import Mesh
from autopar.pas.policies import data, mesh_policy, tp
from autopar.runtime import rank_mesh, run_ranks
from autopar.trace import trace
from autopar.verification import rank_step, verify_compiled

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]
from fsdp import fsdp  # noqa: E402
from megatron import megatron  # noqa: E402

pytestmark = pytest.mark.procs
sequence = partial(megatron, sequence=True)


def drawn(kind, seed, *sizes):
    """A random plan of a kind on a mesh of these sizes."""
    return lambda graph, config: KINDS[kind](graph, Mesh(tuple(zip("abc", sizes, strict=False))), seed)


# name of the case -> model, devices of a unit, units, policy
PLANS = {
    "megatron": ("llama", 2, 1, megatron),
    "megatron on 4": ("gpt2", 4, 1, megatron),
    "sequence parallelism": ("llama", 4, 1, sequence),
    "sequence parallelism, gpt2": ("gpt2", 2, 1, sequence),
    "2 units of megatron": ("llama", 2, 2, megatron),
    "data x megatron": ("llama", 4, 1, mesh_policy({"dp": (2, data), "tp": (2, megatron)})),
    "fsdp": ("gpt2", 2, 1, fsdp),
    "fsdp on 3": ("decoder", 3, 1, fsdp),
    "data": ("bert", 2, 1, data),
    "2 units of data": ("conv", 2, 2, data),
    "tp": ("lm_recompute", 2, 1, tp),
    "2 units of tp": ("lm", 2, 2, tp),
    "data x tp": ("windows", 4, 1, mesh_policy({"dp": (2, data), "tp": (2, tp)})),
    "random on 4": ("losses", 4, 1, drawn("free", 5, 4)),
    "random on 2 x 2": ("in_place", 4, 1, drawn("instances", 23, 2, 2)),
    "random on 2 x 3": ("vision", 6, 1, drawn("placed", 4, 2, 3)),
    "random on 2 x 2 x 2": ("tied", 8, 1, drawn("free", 2, 2, 2, 2)),
}


@cache
def traced(name):
    module, args = sweep_models.build(name)
    return module, args, trace(module, args)


def in_process(axes, units, fn):
    """fn(mesh) on ranks that are forked processes, in rank order."""
    size = units
    for _, k in axes:
        size *= k

    def rank(_):
        torch.manual_seed(0)
        random.seed(0)
        outs, grads, buffers, log = fn(rank_mesh(axes, device="cpu"))
        return outs, grads, {n: b.detach() for n, b in buffers.items()}, [(r.name, r.axis, r.shape, r.backward) for r in log]

    return run_processes(rank, size, timeout=60)


@pytest.mark.parametrize("case", PLANS)
def test_processes_compute_what_in_process_ranks_do(case):
    name, size, units, policy = PLANS[case]
    module, args, graph = traced(name)
    config = ComputeConfig(size, size * units)
    compiled = compile_module(module, args, policy, config, graph=graph)
    mesh = compiled.program.mesh
    verify_compiled(module, args, compiled, config, modes=("train",)).check()
    step = partial(rank_step, module, args, compiled)
    here = run_ranks(mesh, lambda axes, rank: step(axes, "train", 0), units=units)
    there = in_process(mesh.axes, units, lambda axes: step(axes, "train", 0))
    for rank, (mine, theirs) in enumerate(zip(here, there, strict=True)):
        for a, b in zip(mine[:3], theirs[:3], strict=True):
            compare(dict(a), dict(b), f"rank {rank}")
        assert [(r.name, r.axis, r.shape, r.backward) for r in mine[3]] == theirs[3], f"rank {rank}: other collectives"
    assert there[0][3], "nothing was communicated"


def compare(mine, theirs, where):
    """NB: not bitwise; gloo adds in an order of its own."""
    assert mine.keys() == theirs.keys()
    for n, a in mine.items():
        b = theirs[n]
        assert (a is None) == (b is None), f"{where}: {n}"
        if a is not None:
            torch.testing.assert_close(b, a.detach(), rtol=1e-11, atol=1e-11, equal_nan=True, msg=lambda m, n=n: f"{where}: {n}: {m}")
