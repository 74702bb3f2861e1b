"""GradReducer without ZeRO: gradients and training against one process, one reduction per parameter per step, every kind of parameter.
Must not use build_optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autopar import runtime as ap
from autopar.errors import ConfigError, LayoutError
from autopar.runtime.buckets import Item, collect_items
from autopar.runtime.groups import rank_mesh
from autopar.runtime.reducer import GradReducer
from tests.procs import ProcessesFailed, run_processes
from tests.reducing import ADAMW, SGD, batch, build, compiled, loss_of, worst

LAYOUTS = [("dp", 1, 3), ("tp", 2, 2), ("data", 2, 1), ("tp", 1, 1)]  # policy, plan_ngpus, scale units


def on_ranks(kind, policy, n, units, fn):
    return ap.run_ranks(compiled(kind, policy, n)[2].program.mesh, fn, units=units)


@pytest.mark.parametrize(("policy", "n", "units"), LAYOUTS)
@pytest.mark.parametrize("kind", ["lm", "around"])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_equals_one_process(kind, policy, n, units, optimizer):
    for error, name, _ in on_ranks(kind, policy, n, units, lambda mesh, rank: worst(kind, policy, n, units, optimizer, mesh)):
        assert error < 1e-12, name


@pytest.mark.procs
@pytest.mark.parametrize("settings", [{}, {"use_async": True, "bucket_mb": 0.002}], ids=["sync", "async"])
@pytest.mark.parametrize(("kind", "policy", "n", "units"), [("lm", "tp", 2, 2), ("recompute", "dp", 1, 2), ("around", "dp", 1, 3)])
def test_processes_equal_one_process(kind, policy, n, units, settings):
    axes = compiled(kind, policy, n)[2].program.mesh

    def fn(rank):
        error, name, log = worst(kind, policy, n, units, ADAMW, rank_mesh(axes), **settings)
        return error, name, [r.axis for r in log[0] if r.backward], [r.axis for r in log[1]]

    for error, name, during, after in run_processes(fn, n * units):
        assert error < 1e-12, name
        if kind != "around":  # NB: there a parameter is never used: its bucket, the first, cannot leave before reduce()
            assert bool(after) != bool(settings) and any("units" in a for a in during) == bool(settings)


@pytest.mark.parametrize("bucket_mb", [25.0, 0.002])
def test_one_reduction_per_parameter_per_step(bucket_mb):
    def fn(mesh, rank, micro):
        model = build("lm", "dp", 1, mesh)
        reducer = GradReducer(model, collect_items(model), bucket_mb=bucket_mb)
        with ap.record() as log:
            for m in range(micro - 1):
                with reducer.accumulate():
                    loss_of(model, batch("lm", m)).backward()
            loss_of(model, batch("lm", micro)).backward()
            assert not log
            reducer.reduce()
        assert {r.name for r in log} == {"all_reduce"}
        assert sum(r.shape[0] for r in log) == sum(p.numel() + 1 for p in model.parameters()), "every parameter once, and its count"
        assert all(r.shape[0] <= max(bucket_mb * 2**20 / 8, b.numel) + len(b.items) for r, b in zip(log, reducer.buckets, strict=True))
        return [r.shape for r in log]

    counts = [ap.run_ranks((), lambda mesh, rank, m=m: fn(mesh, rank, m), units=2) for m in (1, 2, 5)]
    assert counts[0] == counts[1] == counts[2]
    assert (len(counts[0][0]) == 1) == (bucket_mb == 25.0)


def test_gradients_are_views_into_buckets_in_backward_order():
    def fn(mesh, rank):
        model = build("lm", "dp", 1, mesh)
        reducer = GradReducer(model, collect_items(model), bucket_mb=0.002)
        names = [i.name for b in reducer.buckets for i in b.items]
        assert names.index("norm.weight") < names.index("layers.2.mlp.up.weight") < names.index("layers.0.mlp.up.weight")
        for m in range(2):
            with reducer.accumulate():
                loss_of(model, batch("lm", m)).backward()
        for b in reducer.buckets:
            for (item, start, _), view in zip(b.spans(), b.views, strict=True):
                assert item.param.grad is view and view.data_ptr() == b.flat[start:].data_ptr()
        return True

    assert all(ap.run_ranks((), fn, units=2))


class Odd(nn.Module):
    """Every kind of parameter there is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.low, self.full = nn.Parameter(torch.randn(3, 2).bfloat16()), nn.Parameter(torch.randn(4))
        self.tied, self.scalar = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(()))
        self.twin, self.empty = self.tied, nn.Parameter(torch.randn(0, 3))
        self.sometimes, self.never = nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(2))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.spread = nn.Parameter(torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))

    def forward(self, x, branch):
        y = (self.low.float() * x).sum() + self.full.pow(2).sum() * x + (self.tied * self.twin).sum() * self.scalar + self.frozen.sum()
        y = y + (self.spread.cos() * x).sum() + self.empty.sum()
        return y + self.sometimes.pow(3).sum() * x if branch else y


SETTINGS = [
    {},
    {"zero": 1},
    {"zero": 1, "use_reduce_scatter": True},
    {"zero": 1, "zero_ngroups": 2},
    {"use_async": True, "bucket_mb": 1e-5},
    {"zero": 1, "use_async": True, "use_reduce_scatter": True, "zero_ngroups": 2, "bucket_mb": 1e-5},
]


def odd(mesh, rank, **settings):
    """Errors of every kind of parameter over three steps; only rank 2 takes the branch, and in the second step nobody does."""
    alone, model = Odd(), Odd()
    reducer = GradReducer(model, collect_items(model, mesh), **settings)
    pieces = [p.param for p in reducer.pieces]
    assert "twin" not in {p.name for p in reducer.pieces} and "frozen" not in {p.name for p in reducer.pieces}
    optimizer, want = torch.optim.SGD(pieces, lr=0.01), torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=0.01)
    for step in range(3):
        want.zero_grad()
        reducer.zero_grad()
        for r in range(mesh.world_size):
            alone(float(r + 1), r == 2 and step != 1).backward()
        model(float(rank + 1), rank == 2 and step != 1).backward()
        reducer.reduce()
        for p in reducer.pieces:
            grad = getattr(alone, p.name).grad
            assert (grad is None) == (p.param.grad is None), (p.name, step)
            if grad is not None:
                torch.testing.assert_close(
                    p.param.grad.flatten(), grad.flatten()[p.start : p.stop], rtol=2e-2 if p.name == "low" else 1e-5, atol=1e-5
                )
        optimizer.step()
        want.step()
        reducer.publish()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, getattr(alone, name), rtol=2e-2 if name == "low" else 1e-5, atol=1e-5)
    return True


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_kinds_of_parameters(settings):
    assert all(ap.run_ranks((("dp", 1),), lambda mesh, rank: odd(mesh, rank, **settings), units=4))


@pytest.mark.procs
@pytest.mark.parametrize("settings", SETTINGS[4:], ids=str)
def test_kinds_of_parameters_in_processes(settings):
    assert all(run_processes(lambda rank: odd(rank_mesh((("dp", 1),)), rank, **settings), 4))


@pytest.mark.parametrize("settings", [{}, {"zero": 1, "use_reduce_scatter": True}], ids=str)
def test_hooks(settings):
    def fn(mesh, rank):
        model, seen = nn.Linear(3, 2, bias=False), []
        reducer = GradReducer(model, collect_items(model, mesh), **settings)

        def before(reducer, flat):
            seen.append(("pre", flat.numel()))
            flat.mul_(0.5)

        def after(reducer, flat):
            seen.append(("post", flat.numel()))
            flat.add_(1)

        reducer.register_pre_hook(before)
        reducer.register_post_hook(after)
        model(torch.ones(1, 3)).sum().backward()
        reducer.reduce()
        return seen, [p.param.grad.flatten().tolist() for p in reducer.pieces]

    n = 3 if settings else 6
    assert ap.run_ranks((("dp", 1),), fn, units=2) == [([("pre", 6), ("post", n)], [[2.0] * n])] * 2


@pytest.mark.parametrize("settings", [{}, {"zero": 1}], ids=str)
def test_old_gradients_are_an_error(settings):
    def fn(mesh, rank):
        model = nn.Linear(3, 2)
        reducer = GradReducer(model, collect_items(model, mesh), **settings)
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            reducer.reduce()

    with pytest.raises(LayoutError, match=r"gradients of the step before are still there.*call zero_grad\(\)"):
        ap.run_ranks((("dp", 1),), fn, units=2)


def test_gradients_forgotten_by_the_optimizer_are_fine():
    def fn(mesh, rank):
        model = nn.Linear(3, 2)
        reducer = GradReducer(model, collect_items(model, mesh))
        for _ in range(3):
            model.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            reducer.reduce()
        return model.bias.grad.tolist()

    assert ap.run_ranks((("dp", 1),), fn, units=2) == [[2.0, 2.0]] * 2


def test_sparse_gradient_is_an_error():
    def fn(mesh, rank):
        model = nn.Embedding(4, 2, sparse=True)
        GradReducer(model, collect_items(model, mesh))
        model(torch.tensor([1])).sum().backward()

    with pytest.raises(LayoutError, match=r"the gradient of weight is sparse.*sparse=False"):
        ap.run_ranks((("dp", 1),), fn, units=2)


@pytest.mark.procs
def test_second_backward_after_buckets_have_left_is_an_error():
    def fn(rank):
        model = nn.Linear(3, 2)
        reducer = GradReducer(model, collect_items(model), use_async=True)
        model(torch.ones(1, 3)).sum().backward()
        model(torch.ones(1, 3)).sum().backward()
        reducer.reduce()

    with pytest.raises(ProcessesFailed, match=r"run all backwards of a step but the last inside accumulate\(\)"):
        run_processes(fn, 2)


@pytest.mark.parametrize("settings", [{}, {"zero": 1}, {"zero": 1, "zero_ngroups": 2}, {"zero": 3}], ids=str)
@pytest.mark.parametrize(("kind", "policy", "n", "units"), [("lm", "tp", 2, 2), ("lm", "data", 2, 1), ("around", "tp", 2, 2)])
def test_pieces_counted_once_are_the_model(kind, policy, n, units, settings):
    def fn(mesh, rank):
        model = build(kind, policy, n, mesh)
        reducer = GradReducer(model, collect_items(model), **settings)
        return sum(p.stop - p.start for p in reducer.pieces if (r := reducer.replicas(p)) is None or r.rank == 0)

    whole = sum(p.numel() for p in compiled(kind, policy, n)[0].parameters() if p.requires_grad)
    assert sum(on_ranks(kind, policy, n, units, fn)) == whole


def test_items():
    def fn(mesh, rank):
        model = build("around", "tp", 2, mesh)
        return [(i.name, i.axis and i.axis.name, i.block) for i in collect_items(model)]

    items = {name: rest for name, *rest in on_ranks("around", "tp", 2, 2, fn)[0]}
    assert items["before.weight"] == ["units", ""] and "frozen.weight" not in items
    assert items["inner.layers.0.2.bias"][1].startswith("inner") and "units" in items["inner.layers.0.2.bias"][0]
    tied = on_ranks("lm", "tp", 2, 1, lambda mesh, rank: [i.name for i in collect_items(build("lm", "tp", 2, mesh))])[0]
    assert "embed.weight" in tied and "head.weight" not in tied


def test_parallel_modules_of_different_size_are_an_error():
    def fn(mesh, rank):
        alone = ap.RankMesh((("dp", 1),), rank, 2, lambda label, groups: object(), mesh.device)
        collect_items(nn.ModuleDict({"a": ap.ParallelModule(mesh), "b": ap.ParallelModule(alone)}))

    with pytest.raises(ConfigError, match="'a' was compiled for plan_ngpus=2, 'b' for plan_ngpus=1"):
        ap.run_ranks((("tp", 2),), fn)


@pytest.mark.parametrize("settings", [{"zero": 2}, {"zero": 1, "zero_ngroups": 2}, {"zero": 3, "zero_ngroups": 0}], ids=str)
def test_settings_that_do_not_fit(settings):
    def fn(mesh, rank):
        model = nn.Linear(2, 2)
        GradReducer(model, collect_items(model, mesh), **settings)

    with pytest.raises(ConfigError, match=r"use 0, 1 or 3|zero_ngroups=\d does not divide the 3 ranks.*use one of 1, 3"):
        ap.run_ranks((("dp", 1),), fn, units=3)


def test_items_without_a_mesh():
    def fn(mesh, rank):
        p = nn.Parameter(torch.ones(4))
        reducer = GradReducer(nn.Module(), [Item("p", p, mesh["tp"])], zero=1)
        (p * (rank + 1)).sum().backward()
        reducer.reduce()
        return [(q.start, q.stop, q.param.grad.tolist()) for q in reducer.pieces]

    assert ap.run_ranks((("tp", 2),), fn) == [[(0, 2, [3, 3])], [(2, 4, [3, 3])]]
