"""Checkpoints: saved under each layout, loaded under each other, training goes on as if nothing had happened.
Knows the public interface only; layouts of shards are in test_state_layout.py, bad input in test_state_errors.py.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from state_models import batch, groups, lm

import autopar
from autopar.config import ComputeConfig
from autopar.driver import compile_to
from autopar.pas.policies import mesh_policy
from autopar.runtime import launch
from autopar.runtime.optimizer import build_optimizer
from tests.procs import run_processes

STEPS = 3  # before the checkpoint, and after it
OPTIONS = {"lr": 0.01, "eps": 1e-3}  # eps: the bias of keys has a gradient of zero but for rounding, which Adam would blow up


@dataclass(frozen=True)
class Setup:
    """A layout: how many devices a unit has, how many units, and what is done with the optimizer."""

    policy: object = "dp"
    plan: int = 1
    units: int = 1
    zero: dict = field(default_factory=dict)

    @property
    def config(self):
        return ComputeConfig(plan_ngpus=self.plan, runtime_ngpus=self.plan * self.units, **self.zero)


MESH = mesh_policy({"dp": (2, "data"), "tp": (2, "tp")})
SETUPS = {
    "plain": None,  # the original module and a torch optimizer
    "dp2": Setup(units=2),
    "tp2": Setup("tp", 2),
    "data2": Setup("data", 2),
    "tp2x2": Setup("tp", 2, 2),
    "mesh2x2": Setup(MESH, 4),
    "zero1_groups": Setup(units=4, zero={"use_zero": 1, "zero_ngroups": 2}),
    "zero1_tp2x2": Setup("tp", 2, 2, {"use_zero": 1, "zero_use_reduce_scatter": True}),
    "zero3_tp2x2": Setup("tp", 2, 2, {"use_zero": 3}),
}


def build(setup, folder):
    """(module, optimizer), from weights of its own."""
    if setup is None:
        torch.manual_seed(99)
        module = lm()
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        sets = [[p for n, p in named.items() if (groups(n) or {}) == g] for g in ({}, {"weight_decay": 0.3})]
        return module, torch.optim.AdamW([{"params": sets[0]}, {"params": sets[1], "weight_decay": 0.3}], **OPTIONS)
    module = launch.load(folder, units=setup.units)
    return module, build_optimizer(module, torch.optim.AdamW, setup.config, param_group_fn=groups, **OPTIONS)


def train(module, optimizer, steps, units=1):
    for step in steps:
        optimizer.zero_grad()
        module(**batch(step))["loss"].backward()
        if hasattr(optimizer, "scale_grads"):
            optimizer.scale_grads(1 / units)
        optimizer.step()
    optimizer.zero_grad()


def draw():
    return [torch.rand(2).tolist(), random.random(), float(np.random.rand())]


def units_of(setup):
    return 1 if setup is None else setup.units


def save(setup, code, folder):
    """Train, save, train on. Returns the state at the end, and random draws after the save."""
    module, optimizer = build(setup, code)
    random.seed(3)
    np.random.seed(4)
    train(module, optimizer, range(STEPS), units_of(setup))
    autopar.save_checkpoint(folder, module, optimizer, {"step": STEPS})
    drawn = draw()
    train(module, optimizer, range(STEPS, 2 * STEPS), units_of(setup))
    return autopar.sharded_state_dict(module, optimizer), drawn


def resume(setup, code, folders):
    out = {}
    module, optimizer = build(setup, code)
    for name, folder in folders.items():
        extra = autopar.load_checkpoint(folder, module, optimizer)
        assert extra == {"step": STEPS}
        drawn = draw()
        train(module, optimizer, range(STEPS, 2 * STEPS), units_of(setup))
        out[name] = copy.deepcopy(autopar.sharded_state_dict(module, optimizer)), drawn
    return out


def everywhere(setup, fn):
    """fn() on all ranks of a layout."""
    if setup is None:
        return [fn()]
    return run_processes(lambda rank: fn(), setup.plan * setup.units)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Code, checkpoints, and where the uninterrupted runs ended."""
    root = tmp_path_factory.mktemp("state")
    torch.manual_seed(0)
    module = lm()
    code, ends = {None: None}, {}
    for name, setup in SETUPS.items():
        key = setup and (setup.policy, setup.plan)
        if key not in code:
            config = ComputeConfig(plan_ngpus=setup.plan)
            code[key] = compile_to(module, batch(0), setup.policy, config, gen_savedir=root / name)
        ends[name] = everywhere(setup, lambda s=setup, k=key, n=name: save(s, code[k], root / f"checkpoint-{n}"))
    return root, code, ends


@pytest.mark.procs
@pytest.mark.parametrize("name", SETUPS)
def test_any_layout_loads_any_checkpoint(saved, name):
    root, code, ends = saved
    setup = SETUPS[name]
    folders = {n: root / f"checkpoint-{n}" for n in SETUPS}
    got = everywhere(setup, lambda: resume(setup, code[setup and (setup.policy, setup.plan)], folders))
    for other in SETUPS:
        model, optim = autopar.merge_state_dicts([r[other][0] for r in got])
        want, want_optim = autopar.merge_state_dicts([e[0] for e in ends[other]])
        compare(model, want, exact=name == other)
        assert model.keys() == lm().state_dict().keys()
        assert [g["params"] for g in optim["param_groups"]] == [g["params"] for g in want_optim["param_groups"]]
        for i, state in want_optim["state"].items():
            compare(optim["state"][i], state, exact=name == other)
        if name == other:
            assert [r[other][1] for r in got] == [e[1] for e in ends[other]]


def compare(got, want, exact):
    assert got.keys() == want.keys()
    for key, t in want.items():
        if exact:
            assert torch.equal(got[key], t), key
        else:
            torch.testing.assert_close(got[key], t, rtol=1e-4, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")
