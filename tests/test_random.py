"""random_streams: who draws alike and who does not, on one stream and on the next, under checkpoint, and in exact mode.
Must not know which ops draw."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from autopar.runtime import collectives as c
from autopar.runtime.groups import rank_mesh
from autopar.runtime.inproc import run_ranks
from autopar.runtime.random import EXACT, exact_random, random_streams
from tests.procs import run_processes

MESH = (("dp", 2), ("tp", 2))


def draws(axes, rank):
    out = {}
    for names in ((), ("tp",), ("dp",), ("dp", "tp"), ("tp", "dp")):
        with random_streams(*(axes[n] for n in names)):
            out[names] = torch.rand(3).tolist()
    out["after"] = torch.rand(3).tolist()
    return out


@pytest.mark.parametrize("transport", ["inproc", pytest.param("gloo", marks=pytest.mark.procs)])
def test_who_draws_alike(transport):
    if transport == "inproc":
        ranks = run_ranks(MESH, draws)
    else:
        ranks = run_processes(lambda r: draws(rank_mesh(MESH), r), 4)
    # rank = 2 * dp + tp
    for names, same in {(): "0000", ("tp",): "0101", ("dp",): "0011", ("dp", "tp"): "0123", "after": "0000"}.items():
        for i in range(4):
            for j in range(4):
                assert (ranks[i][names] == ranks[j][names]) == (same[i] == same[j]), (names, i, j)
    for r in ranks:
        assert len({str(v) for v in r.values()}) == len(r), "two streams drew the same numbers"


def test_reproducible_and_independent_of_how_much_is_drawn_inside():
    def fn(n):
        def run(axes, rank):
            with random_streams(axes["tp"]):
                first = torch.rand(n)[0].item()
            with random_streams(axes["tp"]):
                return first, torch.rand(1).item(), axes["tp"].rank

        return run_ranks(MESH, run, seed=5)

    assert fn(1) == fn(1) == fn(1000)


def test_one_rank_and_no_axis_change_nothing():
    torch.manual_seed(0)
    want = torch.rand(4)
    torch.manual_seed(0)
    axes = rank_mesh((("tp", 1),))
    with random_streams(axes["tp"]), random_streams():
        assert torch.equal(torch.rand(4), want)


def test_recomputation_draws_the_same():
    def run(axes, rank):
        x = torch.ones(64, requires_grad=True)

        def block(x):
            with random_streams(axes["tp"]):
                return F.dropout(c.i_to_r(x, axes["tp"]), 0.5)

        y = checkpoint(block, x, use_reentrant=False)
        y.backward(torch.ones_like(y))
        return y.detach(), x.grad

    (y0, g0), (y1, g1) = run_ranks((("tp", 2),), run)
    assert not torch.equal(y0, y1) and torch.equal(g0, y0 + y1) and torch.equal(g1, g0)


def test_an_exception_inside_restores_the_stream():
    def run(axes, rank):
        state = []
        for fail in (False, True):
            torch.manual_seed(1)
            try:
                with random_streams(axes["tp"]):
                    torch.rand(5)
                    if fail:
                        raise ValueError
            except ValueError:
                pass
            state.append(torch.rand(1).item())
        return state[0] == state[1]

    assert run_ranks((("tp", 2),), run) == [True, True]


def test_exact_mode_uses_the_default_stream():
    torch.manual_seed(0)
    want = torch.rand(3)

    def run(axes, rank):
        with random_streams(axes["tp"]):
            return torch.rand(3)

    assert not EXACT
    with exact_random(), exact_random():
        assert EXACT
        got = run_ranks((("tp", 2),), run)
    assert not EXACT and all(torch.equal(t, want) for t in got)
