"""Training compiled: a model as ranks of a mesh train it, beside the same model and optimizer in one process. For tests of the runtime.
Must not know what is compared.
"""

from __future__ import annotations

import copy
from random import Random

import torch
import torch.nn.functional as F
from torch import nn

from autopar.codegen.load import load_module_class
from autopar.config import ComputeConfig
from autopar.driver import compile_module
from autopar.ir.mesh import Mesh
from autopar.runtime.module import ParallelModule
from autopar.trace import trace
from tests.random_plans import random_plan

B, T, D, V = 4, 4, 8, 16
STEPS = 5


class Tied(nn.Module):
    """A tied embedding, a frozen layer, a parameter that is never used, a norm; forward returns the loss."""

    def __init__(self):
        super().__init__()
        self.embed, self.pos = nn.Embedding(V, D), nn.Parameter(torch.randn(T, D) / 4)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.frozen, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.unused = nn.Parameter(torch.randn(D))
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids, labels):
        x = self.embed(ids) + self.pos
        x = x + self.down(torch.tanh(self.up(self.frozen(self.norm(x)))))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Part(nn.Module):
    def __init__(self, d=D):
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.Parameter(torch.ones(d))

    def forward(self, x):
        return x + self.scale * self.down(torch.tanh(self.up(x)))


class Around(nn.Module):
    """An ordinary module: `a` and `b` are to be parallel, what is around and between them is not."""

    def __init__(self):
        super().__init__()
        self.embed, self.a, self.mid, self.b, self.head = nn.Embedding(V, D), Part(), nn.Linear(D, D), Part(), nn.Linear(D, V)
        self.frozen = nn.Parameter(torch.ones(D), requires_grad=False)

    def forward(self, ids, labels):
        x = self.a(self.embed(ids)) * self.frozen
        x = self.b(self.b(torch.tanh(self.mid(x))))  # one of them twice
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


MODELS = {"tied": (Tied, None), "around": (Around, ("a", "b"))}


def original(name, dtype=torch.float64):
    torch.manual_seed(0)
    return MODELS[name][0]().to(dtype)


def batches(unit, dtype=torch.float64, steps=STEPS):
    """What a scale unit trains on."""
    g = torch.Generator().manual_seed(100 + unit)
    return [(torch.randint(0, V, (B, T), generator=g), torch.randint(0, V, (B, T), generator=g)) for _ in range(steps)]


class Layout:
    """A model compiled once, to be loaded by ranks. policy: a name, or 'random' for a random plan."""

    def __init__(self, name, policy, mesh, units=1, dtype=torch.float64, seed=0):
        self.name, self.dtype, self.units, self.mesh = name, dtype, units, Mesh(mesh)
        self.config = ComputeConfig(plan_ngpus=self.mesh.size, runtime_ngpus=self.mesh.size * units)
        model, (_, parts) = original(name, dtype), MODELS[name]
        ids, labels = batches(0)[0]
        args = {"ids": ids, "labels": labels} if parts is None else {"x": torch.randn(B, T, D, dtype=dtype)}
        self.parts = {}
        for part in parts or [""]:
            m = model.get_submodule(part)
            if policy == "random":
                graph = trace(m, args)
                compiled = compile_module(m, args, random_plan(graph, self.mesh, Random(seed)), self.config, graph=graph)
            else:
                compiled = compile_module(m, args, policy, self.config)
            self.parts[part] = compiled
            self.mesh = compiled.program.mesh  # the policy's

    def load(self, mesh):
        """This rank's model, with the weights of original()."""
        model = original(self.name, self.dtype)
        for part, compiled in self.parts.items():
            m = model.get_submodule(part)
            weights = dict(m.named_parameters(remove_duplicate=False)) | dict(m.named_buffers(remove_duplicate=False))
            weights |= compiled.graph.constants
            local = load_module_class(compiled.texts)(mesh)
            local.load(lambda name, slices, weights=weights: weights[name].detach()[slices], mesh.device)
            if not part:
                return local
            parent, _, last = part.rpartition(".")
            setattr(model.get_submodule(parent), last, local)
        return model


def zero_config(layout, **settings):
    return ComputeConfig(**{**layout.config.to_dict(), **settings})


def whole_to_local(model, mesh, weights):
    """What this rank should hold where the original model has these weights, by name."""
    places = {}
    for path, m in model.named_modules():
        if isinstance(m, ParallelModule):
            places |= {(path + "." if path else "") + n: p for n, p in m.named_placements().items()}
    return {
        n: places[n].shard(mesh, lambda s, n=n: weights[n][s]) if n in places else weights[n]
        for n, _ in model.named_parameters()
        if n in weights
    }


def close(got, want, tol):
    """The largest difference, relative to the largest entry wanted (at least 1)."""
    assert got.shape == want.shape and got.dtype == want.dtype, (got.shape, want.shape, got.dtype, want.dtype)
    if want.numel():
        error = float((got.double() - want.double()).abs().max()) / max(1.0, float(want.double().abs().max()))
        assert error <= tol, f"error {error:.2e}"


def train_plain(model, optimizer, units=1, *, step=None, schedule=None, clip=None, steps=STEPS):
    """(losses of unit 0, norms, parameters by name) of the plain model: losses of all units are summed, as gradients are."""
    losses, norms = [], []
    data = [batches(u, steps=steps) for u in range(units)]
    for i in range(steps):
        optimizer.zero_grad()
        each = [model(*data[u][i]) for u in range(units)]
        sum(each).backward()
        if clip is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(each[0].detach())
    return losses, norms, {n: p.detach().clone() for n, p in model.named_parameters()}


def train_rank(model, mesh, optimizer, *, schedule=None, clip=None, steps=STEPS):
    losses, norms = [], []
    for ids, labels in batches(mesh.unit, steps=steps):
        optimizer.zero_grad()
        loss = model(ids, labels)
        loss.backward()
        if clip is not None:
            norms.append(optimizer.clip_gnorm(clip))
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.detach())
    return losses, norms, {n: p.detach().clone() for n, p in model.named_parameters()}


def copy_of(model):
    return copy.deepcopy(model)
