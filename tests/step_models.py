"""Small modules that take one sample and return the loss first, compiled and loaded on a rank, for tests of train_step.
Must not know what is tested.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from autopar.codegen.load import load_module_class
from autopar.config import ComputeConfig
from autopar.driver import compile_module
from autopar.ir.mesh import Mesh
from autopar.pas.build import plan_from
from autopar.pas.follow import follow
from autopar.pas.plan import Plan

MESHES = {"one": (1, 1), "dp2": (1, 2), "tp2": (2, 1), "tp2 x 2": (2, 2), "2x2": (4, 1)}  # plan_ngpus, units


class Net(nn.Module):
    """Batch norm (a buffer that training writes), dropout, a tied weight and a dict as the sample."""

    def __init__(self, d: int = 8, p: float = 0.0):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(d, 2 * d), nn.BatchNorm1d(2 * d), nn.Linear(2 * d, d)
        self.head, self.p = nn.Linear(d, d), p
        self.head.weight = nn.Parameter(torch.randn(d, d) / d)
        self.tail = nn.Linear(d, d, bias=False)
        self.tail.weight = self.head.weight

    def forward(self, batch):
        h = F.gelu(self.norm(self.up(batch["x"])))
        h = F.dropout(h, self.p, self.training)
        h = self.tail(torch.tanh(self.head(self.down(h))))
        return {"loss": F.mse_loss(h, batch["y"]), "logits": h}


class Wide(nn.Module):
    """Elementwise layers around a product, and dropout on a value that no plan has to split; the loss alone is returned."""

    def __init__(self, d: int = 8, p: float = 0.3):
        super().__init__()
        self.up, self.down, self.p = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), p

    def forward(self, x, scale=1.0):
        y = self.down(F.relu(self.up(x)))
        return (F.dropout(y, self.p, self.training) * scale).square().mean()


def sample(i: int, d: int = 8, n: int = 4) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(100 + i)
    return {k: torch.randn(n, d, generator=g, dtype=torch.float64) for k in "xy"}


def original(cls: type[nn.Module] = Net, **options) -> nn.Module:
    torch.manual_seed(0)
    return cls(**options).double().train()


def policy(graph, config):
    """Megatron's MLP on the last axis; on two axes the batch is split along the first."""
    if config.plan_ngpus == 1:
        return Plan(mesh=Mesh(()), ops={}, graph=graph.fingerprint, policy="one")
    mesh = Mesh((("tp", 2),) if config.plan_ngpus == 2 else (("dp", 2), ("tp", 2)))
    split = {"up/linear": {"tp": "n"}, "down/linear": {"tp": "k"}}
    if graph.module.endswith("Wide"):
        split |= {"/dropout": dict.fromkeys(mesh.names, "I")}
    return follow(graph, plan_from(graph, mesh, split, policy="mlp"))


@cache
def compiled(mesh: str, cls: type[nn.Module] = Net, **options):
    """(module, Compiled, config) of a model under one of MESHES."""
    plan_ngpus, units = MESHES[mesh]
    module = original(cls, **options)
    config = ComputeConfig(plan_ngpus=plan_ngpus, runtime_ngpus=plan_ngpus * units, use_end2end=True)
    args = {"batch": sample(0)} if cls is Net else {"x": sample(0)["x"]}
    return module, compile_module(module, args, policy, config), config


def rank_module(made, mesh):
    """The compiled module on one rank, with the initial weights."""
    module, code, _ = made
    weights = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers()) | code.graph.constants
    return load_module_class(code.texts)(mesh).load(lambda n, s: weights[n].detach()[s], mesh.device).train()
