"""clip_gnorm: one norm of the whole model's gradient, whatever holds it: shards, replicas, partial sums, ZeRO pieces, ordinary parameters.
Must not know how copies are counted.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

import pytest
import torch

from autopar.errors import AutoparError, ConfigError
from autopar.runtime.axis import record
from autopar.runtime.groups import rank_mesh
from autopar.runtime.inproc import run_ranks
from autopar.runtime.optimizer import build_optimizer
from tests.procs import run_processes
from tests.training import Layout, batches, close, original, train_plain, train_rank, whole_to_local, zero_config

ONE, TP, DP_TP, TP4 = (("d", 1),), (("tp", 2),), (("dp", 2), ("tp", 2)), (("tp", 4),)
LAYOUTS = {
    "units4": ("dp", ONE, 4, 0),
    "tp2x2": ("tp", TP, 2, 0),
    "data2x2": ("data", TP, 2, 0),
    "tp4": ("tp", TP4, 1, 0),
    **{f"random{seed}": ("random", DP_TP, 1 + seed % 2, seed) for seed in range(4)},
}
ZERO = {
    "none": {},
    "zero1": dict(use_zero=1),
    "groups": dict(use_zero=1, zero_ngroups=2),
    "scatter": dict(use_zero=1, zero_use_reduce_scatter=True, reducer_bucket_cap_mb=0.001),
    "async": dict(use_async_reducer=True, reducer_bucket_cap_mb=0.0005),
    "zero3": dict(use_zero=3),
}


@lru_cache
def layout(model, name):
    policy, mesh, units, seed = LAYOUTS[name]
    return Layout(model, policy, mesh, units, seed=seed)


@lru_cache
def expected(model, units, clip):
    plain = original(model)
    return train_plain(plain, torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1, momentum=0.9), units, clip=clip)


def run_rank(at, zero, clip, mesh, rank):
    model = at.load(mesh)
    o = build_optimizer(model, torch.optim.SGD, zero_config(at, **ZERO[zero]), lr=0.1, momentum=0.9)
    got, want = train_rank(model, mesh, o, clip=clip), expected(at.name, at.units, clip)
    for g, w in zip(got[1], want[1], strict=True):
        assert g.dtype == torch.float64
        close(g, w, 1e-12)
    if zero != "zero3":
        for n, w in whole_to_local(model, mesh, want[2]).items():
            close(got[2][n], w, 1e-12)
    return [n.item() for n in got[1]]


# NB: zero_ngroups has to divide the ranks of every reduction, those of the 4 units alone here.
CASES = [(m, at, z) for m in ("tied", "around") for at in LAYOUTS for z in ZERO if z != "groups" or at == "units4"]


@pytest.mark.parametrize(("model", "at", "zero"), CASES)
def test_norm(model, at, zero):
    at = layout(model, at)
    norms = run_ranks(at.mesh, partial(run_rank, at, zero, 0.3), units=at.units)
    assert all(n == norms[0] for n in norms)


@pytest.mark.procs
@pytest.mark.parametrize(("model", "at", "zero"), [("tied", "tp2x2", "none"), ("around", "tp2x2", "zero1"), ("around", "units4", "groups")])
def test_under_gloo(model, at, zero):
    at = layout(model, at)
    norms = run_processes(lambda rank: run_rank(at, zero, 0.3, rank_mesh(at.mesh.axes), rank), at.mesh.size * at.units)
    assert all(n == norms[0] for n in norms)


def test_copies():
    """Who holds what, counted over all ranks: a shard is held by both units, everything else by all four ranks."""
    at = layout("tied", "tp2x2")

    def fn(mesh, rank):
        model = at.load(mesh)
        o = build_optimizer(model, torch.optim.SGD, at.config, lr=0.1)
        places = model.named_placements()
        for name, copies in zip(o._norm.names, o._norm.copies, strict=True):
            assert copies == (2 if "S" in "".join(places[name].types) else 4), name
        return set(o._norm.copies)

    assert run_ranks(at.mesh, fn, units=2)[0] == {2, 4}


def one(model="tied", at="tp2x2", spoil=None, call=lambda o: o.clip_gnorm(1.0)):
    """What `call` returns or raises on every rank, after a backward whose gradients spoil(mesh, model) has changed."""
    at = layout(model, at)

    def fn(mesh, rank):
        local = at.load(mesh)
        o = build_optimizer(local, torch.optim.SGD, at.config, lr=0.1)
        local(*batches(0)[0]).backward()
        o.sync_shard_grad()
        if spoil is not None:
            spoil(mesh, local)
        try:
            return call(o), local.get_parameter("norm.weight").grad.clone()
        except AutoparError as e:
            return e

    return run_ranks(at.mesh, fn, units=at.units)


def one_nan(mesh, model):
    """In a shard that only rank 1 holds."""
    if mesh.rank == 1:
        model.get_parameter("up.weight").grad[0, 0] = math.nan


def test_not_finite():
    """It is returned, on all ranks; gradients become NaN with it, as torch's do."""
    for norm, grad in one(spoil=one_nan):
        assert norm.isnan() and grad.isnan().all()


def test_error_if_nonfinite():
    """All ranks raise, and all name the one."""
    for error in one(spoil=one_nan, call=lambda o: o.clip_gnorm(1.0, error_if_nonfinite=True)):
        assert isinstance(error, AutoparError) and "the gradient norm is nan: rank 1: up.weight" in str(error)
        assert "rank 0" not in str(error)
    for norm, _ in one(call=lambda o: o.clip_gnorm(1.0, error_if_nonfinite=True)):
        assert norm.isfinite()


def test_without_a_limit_nothing_changes():
    (_, before), (_, after) = one(call=lambda o: None)[0], one(call=lambda o: o.clip_gnorm())[0]
    assert torch.equal(before, after)


def test_scale_then_clip():
    """Gradients are summed over two units with one batch: halved, they are the plain ones."""
    plain = original("tied")
    plain(*batches(0)[0]).backward()
    want = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    for norm, grad in one(call=lambda o: (o.scale_grads(0.5), o.clip_gnorm(0.1))[1]):
        close(norm, want, 1e-12)
        close(grad, plain.norm.weight.grad, 1e-12)


@pytest.mark.parametrize("limit", [0, -1.0, math.nan])
def test_bad_limit(limit):
    assert all(isinstance(e, ConfigError) and "a number above 0" in str(e) for e in one(call=lambda o: o.clip_gnorm(limit)))


def test_one_number_is_sent():
    def call(o):
        with record() as log:
            o.clip_gnorm(1.0)
        return [(r.name, r.shape, r.size) for r in log]

    assert all(sent == [("all_reduce", (), 4)] for sent, _ in one(call=call))
