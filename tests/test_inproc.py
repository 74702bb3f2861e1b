"""In-process ranks: deterministic turns, own random state, and errors that name the rank and the cause.
Must not know the compiler."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch

from autopar.errors import LayoutError
from autopar.ir.mesh import Mesh
from autopar.runtime import collectives as c
from autopar.runtime.inproc import run_ranks

MESH = Mesh((("dp", 2), ("tp", 2)))


def test_places_and_results_in_rank_order():
    def where(axes, rank):
        return rank, axes["dp"].rank, axes["tp"].rank, axes.unit, axes.device_index

    assert run_ranks(MESH, where) == [(r, r // 2, r % 2, 0, r) for r in range(4)]
    assert run_ranks(MESH, where, units=2) == [(r, r // 2 % 2, r % 2, r // 4, r % 4) for r in range(8)]
    assert run_ranks((), where_one) == [0]


def where_one(axes, rank):
    assert axes.world_size == 1 and list(axes) == []
    return rank


def test_joint_axes():
    def sums(axes, rank):
        ones = torch.tensor(10.0**rank)
        return [int(axes.join(n).all_reduce(ones)) for n in (("tp",), ("dp",), ("tp", "dp"), ("units",), ("units", "tp"))]

    got = run_ranks((("dp", 2), ("tp", 2)), sums, units=2)
    assert got[0] == [11, 101, 1111, 10001, 110011]
    assert got[7] == [11000000, 10100000, 11110000, 10001000, 11001100]


def test_random_streams_are_each_ranks_own():
    """Each rank draws what it would draw alone, however the turns interleave; and the caller's stream is left alone."""
    torch.manual_seed(3)
    want = torch.rand(4)
    random.seed(3)
    want_py = random.random()
    torch.manual_seed(11)
    before = torch.get_rng_state()

    def draw(axes, rank):
        out = []
        for _ in range(4):
            out.append(torch.rand(()))
            axes["tp"].all_reduce(torch.ones(1))
        return torch.stack(out), random.random()

    for t, py in run_ranks(MESH, draw, seed=3):
        assert torch.equal(t, want) and py == want_py
    assert torch.equal(torch.get_rng_state(), before)


def test_turns_are_the_same_every_time():
    def run():
        order = []

        def fn(axes, rank):
            for i in range(3):
                order.append((rank, i))
                if rank % 2 == i % 2:
                    time.sleep(0.001 * rank)
                axes["dp" if i == 1 else "tp"].all_reduce(torch.ones(2))

        run_ranks(MESH, fn)
        return order

    first = run()
    assert first[:4] == [(0, 0), (1, 0), (2, 0), (3, 0)] and all(run() == first for _ in range(5))


def test_backward_and_default_dtype_and_grad_mode():
    def fn(axes, rank):
        torch.set_default_dtype(torch.float64 if rank == 0 else torch.float32)
        axes["tp"].all_reduce(torch.ones(1, dtype=torch.int32))
        x = torch.ones(2, requires_grad=True, dtype=torch.float64)
        c.i_to_r(x, axes["tp"]).sum().backward() if torch.is_grad_enabled() else None
        return torch.ones(1).dtype, x.grad

    got = run_ranks((("tp", 2),), fn)
    assert [d for d, _ in got] == [torch.float64, torch.float32] and all(g.tolist() == [2, 2] for _, g in got)
    assert torch.get_default_dtype() == torch.float32
    with torch.no_grad():
        assert [g for _, g in run_ranks((("tp", 2),), fn)] == [None, None]


FAILURES = {
    "deadlock": (
        lambda axes, rank: None if rank == 1 else axes["tp"].all_reduce(torch.ones(2, 3)),
        [r"deadlock", r"rank 0: waits in all_reduce on axis 'tp' sum \(2, 3\) float32 for rank 1", r"rank 1: finished"],
    ),
    "other axis": (
        lambda axes, rank: axes["tp" if rank else "dp"].all_reduce(torch.ones(2)),
        [r"deadlock", r"rank 0: waits in all_reduce on axis 'dp' .* for rank 2", r"rank 1: waits in all_reduce on axis 'tp' .* for rank 0"],
    ),
    "shape": (
        lambda axes, rank: axes["tp"].all_reduce(torch.ones(2 + rank)),
        [r"mismatched", r"rank 0 calls all_reduce on axis 'tp' sum \(2,\) float32, rank 1 calls .* \(3,\) float32"],
    ),
    "dtype": (
        lambda axes, rank: axes["tp"].all_gather(torch.ones(2, dtype=torch.float64 if rank else torch.float32), 0),
        [r"mismatched", r"float32, rank 1 calls all_gather .* float64"],
    ),
    "kind": (
        lambda axes, rank: axes["tp"].all_gather(torch.ones(2), 0) if rank else axes["tp"].reduce_scatter(torch.ones(2), 0),
        [r"rank 0 calls reduce_scatter .*, rank 1 calls all_gather"],
    ),
    "reduction": (
        lambda axes, rank: axes["tp"].all_reduce(torch.ones(2), "max" if rank else "sum"),
        [r"rank 0 calls all_reduce on axis 'tp' sum .*, rank 1 calls all_reduce on axis 'tp' max"],
    ),
    "timeout": (
        lambda axes, rank: time.sleep(0.8) if rank == 2 else axes["tp"].all_reduce(torch.ones(2)),
        [r"did not end within 0.3 s", r"rank 2: is running, at .*test_inproc.py:\d+", r"rank 0: is ready to run \(after 1"],
    ),
}


@pytest.mark.parametrize("fn,patterns", FAILURES.values(), ids=FAILURES)
def test_failures_name_ranks_and_causes(fn, patterns):
    import re

    with pytest.raises(LayoutError) as e:
        run_ranks(MESH, fn, timeout=0.3)
    for p in patterns:
        assert re.search(p, str(e.value)), (p, str(e.value))


def test_an_exception_keeps_its_type_and_names_the_rank():
    went_on = []

    def fn(axes, rank):
        axes["tp"].all_reduce(torch.ones(2))
        if rank == 3:
            raise KeyError("lost")
        try:
            axes["dp"].all_reduce(torch.ones(2))
        except Exception:
            went_on.append(rank)
        went_on.append(rank)

    before = set(threading.enumerate())  # the rank that slept in the test before may still be there
    with pytest.raises(KeyError, match="lost") as e:
        run_ranks(MESH, fn)
    assert "in rank 3 of 4" in e.value.__notes__[0] and "rank 1: waits in all_reduce on axis 'dp'" in e.value.__notes__[0]
    time.sleep(0.05)
    assert not went_on, "a rank went on after the failure"
    assert set(threading.enumerate()) <= before, "threads are left behind"


def test_an_exception_in_a_backward():
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            raise ZeroDivisionError("in backward")

    def fn(axes, rank):
        x = torch.ones(2, requires_grad=True)
        y = c.i_to_r(x, axes["tp"])
        (Bad.apply(y) if rank == 1 else y).sum().backward()

    with pytest.raises(ZeroDivisionError, match="in backward") as e:
        run_ranks((("tp", 2),), fn)
    assert "in rank 1 of 2" in e.value.__notes__[0]


def test_record_counts_bytes():
    def fn(axes, rank):
        with c.record() as log:
            x = torch.ones(4, 6, requires_grad=True)
            c.p_to_s(c.s_to_r(x, axes["tp"], 0), axes["tp"], 1).sum().backward()
        axes["tp"].all_reduce(torch.ones(3))
        return [(r.name, r.axis, r.shape, r.bytes, r.backward) for r in log]

    want = [
        ("all_gather", "tp", (4, 6), 4 * 6 * 4, False),
        ("reduce_scatter", "tp", (2, 8, 3), 8 * 6 * 4 // 2, False),
        ("all_gather", "tp", (8, 3), 8 * 3 * 4, True),
        ("reduce_scatter", "tp", (2, 4, 6), 8 * 6 * 4 // 2, True),
    ]
    assert run_ranks(MESH, fn) == [want] * 4
