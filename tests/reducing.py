"""Models on ranks, trained through a GradReducer and compared with the same training in one process.
Must not use build_optimizer: torch optimizers over the pieces.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import nn

from autopar import ComputeConfig
from autopar import runtime as ap
from autopar.codegen.load import load_module_class
from autopar.driver import compile_module
from autopar.runtime.buckets import collect_items
from autopar.runtime.reducer import GradReducer
from tests.small_models import LM

VOCAB, LENGTH = 16, 8
SGD = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)  # noqa: E731
ADAMW = lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, eps=1e-4)  # noqa: E731


class Around(nn.Module):
    """A parallel module inside an ordinary one, that is called twice."""

    def __init__(self, inner):
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(8, 8), inner, nn.Linear(8, 8)
        self.never = nn.Linear(8, 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x):
        return self.after(self.inner(self.frozen(self.inner(self.before(x))))).pow(2).mean()


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@cache
def compiled(kind: str, policy: str, n: int):
    """(the whole model with its training mode off, what was compiled, the class of the ranks)."""
    torch.manual_seed(0)
    if kind == "around":
        whole = Around(Stack()).double()
        part, args = whole.inner, {"x": torch.randn(4, 8, dtype=torch.float64)}
    else:
        whole = part = LM(n=3, recompute=kind == "recompute").double().eval()
        ids = torch.randint(0, VOCAB, (4, LENGTH))
        args = {"ids": ids, "labels": ids}
    done = compile_module(part, args, policy, ComputeConfig(plan_ngpus=n))
    return whole, part, done


def build(kind: str, policy: str, n: int, mesh) -> nn.Module:
    """This rank's model."""
    whole, part, done = compiled(kind, policy, n)
    weights = dict(part.named_parameters(remove_duplicate=False)) | dict(part.named_buffers()) | done.graph.constants
    local = load_module_class(done.texts)(mesh).load(lambda name, slices: weights[name].detach()[slices], mesh.device)
    if whole is part:
        return local.eval()
    model = copy.deepcopy(whole)
    model.inner = local
    return model


def batch(kind: str, seed: int):
    g = torch.Generator().manual_seed(seed)
    if kind == "around":
        return (torch.randn(4, 8, dtype=torch.float64, generator=g),)
    ids = torch.randint(0, VOCAB, (4, LENGTH), generator=g)
    return ids, ids.roll(1, 1)


def loss_of(model, args):
    out = model(*args)
    return out["loss"] if isinstance(out, dict) else out


@cache
def train_alone(kind, policy, n, units, optimizer, steps, micro):
    """(gradients of the first step, parameters after the last) of the original model; units see different batches."""
    model = copy.deepcopy(compiled(kind, policy, n)[0])
    opt, first = optimizer([p for p in model.parameters() if p.requires_grad]), None
    for step in range(steps):
        opt.zero_grad()
        for unit in range(units):
            for m in range(micro):
                loss_of(model, batch(kind, 100 * step + 10 * m + unit)).backward()
        first = first or {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}
        opt.step()
    return first, {k: p.detach() for k, p in model.named_parameters()}


def train_rank(kind, policy, n, mesh, optimizer, steps, micro, **settings):
    """As train_alone, as pieces [(name, start, stop, value)], compared with nothing; and the records of the last step."""
    model = build(kind, policy, n, mesh)
    reducer = GradReducer(model, collect_items(model), **settings)
    opt, first = optimizer([p.param for p in reducer.pieces]), None
    for step in range(steps):
        reducer.zero_grad()
        with ap.record() as log:
            for m in range(micro):
                args = batch(kind, 100 * step + 10 * m + mesh.unit)
                if m < micro - 1:
                    with reducer.accumulate():
                        loss_of(model, args).backward()
                else:
                    loss_of(model, args).backward()
            mid = len(log)
            reducer.reduce()
            after = len(log)
            first = first or [
                (p.name, p.start, p.stop, None if p.param.grad is None else p.param.grad.flatten().clone()) for p in reducer.pieces
            ]
            opt.step()
            reducer.publish()
    return model, reducer, first, (log[:mid], log[mid:after], log[after:])


def part_of(model, mesh, name, tensor):
    """This rank's part of a whole tensor, flat."""
    for path, m in model.named_modules():
        if isinstance(m, ap.ParallelModule):
            prefix = path + "." if path else ""
            placements = m.named_placements()
            if name.startswith(prefix) and name[len(prefix) :] in placements:
                return placements[name[len(prefix) :]].shard(mesh, lambda s: tensor[s]).flatten()
    return tensor.flatten()


def worst(kind, policy, n, units, optimizer, mesh, *, steps=4, micro=2, **settings):
    """The largest error of any gradient or parameter on this rank; asserts that all pieces together are the whole."""
    grads, params = train_alone(kind, policy, n, units, optimizer, steps, micro)
    model, reducer, got, log = train_rank(kind, policy, n, mesh, optimizer, steps, micro, **settings)
    errors = {}
    for name, start, stop, value in got:
        want = grads[name]
        assert (want is None) == (value is None), name
        if want is not None:
            errors[f"grad {name}"] = (part_of(model, mesh, name, want)[start:stop] - value).abs().max().item()
    for p in reducer.pieces:
        errors[p.name] = (part_of(model, mesh, p.name, params[p.name])[p.start : p.stop] - p.param.detach().flatten()).abs().max().item()
    if settings.get("zero") != 3:
        for item in reducer.items:
            errors[f"whole {item.name}"] = (
                (part_of(model, mesh, item.name, params[item.name]) - item.param.detach().flatten()).abs().max().item()
            )
    name = max(errors, key=errors.get)
    return errors[name], name, log
