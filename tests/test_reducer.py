"""The bucketed reducer: sums per group, caps, dtypes, missing, frozen and sparse gradients.
Must not know modules: it is handed parameters and axes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autopar.errors import LayoutError
from autopar.runtime import collectives as c
from autopar.runtime.groups import rank_mesh
from autopar.runtime.inproc import run_ranks
from autopar.runtime.reducer import Reducer
from tests.procs import run_processes

MESH = (("dp", 2), ("tp", 2))
SHAPES = [(3,), (4, 5), (), (7, 2), (1,), (6, 6)]


def make(axes, rank, bucket_mb, missing=()):
    """(reducer, parameters, what their gradients should be). missing: (rank, index) without a gradient."""
    joints = [("tp",), ("dp",), ("dp", "tp")]
    items, want = [], []
    for i, shape in enumerate(SHAPES):
        p = nn.Parameter(torch.zeros(shape, dtype=(torch.float32, torch.float64)[i // 3]))
        names = joints[i % 3]

        def grad(r, p=p, i=i):
            return torch.full_like(p, 10.0**r * (i + 1))

        if (rank, i) not in missing:
            p.grad = grad(rank).t().contiguous().t() if len(shape) == 2 else grad(rank)
        group = next(g for g in axes.groups(names) if rank in g)
        have = [grad(r) for r in group if (r, i) not in missing]
        items.append((f"p{i}", p, axes.join(names)))
        want.append(sum(have) if have else None)
    return Reducer(items, bucket_mb), [p for _, p, _ in items], want


def run(axes, rank, bucket_mb=25.0, missing=()):
    reducer, params, want = make(axes, rank, bucket_mb, missing)
    kept = [p.grad for p in params]
    with c.record() as log:
        reducer.reduce()
    for p, w, k in zip(params, want, kept, strict=True):
        assert (p.grad is None) == (w is None) and (w is None or torch.equal(p.grad, w))
        assert k is None or k is p.grad, "reduced in place"
    reducer.reduce()  # and once more
    return len(log)


@pytest.mark.parametrize("bucket_mb,buckets", [(25.0, 6), (1e-4, 6), (1e-9, 6)])
def test_sums_per_group(bucket_mb, buckets):
    assert run_ranks(MESH, lambda axes, rank: run(axes, rank, bucket_mb)) == [buckets] * 4


def test_missing_gradients():
    """p1: nobody has one and it stays None. p2: one rank has one. p5: one rank has none."""
    missing = {(r, 1) for r in range(4)} | {(r, 2) for r in (0, 1, 3)} | {(2, 5)}
    assert run_ranks(MESH, lambda axes, rank: run(axes, rank, 25.0, missing)) == [6] * 4


@pytest.mark.procs
def test_under_gloo():
    missing = {(r, 1) for r in range(4)} | {(2, 5)}
    assert run_processes(lambda rank: run(rank_mesh(MESH), rank, 25.0, missing), 4) == [6] * 4


def test_buckets_fill_up_to_the_cap():
    def fn(axes, rank):
        params = [nn.Parameter(torch.ones(n)) for n in (100, 100, 60, 300, 40, 10)]
        for p in params:
            p.grad = torch.ones_like(p)
        reducer = Reducer([(str(i), p, axes["tp"]) for i, p in enumerate(params)], bucket_mb=256 * 4 / 2**20)
        with c.record() as log:
            reducer.reduce()
        assert all(p.grad.eq(2).all() for p in params)
        first = [[n for n, _ in b.items] for b in reducer.buckets], [r.shape for r in log]
        params[1].requires_grad_(False)
        params[1].grad = None
        reducer.reduce()
        return first, [[n for n, _ in b.items] for b in reducer.buckets], params[1].grad

    first, frozen, grad = run_ranks((("tp", 2),), fn)[0]
    assert first == ([["0", "1"], ["2", "4", "5"], ["3"]], [(202,), (113,), (301,)])
    assert frozen == [["0", "2", "4", "5"], ["3"]] and grad is None


def test_sparse_gradient_is_an_error():
    def fn(axes, rank):
        e = nn.Embedding(4, 2, sparse=True)
        e(torch.tensor([1])).sum().backward()
        Reducer([("emb.weight", e.weight, axes["tp"])]).reduce()

    with pytest.raises(LayoutError, match=r"the gradient of emb.weight is sparse.*sparse=False"):
        run_ranks((("tp", 2),), fn)


def test_one_rank_does_nothing():
    def fn(axes, rank):
        p = nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        Reducer([("p", p, axes["tp"])]).reduce()
        return p.grad.tolist()

    assert run_ranks((("tp", 1),), fn) == [[1, 1]]
