"""build_optimizer: any torch optimizer on ranks trains as it does on the plain module in one process; and everything that is refused.
Must not know how gradients are summed.
"""

from __future__ import annotations

from functools import lru_cache, partial

import pytest
import torch

from autopar.errors import ConfigError
from autopar.ir.mesh import Mesh
from autopar.pas.plan import Plan
from autopar.runtime.groups import rank_mesh
from autopar.runtime.inproc import run_ranks
from autopar.runtime.mixed import mixed_precision
from autopar.runtime.optimizer import build_optimizer
from tests.procs import run_processes
from tests.training import Layout, batches, close, original, train_plain, train_rank, whole_to_local, zero_config

ONE, TP, DP_TP, TP4 = (("d", 1),), (("tp", 2),), (("dp", 2), ("tp", 2)), (("tp", 4),)
LAYOUTS = {
    "one": ("dp", ONE, 1),
    "units2": ("dp", ONE, 2),
    "tp2": ("tp", TP, 1),
    "data2": ("data", TP, 1),
    "tp2x2": ("tp", TP, 2),
    "tp4": ("tp", TP4, 1),
    "random2x2": ("random", DP_TP, 1),
    "random2x2x2": ("random", DP_TP, 2),
}


@lru_cache
def layout(model, name):
    policy, mesh, units = LAYOUTS[name]
    return Layout(model, policy, mesh, units)


def no_decay(name):
    return {"weight_decay": 0.0, "lr": 3e-3} if name.endswith(("bias", "pos", "scale")) else None


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, dict(lr=0.1), None),
    "momentum": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2), None),
    "adamw": (torch.optim.AdamW, dict(lr=1e-2, weight_decay=0.1), no_decay),
    "amsgrad": (torch.optim.Adam, dict(lr=1e-2, amsgrad=True), None),
    "rmsprop": (torch.optim.RMSprop, dict(lr=1e-2, momentum=0.5, centered=True), None),
    "adagrad": (torch.optim.Adagrad, dict(lr=1e-1), no_decay),
    "fused": (torch.optim.AdamW, dict(lr=1e-2, fused=True), no_decay),
    "function": (lambda groups, rate: torch.optim.NAdam(groups, lr=rate), dict(rate=1e-2), None),
}
SCHEDULES = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.3),
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=[0.05] * len(o.param_groups), total_steps=6),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1.0 / (1 + i)),
}


def plain_groups(model, fn):
    """What a user writes for the plain model."""
    groups = {}
    for n, p in model.named_parameters():
        if p.requires_grad:
            options = fn(n) if fn else None
            groups.setdefault(repr(options), {"params": [], **(options or {})})["params"].append(p)
    return list(groups.values())


@lru_cache
def expected(model, units, optimizer, schedule, clip, dtype=torch.float64):
    plain = original(model, dtype)
    make, kwargs, fn = OPTIMIZERS[optimizer]
    o = make(plain_groups(plain, fn), **kwargs)
    return train_plain(plain, o, units, schedule=SCHEDULES[schedule](o) if schedule else None, clip=clip)


def compare(got, want, model, mesh, tol=1e-12):
    for g, w in zip(got[0], want[0], strict=True):
        if mesh.unit == 0:
            close(g, w, tol)
    for g, w in zip(got[1], want[1], strict=True):
        close(g, w, tol)
    wanted = whole_to_local(model, mesh, want[2])
    assert wanted.keys() == got[2].keys()
    for n, w in wanted.items():
        close(got[2][n], w, tol)


def run_rank(at, optimizer, schedule, clip, config, mesh, rank):
    make, kwargs, fn = OPTIMIZERS[optimizer]
    model = at.load(mesh)
    o = build_optimizer(model, make, config, param_group_fn=fn, **kwargs)
    got = train_rank(model, mesh, o, schedule=SCHEDULES[schedule](o) if schedule else None, clip=clip)
    compare(got, expected(at.name, at.units, optimizer, schedule, clip), model, mesh)
    return [n.item() for n in got[1]]


CASES = [
    *((m, "momentum", lay, "step", 1.0) for m in ("tied", "around") for lay in LAYOUTS),
    *((m, "adamw", lay, "onecycle", 0.5) for m in ("tied", "around") for lay in LAYOUTS),
    *(("tied", o, lay, "lambda", None) for o in OPTIMIZERS for lay in ("tp2x2", "random2x2")),
    *(("around", o, "data2", None, 0.1) for o in OPTIMIZERS),
]


@pytest.mark.parametrize(("model", "optimizer", "at", "schedule", "clip"), CASES)
def test_trains_as_plain(model, optimizer, at, schedule, clip):
    at = layout(model, at)
    norms = run_ranks(at.mesh, partial(run_rank, at, optimizer, schedule, clip, at.config), units=at.units)
    assert all(n == norms[0] for n in norms), "one norm for all"


@pytest.mark.procs
@pytest.mark.parametrize(("model", "at"), [("tied", "tp2x2"), ("around", "random2x2"), ("around", "units2")])
def test_under_gloo(model, at):
    at = layout(model, at)

    def rank_fn(rank):
        return run_rank(at, "adamw", "onecycle", 0.5, at.config, rank_mesh(at.mesh.axes), rank)

    norms = run_processes(rank_fn, at.mesh.size * at.units)
    assert all(n == norms[0] for n in norms)


# -- closures


def with_closure(model, o, data):
    def closure():
        o.zero_grad()
        loss = sum(model(*batch) for batch in data)
        loss.backward()
        return loss

    return [o.step(closure) for _ in range(3)]


CLOSURES = {
    "sgd": (torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
    "lbfgs": (torch.optim.LBFGS, dict(lr=0.5, max_iter=4)),
    "wolfe": (torch.optim.LBFGS, dict(max_iter=4, line_search_fn="strong_wolfe")),
}


@pytest.mark.parametrize("case", CLOSURES)
@pytest.mark.parametrize("at", ["one", "whole", "tp2"])
def test_closure(case, at):
    """LBFGS sees all parameters at once: right where every rank has them whole, an error where not (next test)."""
    make, kwargs = CLOSURES[case]
    if case != "sgd" and at == "tp2":
        return
    at = Layout("tied", Plan(Mesh(TP)), TP) if at == "whole" else layout("tied", at)
    data = batches(0)[:2]
    plain = original("tied")
    want = with_closure(plain, make([p for p in plain.parameters() if p.requires_grad], **kwargs), data)

    def fn(mesh, rank):
        model = at.load(mesh)
        got = with_closure(model, build_optimizer(model, make, at.config, **kwargs), data)
        for g, w in zip(got, want, strict=True):
            close(torch.as_tensor(g).detach(), torch.as_tensor(w).detach(), 1e-12)
        for n, w in whole_to_local(model, mesh, dict(plain.named_parameters())).items():
            close(model.get_parameter(n).detach(), w.detach(), 1e-12)

    run_ranks(at.mesh, fn)


# -- optimizers that need parameters whole


WHOLE = {
    "Adafactor": (torch.optim.Adafactor, {}),
    "Muon": (torch.optim.Muon, {}),
    "LBFGS": (torch.optim.LBFGS, {}),
    "Lamb": (None, {}),
    "mixed Muon": (mixed_precision(torch.optim.Muon), {}),
}


class Lamb(torch.optim.Optimizer):
    """A step as long as the parameter."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * float(p.norm() / p.grad.norm()))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("why", ["shards", "cuts"])
def test_not_elementwise(name, why):
    make = WHOLE[name][0] or Lamb
    at = layout("tied", "tp2" if why == "shards" else "units2")
    config = zero_config(at, use_zero=why == "cuts")

    def fn(mesh, rank):
        build_optimizer(at.load(mesh), make, config)

    text = rf"{name.split()[-1]} cannot update .*needs the parameter whole, and .*{why}.*Found by trying.*(dp|use_zero=False)"
    with pytest.raises(ConfigError, match=text):
        run_ranks(at.mesh, fn, units=at.units)


def test_not_elementwise_on_whole_parameters():
    """Adafactor where nothing is sharded is Adafactor."""
    at = layout("tied", "units2")
    plain = original("tied")
    want = train_plain(plain, torch.optim.Adafactor([p for p in plain.parameters() if p.requires_grad], lr=0.1), 2)

    def fn(mesh, rank):
        model = at.load(mesh)
        compare(train_rank(model, mesh, build_optimizer(model, torch.optim.Adafactor, at.config, lr=0.1)), want, model, mesh)

    run_ranks(at.mesh, fn, units=2)
