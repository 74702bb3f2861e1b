"""ZeRO-1 and ZeRO-3: training against one process, the bytes theory says, and parameters that exist only while a block needs them.
Must not use build_optimizer."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch import nn

from autopar import runtime as ap
from autopar.errors import LayoutError
from autopar.runtime.buckets import collect_items
from autopar.runtime.groups import rank_mesh
from autopar.runtime.reducer import GradReducer
from tests.procs import run_processes
from tests.reducing import ADAMW, SGD, batch, build, compiled, loss_of, part_of, train_alone, worst

KINDS = {
    "zero1": {"zero": 1},
    "zero1 small buckets": {"zero": 1, "bucket_mb": 0.002},
    "zero1 reduce-scatter": {"zero": 1, "use_reduce_scatter": True},
    "zero1 2 groups": {"zero": 1, "zero_ngroups": 2},
    "zero1 2 groups reduce-scatter": {"zero": 1, "zero_ngroups": 2, "use_reduce_scatter": True, "bucket_mb": 0.002},
    "zero3": {"zero": 3},
    "zero3 2 groups": {"zero": 3, "zero_ngroups": 2},
}
LAYOUTS = [("dp", 1, 4), ("tp", 2, 2), ("data", 2, 1)]  # policy, plan_ngpus, scale units


def on_ranks(kind, policy, n, units, fn):
    return ap.run_ranks(compiled(kind, policy, n)[2].program.mesh, fn, units=units)


CASES = [(kind, name) for kind in ("lm", "around", "recompute") for name in KINDS if kind != "recompute" or "zero3" in name]


@pytest.mark.parametrize(("policy", "n", "units"), LAYOUTS)
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_equals_one_process(kind, name, policy, n, units):
    settings = KINDS[name]
    optimizer = SGD if policy == "dp" else ADAMW
    for error, name, _ in on_ranks(kind, policy, n, units, lambda mesh, rank: worst(kind, policy, n, units, optimizer, mesh, **settings)):
        assert error < 1e-12, name


PROCESSES = [
    ("lm", "tp", 2, 2, {"zero": 1, "use_async": True, "bucket_mb": 0.002}),
    ("lm", "data", 2, 2, {"zero": 1, "zero_ngroups": 2, "use_async": True, "use_reduce_scatter": True, "bucket_mb": 0.002}),
    ("recompute", "dp", 1, 3, {"zero": 3}),
    ("lm", "tp", 2, 2, {"zero": 3}),
    ("around", "tp", 1, 2, {"zero": 3}),
]


@pytest.mark.procs
@pytest.mark.parametrize(("kind", "policy", "n", "units", "settings"), PROCESSES)
def test_processes_equal_one_process(kind, policy, n, units, settings):
    axes = compiled(kind, policy, n)[2].program.mesh
    for error, name in run_processes(lambda rank: worst(kind, policy, n, units, ADAMW, rank_mesh(axes), **settings)[:2], n * units):
        assert error < 1e-12, name


@pytest.mark.parametrize("settings", [s for s in KINDS.values() if "zero_ngroups" not in s], ids=[k for k in KINDS if "groups" not in k])
@pytest.mark.parametrize("micro", [1, 3])
def test_bytes(settings, micro):
    """n parameters on k ranks: all-reduce sends 2 n (k-1)/k, reduce-scatter half of that, an all-gather of all parameters the same half."""
    k = 4
    _, _, log = on_ranks("lm", "dp", 1, k, lambda mesh, rank: worst("lm", "dp", 1, k, SGD, mesh, steps=1, micro=micro, **settings))[0]
    n = 8 * sum(p.numel() for p in compiled("lm", "dp", 1)[0].parameters())
    sent = {name: sum(r.bytes for part in log for r in part if r.name == name and r.dtype == torch.float64) for name in MOVES}
    half = n * (k - 1) // k

    def close(want):
        return pytest.approx(want, rel=0.02, abs=1)  # padding, and one count per parameter

    if settings["zero"] == 3:
        # Forward and backward of each micro batch; the tied embedding and its block are held from the start to the end of both.
        assert sent == {"all_reduce": 0, "reduce_scatter": close(half), "all_gather": close(2 * micro * half)}
    elif settings.get("use_reduce_scatter"):
        assert sent == {"all_reduce": 0, "reduce_scatter": close(half), "all_gather": close(half)}
    else:
        assert sent == {"all_reduce": close(2 * half), "reduce_scatter": 0, "all_gather": close(half)}


MOVES = ("all_reduce", "reduce_scatter", "all_gather")


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_each_rank_updates_its_part(settings):
    """Every entry is updated on one rank of each group; with ZeRO-1 pieces are views of the parameters."""

    def fn(mesh, rank):
        model = build("lm", "dp", 1, mesh)
        reducer = GradReducer(model, collect_items(model), **settings)
        for p in reducer.pieces:
            if settings["zero"] == 1:
                whole = model.get_parameter(p.name)
                assert p.param.data_ptr() == whole.data_ptr() + p.start * 8 and p.param.shape == (p.stop - p.start,)
        return [(p.name, p.start, p.stop, p.whole_shape) for p in reducer.pieces]

    covered = {name: torch.zeros(p.numel()) for name, p in compiled("lm", "dp", 1)[0].named_parameters()}
    for name, start, stop, shape in chain(*on_ranks("lm", "dp", 1, 4, fn)):
        covered[name][start:stop] += 1
        assert start < stop <= shape.numel() == covered[name].numel()
    assert all(c.eq(settings.get("zero_ngroups", 1)).all() for c in covered.values())


def resident(model) -> int:
    """Bytes of all parameters that are in memory."""
    stores = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters() if p.numel()}
    return sum(stores.values())


@pytest.mark.parametrize("units", [1, 2, 4])
@pytest.mark.parametrize("kind", ["lm", "recompute"])
def test_memory_falls_with_units(kind, units):
    """Outside of a step: 1 / units of parameters, gradients and optimizer state; inside, two blocks and the root at most are whole."""

    def fn(mesh, rank):
        model = build(kind, "dp", 1, mesh)
        blocks = {p: sum(q.numel() for q in m.parameters()) * 8 for p, m in model.named_modules() if isinstance(m, ap.Block) and p}
        root = sum(q.numel() for q in model.parameters()) * 8 - sum(blocks.values())
        reducer = GradReducer(model, collect_items(model), zero=3)
        optimizer, most = ADAMW([p.param for p in reducer.pieces]), []
        for m in model.modules():
            m.register_forward_hook(lambda *_: most.append(resident(model)))
            if m is not model:
                m.register_full_backward_hook(lambda *_: most.append(resident(model)))
        for step in range(2):
            reducer.zero_grad()
            loss_of(model, batch(kind, step)).backward()
            reducer.reduce()
            optimizer.step()
        state = sum(t.numel() * 8 for s in optimizer.state.values() for t in s.values() if t.dim())
        grads = sum(p.param.grad.numel() * 8 for p in reducer.pieces)
        return resident(model), max(most), root + 2 * max(blocks.values()), state, grads, sum(p.param.numel() * 8 for p in reducer.pieces)

    whole = 8 * sum(p.numel() for p in compiled(kind, "dp", 1)[0].parameters())
    for left, most, bound, state, grads, mine in on_ranks(kind, "dp", 1, units, fn):
        if units > 1:
            assert left == 0 and most <= bound + 64 and bound < 0.9 * whole
        assert [state, grads, mine] == pytest.approx([2 * whole / units, whole / units, whole / units], rel=0.05)


def run3(fn, units=2, kind="lm"):
    def rank_fn(mesh, rank):
        model = build(kind, "dp", 1, mesh)
        return fn(model, GradReducer(model, collect_items(model), zero=3), mesh)

    return ap.run_ranks((), rank_fn, units=units)


def test_zero3_values_through_pieces():
    def fn(model, reducer, mesh):
        whole = dict(compiled("lm", "dp", 1)[0].named_parameters())
        for p in reducer.pieces:
            assert torch.equal(part_of(model, mesh, p.name, whole[p.name])[p.start : p.stop], p.param)
            p.param.data.add_(1)  # as loading does
        with torch.no_grad():
            model(*batch("lm", 0))
        seen = {}
        model.layers[1].register_forward_pre_hook(lambda m, args: seen.update(got=m.mlp.up.weight.clone()))
        with torch.no_grad():
            model(*batch("lm", 0))
        return torch.equal(seen["got"], whole["layers.1.mlp.up.weight"] + 1)

    assert run3(fn) == [True, True]


def test_zero3_parameter_read_outside_of_its_block_is_an_error():
    def fn(model, reducer, mesh):
        with pytest.raises(RuntimeError, match=r"size|shape|dim"):
            model.layers[0].mlp.up.weight @ torch.ones(8, dtype=torch.float64)
        assert model.embed.weight.shape == (0,)

    run3(fn)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_zero3_evaluation(mode):
    def fn(model, reducer, mesh):
        alone = compiled("lm", "dp", 1)[0]
        for _ in range(2):
            with mode():
                torch.testing.assert_close(loss_of(model, batch("lm", 0)), loss_of(alone, batch("lm", 0)), rtol=0, atol=1e-12)
        loss_of(model, batch("lm", 0)).backward()
        reducer.reduce()
        assert resident(model) == 0

    run3(fn)


@pytest.mark.parametrize("kind", ["lm", "recompute"])
def test_zero3_forwards_and_backwards_in_any_order(kind):
    """Two forwards, then their backwards, the first one first; a forward that has no backward; a backward in parts."""

    def fn(model, reducer, mesh):
        with reducer.accumulate():
            a, b = (loss_of(model, batch(kind, i)) for i in (0, 1))
            loss_of(model, batch(kind, 9))
            a.backward()
            assert resident(model) == 0
            b.backward()
            c = loss_of(model, batch(kind, 2))
            torch.autograd.grad(c, [p for p in model.parameters() if p.numel()] or [c], retain_graph=True)
            c.backward()
            (loss_of(model, batch(kind, 3)) + loss_of(model, batch(kind, 4))).backward()
        loss_of(model, batch(kind, 5)).backward()
        reducer.reduce()
        return [(p.name, p.start, p.stop, p.param.grad) for p in reducer.pieces]

    alone = compiled(kind, "dp", 1)[0]
    alone.zero_grad()
    for i in range(6):
        loss_of(alone, batch(kind, i)).backward()
    grads = {n: p.grad.flatten() for n, p in alone.named_parameters()}
    for rank in run3(fn, kind=kind):
        for name, start, stop, grad in rank:
            torch.testing.assert_close(grad, 2 * grads[name][start:stop], rtol=0, atol=1e-12)
    alone.zero_grad()


def test_zero3_after_an_error_in_forward():
    def fn(model, reducer, mesh):
        handle = model.layers[1].register_forward_pre_hook(lambda m, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(*batch("lm", 0))
        handle.remove()
        reducer.zero_grad()
        assert resident(model) == 0
        loss_of(model, batch("lm", 0)).backward()
        reducer.reduce()
        return sum(p.param.grad.sum() for p in reducer.pieces)

    a, b = run3(fn)
    assert torch.isfinite(a + b)


def test_zero3_prefetches_one_block():
    def fn(model, reducer, mesh):
        ahead = []
        for i, layer in enumerate(model.layers):
            layer.register_forward_pre_hook(lambda m, args, i=i: ahead.append((i, sum(s.full for s in reducer.gatherer.shards))))
        for step in range(2):
            loss_of(model, batch("lm", step)).backward()
            reducer.zero_grad()
        return ahead

    # The root, the layer itself, and from the second step on the next layer.
    assert run3(fn)[0] == [(0, 2), (1, 2), (2, 2), (0, 3), (1, 3), (2, 2)]


def test_replaced_memory_is_an_error():
    def fn(mesh, rank):
        model = nn.Linear(2, 2)
        reducer = GradReducer(model, collect_items(model, mesh), zero=1)
        model.weight.data = torch.ones(2, 2)
        reducer.publish()

    with pytest.raises(LayoutError, match="the memory of weight was replaced after the optimizer was built"):
        ap.run_ranks((("dp", 1),), fn, units=2)


def test_parameters_loaded_in_place_are_published():
    def fn(mesh, rank):
        model = nn.Linear(2, 2)
        reducer = GradReducer(model, collect_items(model, mesh), zero=1)
        model.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
        for p in reducer.pieces:
            p.param.data.add_(1)
        reducer.publish()
        return model.weight.tolist(), model.bias.tolist()

    assert ap.run_ranks((("dp", 1),), fn, units=2) == [([[2, 1], [1, 2]], [1, 1])] * 2


def test_one_process_reference_moves():
    """The comparison itself: training changes every parameter that has a gradient."""
    grads, params = train_alone("lm", "dp", 1, 2, ADAMW, 2, 2)
    before = dict(compiled("lm", "dp", 1)[0].named_parameters())
    assert all(not torch.equal(params[n], before[n]) for n, g in grads.items() if g is not None)
