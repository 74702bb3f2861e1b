"""Master weights and GradScaler: float16 and bfloat16 models, on ranks and in one process, against the same written out by hand.
Must not know how masters are kept.
"""

from __future__ import annotations

import copy
import math
from functools import lru_cache

import pytest
import torch

import autopar
from autopar.errors import ConfigError
from autopar.runtime.groups import rank_mesh
from autopar.runtime.inproc import run_ranks
from autopar.runtime.mixed import mixed_precision
from autopar.runtime.optimizer import build_optimizer
from tests.procs import run_processes
from tests.training import Layout, batches, close, original, train_plain, train_rank, whole_to_local, zero_config

ONE, TP = (("d", 1),), (("tp", 2),)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAYOUTS = {"one": ("dp", ONE, 1), "units2": ("dp", ONE, 2), "tp2": ("tp", TP, 1), "tp2x2": ("tp", TP, 2)}
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, dict(lr=1e-2, weight_decay=0.1)),
    "adam": (torch.optim.Adam, dict(lr=1e-2, amsgrad=True)),
    "sgd": (torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
}


@lru_cache
def layout(model, name, dtype):
    policy, mesh, units = LAYOUTS[name]
    return Layout(model, policy, mesh, units, dtype)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def by_hand(model, make, kwargs, steps=5):
    """float32 copies, an optimizer over them, rounding: what the wrapper is to do. (losses, parameters, masters)"""
    masters = [p.detach().float().requires_grad_() for p in trained(model)]
    o = make(masters, **kwargs)
    losses = []
    for ids, labels in batches(0, steps=steps):
        model.zero_grad()
        loss = model(ids, labels)
        loss.backward()
        for p, m in zip(trained(model), masters, strict=True):
            m.grad = None if p.grad is None else p.grad.float()
        o.step()
        with torch.no_grad():
            for p, m in zip(trained(model), masters, strict=True):
                p.copy_(m)
        losses.append(loss.detach())
    return losses, {n: p.detach() for n, p in model.named_parameters()}, masters


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_in_one_process(name, dtype):
    """A plain module, no ranks: bitwise what one writes by hand."""
    make, kwargs = OPTIMIZERS[name]
    want = by_hand(original("tied", dtype), make, kwargs)
    model = original("tied", dtype)
    o = mixed_precision(make)(trained(model), **kwargs)
    losses, _, params = train_plain(model, o)
    assert all(torch.equal(a, b) for a, b in zip(losses, want[0], strict=True))
    assert all(torch.equal(params[n], w) for n, w in want[1].items())
    assert all(torch.equal(m, w) for m, w in zip(o.masters.values(), want[2], strict=True))
    assert {t.dtype for s in o.state.values() for t in s.values() if torch.is_tensor(t)} == {FP32}


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("at", LAYOUTS)
@pytest.mark.parametrize("model", ["tied", "around"])
def test_on_ranks(model, at, dtype):
    """As in one process, within the rounding of half precision sums."""
    at = layout(model, at, dtype)
    plain = original(model, dtype)
    want = train_plain(plain, mixed_precision(torch.optim.SGD)(trained(plain), lr=0.1, momentum=0.9), at.units, clip=1.0)

    def fn(mesh, rank):
        local = at.load(mesh)
        o = build_optimizer(local, mixed_precision(torch.optim.SGD), at.config, lr=0.1, momentum=0.9)
        got = train_rank(local, mesh, o, clip=1.0)
        tol = 3e-2 if dtype == BF16 else 4e-3
        for g, w in zip(got[1], want[1], strict=True):
            assert g.dtype == FP32
            close(g, w.float(), tol)
        for n, w in whole_to_local(local, mesh, want[2]).items():
            close(got[2][n], w, tol)
        for piece, state in o.named_pieces():
            assert state["master"].dtype == FP32 and state["master"].shape == piece.param.shape
            assert torch.equal(state["master"].to(dtype), piece.param)

    run_ranks(at.mesh, fn, units=at.units)


def test_one_rank_is_bitwise():
    at = layout("tied", "one", BF16)
    want = by_hand(original("tied", BF16), *OPTIMIZERS["adamw"])

    def fn(mesh, rank):
        local = at.load(mesh)
        make, kwargs = OPTIMIZERS["adamw"]
        return train_rank(local, mesh, build_optimizer(local, mixed_precision(make), at.config, **kwargs))

    losses, _, params = run_ranks(at.mesh, fn)[0]
    assert all(torch.equal(a, b) for a, b in zip(losses, want[0], strict=True))
    assert all(torch.equal(params[n], w) for n, w in want[1].items())


def test_small_updates_are_not_lost():
    """Steps of a thousandth of bfloat16's resolution: masters move on, and a thousand of them show."""
    p = torch.nn.Parameter(torch.ones(4, dtype=BF16))
    o = autopar.mixed_precision(torch.optim.SGD)([p], lr=1e-5)
    for _ in range(1000):
        p.grad = torch.ones_like(p)
        o.step()
    assert torch.equal(p.detach(), torch.full((4,), 0.99, dtype=BF16)) and abs(o.masters[p][0].item() - 0.99) < 1e-4


def test_other_dtypes_are_updated_as_they_are():
    a, b = torch.nn.Parameter(torch.ones(3, dtype=BF16)), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    o = mixed_precision(torch.optim.SGD)([{"params": [a], "lr": 0.5}, {"params": b}], lr=0.25)
    (a.float().sum() + b.sum()).backward()
    o.step()
    assert a.tolist() == [0.5] * 3 and b.tolist() == [0.75] * 3 and o.masters[b] is b
    o.zero_grad()
    assert a.grad is None and b.grad is None


def test_closure():
    def fn(o, p):
        def closure():
            o.zero_grad()
            loss = (p.float() - 3.0).square().sum()
            loss.backward()
            return loss

        return closure

    p = torch.nn.Parameter(torch.zeros(2, dtype=BF16))
    o = mixed_precision(torch.optim.LBFGS)([p], max_iter=5)
    first = o.step(fn(o, p))
    assert first.item() == 18.0 and torch.equal(p.detach(), torch.full((2,), 3.0, dtype=BF16))


def test_resume_is_bitwise():
    """With the state, masters come back; with weights alone, masters start from them."""
    model, again = original("tied", BF16), original("tied", BF16)
    o = mixed_precision(torch.optim.AdamW)(trained(model), lr=1e-3)
    train_plain(model, o)
    again.load_state_dict(model.state_dict())
    p = mixed_precision(torch.optim.AdamW)(trained(again), lr=1e-3)
    p.load_state_dict(copy.deepcopy(o.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(o.masters.values(), p.masters.values(), strict=True))
    a, b = train_plain(model, o), train_plain(again, p)
    assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
    assert all(torch.equal(a[2][n], b[2][n]) for n in a[2])


@pytest.mark.parametrize("write", ["copy_", "data"])
@pytest.mark.parametrize("zero", [0, 1])
def test_loaded_weights_are_not_undone(write, zero):
    """Weights that somebody writes after the optimizer was built are those it goes on from."""
    at = layout("tied", "units2", BF16)

    def fn(mesh, rank):
        model = at.load(mesh)
        o = build_optimizer(model, mixed_precision(torch.optim.SGD), zero_config(at, use_zero=zero), lr=2.0**-6)
        model(*batches(0)[0]).backward()
        o.step()
        o.zero_grad()
        p = model.get_parameter("pos")
        with torch.no_grad():
            (p if write == "copy_" else p.data).copy_(torch.full_like(p, 2.0))
        (model.get_parameter("pos").float().sum() / 2 + 0.0 * model(*batches(0)[0])).backward()
        o.step()
        assert torch.equal(p.detach(), torch.full_like(p, 2.0 - 2.0**-6)), p  # 1/2 of each of the two units

    run_ranks(at.mesh, fn, units=2)


def test_zero_keeps_masters_of_its_pieces_only():
    at = layout("tied", "units2", BF16)

    def fn(mesh, rank):
        model = at.load(mesh)
        o = build_optimizer(model, mixed_precision(torch.optim.AdamW), zero_config(at, use_zero=1), lr=1e-2)
        got = train_rank(model, mesh, o)
        assert all(torch.equal(state["master"].to(BF16), piece.param) for piece, state in o.named_pieces())
        return sum(m.numel() for m in o.optimizer.masters.values()), got[2]

    (a, first), (b, second) = run_ranks(at.mesh, fn, units=2)
    n = sum(p.numel() for p in trained(original("tied")))
    assert a + b == n and abs(a - b) <= 2
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_an_instance_is_refused():
    o = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ConfigError, match="takes an optimizer class"):
        mixed_precision(o)


# -- GradScaler


def scaler_of(**settings):
    return torch.amp.GradScaler("cpu", **{"init_scale": 2.0**10, "growth_interval": 2, **settings})


def with_scaler(model, o, scaler, unit_batches, clip=None, units=1, norm=torch.nn.utils.clip_grad_norm_):
    """(scales, norms): the loop of PyTorch's manual."""
    scales, norms = [], []
    for batch in unit_batches:
        o.zero_grad()
        scaler.scale(sum(model(*b) for b in batch)).backward()
        if clip is not None:
            scaler.unscale_(o)
            norms.append(o.clip_gnorm(clip) if hasattr(o, "clip_gnorm") else norm(model.parameters(), clip))
        scaler.step(o)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, norms


def run_scaled(at, dtype, clip, zero, mesh, rank):
    make = torch.optim.AdamW if dtype == torch.float64 else mixed_precision(torch.optim.AdamW)
    settings = {} if dtype == torch.float64 else {"init_scale": 2.0**17}  # float16 overflows, steps are skipped
    plain = original(at.name, dtype)
    per_unit = [batches(u) for u in range(at.units)]
    o = make(trained(plain), lr=1e-3)
    clipped = (
        {} if dtype == torch.float64 else {"norm": lambda params, limit: torch.nn.utils.clip_grad_norm_(list(o.masters.values()), limit)}
    )
    want = with_scaler(plain, o, scaler_of(**settings), list(zip(*per_unit, strict=True)), clip, **clipped)

    model = at.load(mesh)
    p = build_optimizer(model, make, zero_config(at, use_zero=zero), lr=1e-3)
    got = with_scaler(model, p, scaler_of(**settings), [[b] for b in batches(mesh.unit)], clip)
    assert got[0] == want[0], "the same steps are skipped"
    tol = 1e-12 if dtype == torch.float64 else 4e-3
    for g, w in zip(got[1], want[1], strict=True):
        assert g.isfinite() == w.isfinite()
        if w.isfinite():
            close(g, w, tol)
    for n, w in whole_to_local(model, mesh, dict(plain.named_parameters())).items():
        close(model.get_parameter(n).detach(), w.detach(), tol)
    return got[0]


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, FP16])
@pytest.mark.parametrize("at", LAYOUTS)
def test_scaler(at, dtype, clip, zero):
    at = layout("tied", at, dtype)
    scales = run_ranks(at.mesh, lambda mesh, rank: run_scaled(at, dtype, clip, zero, mesh, rank), units=at.units)
    assert all(s == scales[0] for s in scales)
    pairs = list(zip([2.0**17 if dtype == FP16 else 2.0**10, *scales[0]], scales[0], strict=False))
    assert any(b >= a for a, b in pairs), "some steps are made"
    assert dtype != FP16 or any(b < a for a, b in pairs), "some are skipped"


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("masters", [False, True])
def test_one_infinity_on_one_rank(masters, unscale, zero):
    """In a shard that no other rank sees: all skip the step, and all lower the scale."""
    at = layout("tied", "tp2x2" if zero else "tp2", BF16 if masters else FP32)
    make = mixed_precision(torch.optim.SGD) if masters else torch.optim.SGD

    def fn(mesh, rank):
        model, scaler, scales = at.load(mesh), scaler_of(), []
        o = build_optimizer(model, make, zero_config(at, use_zero=zero), lr=0.1)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for i in range(2):
            o.zero_grad()
            scaler.scale(model(*batches(0)[i])).backward()
            if i == 0 and rank == 1:
                model.get_parameter("up.weight").grad[0, 0] = math.inf
            if unscale:
                scaler.unscale_(o)
            scaler.step(o)
            scaler.update()
            scales.append(scaler.get_scale())
            same = [torch.equal(p, before[n]) for n, p in model.named_parameters()]
            assert all(same) if i == 0 else not all(same)
        return scales

    assert run_ranks(at.mesh, fn, units=at.units) == [[2.0**9, 2.0**9]] * (at.mesh.size * at.units)


@pytest.mark.procs
def test_scaler_under_gloo():
    at = layout("tied", "tp2x2", FP16)
    scales = run_processes(lambda rank: run_scaled(at, FP16, 0.5, 0, rank_mesh(at.mesh.axes), rank), 4)
    assert all(s == scales[0] for s in scales)
