"""Every row of the conversion table against the definition of the types, forward and backward, on both transports.
Must not know the compiler: values are split and joined here by the definition alone.

The definition: R and I are the value itself, S(d) its slice, P an addend. A value with its gradient is compared as whole tensors:
the whole input goes in with its type, the whole output has to come out equal, and the gradient of dual type has to be that of the identity.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from autopar.errors import LayoutError
from autopar.ir.mesh import Mesh
from autopar.ir.types import TABLE
from autopar.runtime import collectives as c
from autopar.runtime.inproc import run_ranks
from tests.procs import run_processes

SHAPE = (12, 24, 12)
ROWS = [
    (src, dst, dims)
    for src, dst in TABLE
    for dims in (
        itertools.permutations(range(3), 2) if (src, dst) == ("S", "S") else [(d,) for d in range(3)] if "S" in (src, dst) else [()]
    )
]
MESHES = [(("a", 2),), (("a", 3),), (("a", 4),), (("a", 2), ("b", 2)), (("a", 2), ("b", 3)), (("a", 2), ("b", 1), ("c", 2))]
DUAL = {"R": "P", "P": "R", "I": "I", "S": "S"}


def to_local(whole, kind, dim, axis, seed):
    """This rank's part of a whole value of a type."""
    if kind == "S":
        return whole.chunk(axis.size, dim)[axis.rank].clone()
    if kind == "P":
        noise = torch.randn((axis.size, *whole.shape), dtype=whole.dtype, generator=torch.Generator().manual_seed(seed))
        noise[-1] = whole - noise[:-1].sum(0)
        return noise[axis.rank].clone()
    return whole.clone()


def to_whole(parts, kind, dim):
    """The value that the parts on the ranks along an axis stand for."""
    if kind == "S":
        return torch.cat(parts, dim)
    if kind == "P":
        return torch.stack(parts).sum(0)
    for p in parts[1:]:
        assert torch.equal(p, parts[0]), f"ranks hold different {kind} values"
    return parts[0]


def convert(x, src, dst, dims, axis):
    return getattr(c, f"{src}_to_{dst}".lower())(x, axis, *dims)


def one_row(axes, name, src, dst, dims, dtype=torch.float64):
    """(output, input gradient, whole value, whole gradient) of a row on this rank. dims holds the S dims, source first."""
    axis = axes[name]
    gen = torch.Generator().manual_seed(7)
    whole, grad = torch.randn(SHAPE, generator=gen, dtype=dtype), torch.randn(SHAPE, generator=gen, dtype=dtype)
    d_src, d_dst = dims[0] if dims else 0, dims[-1] if dims else 0
    x = to_local(whole, src, d_src, axis, 1).requires_grad_()
    y = convert(x * 1, src, dst, dims, axis)
    y.backward(to_local(grad, DUAL[dst], d_dst, axis, 2))
    with torch.no_grad():
        raw = convert(x, src, dst, dims, axis)
    assert torch.equal(raw, y) and not raw.grad_fn
    return y.detach().clone(), x.grad, whole, grad


def check_row(results, groups, src, dst, dims):
    d_src, d_dst = dims[0] if dims else 0, dims[-1] if dims else 0
    for group in groups:
        ys, gs = [results[r][0] for r in group], [results[r][1] for r in group]
        _, _, whole, grad = results[group[0]]
        torch.testing.assert_close(to_whole(ys, dst, d_dst), whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(to_whole(gs, DUAL[src], d_src), grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: "x".join(f"{n}{k}" for n, k in m))
@pytest.mark.parametrize("src,dst", TABLE, ids=lambda k: k)
def test_row_forward_and_backward(mesh, src, dst):
    cases = [(name, d) for name, _ in mesh for s, t, d in ROWS if (s, t) == (src, dst)]
    results = run_ranks(Mesh(mesh), lambda axes, rank: [(axes.groups((n,)), one_row(axes, n, src, dst, d)) for n, d in cases])
    for i, (_, dims) in enumerate(cases):
        check_row([r[i][1] for r in results], results[0][i][0], src, dst, dims)


@pytest.mark.parametrize("src,dst", [(s, d) for (s, d), (forward, _) in TABLE.items() if "_" in forward and forward != "keep_first"])
def test_results_of_collectives_may_be_written_in_place(src, dst):
    dims = next(d for s, t, d in ROWS if (s, t) == (src, dst))

    def write(axes, rank):
        x = torch.ones(4, 4, requires_grad=True)
        y = convert(x, src, dst, dims, axes["a"])
        y.mul_(2)
        y[:, 0] = 1.0
        y.sum().backward()
        return x.grad

    assert all(g.shape == (4, 4) for g in run_ranks((("a", 2),), write))


@pytest.mark.parametrize("src,dst", TABLE, ids=lambda k: k)
def test_row_is_what_the_table_says(src, dst):
    """The collectives that run forward and backward are those of ir.types.TABLE, no more."""
    talk = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all"}
    dims = next(d for s, t, d in ROWS if (s, t) == (src, dst))

    def count(axes, rank):
        x = torch.ones(4, 4, requires_grad=True)
        with c.record() as log:
            y = convert(x, src, dst, dims, axes["a"])
            y.backward(torch.ones_like(y))
        return [r.name for r in log if not r.backward], [r.name for r in log if r.backward]

    for forward, backward in run_ranks((("a", 2),), count):
        assert (forward, backward) == tuple([a] if a in talk else [] for a in TABLE[src, dst])


@pytest.mark.parametrize("src,dst", TABLE, ids=lambda k: k)
def test_gradient_is_the_adjoint(src, dst):
    """<g, f(x)> summed over ranks as the types say equals <f*(g), x>: with one stacked Jacobian, f is linear and f* its transpose.

    Over the product of the ranks' spaces the pairing of a value and its gradient counts I once (by the first rank) and all others per rank.
    """
    dims = next(d for s, t, d in ROWS if (s, t) == (src, dst))

    def pair(axes, rank):
        y, dx, whole, grad = one_row(axes, "a", src, dst, dims)
        x = to_local(whole, src, dims[0] if dims else 0, axes["a"], 1)
        g = to_local(grad, DUAL[dst], dims[-1] if dims else 0, axes["a"], 2)
        first = axes["a"].rank == 0
        return (g * y).sum() * (dst != "I" or first), (dx * x).sum() * (src != "I" or first)

    parts = run_ranks((("a", 3),), pair)
    left, right = sum(p[0] for p in parts), sum(p[1] for p in parts)
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


def test_no_op_on_one_rank():
    x = torch.ones(3, 3, requires_grad=True)

    def same(axes, rank):
        return all(convert(x, src, dst, dims, axes["a"]) is x for src, dst, dims in ROWS)

    assert run_ranks((("a", 1),), same) == [True]


def test_used_twice_under_checkpoint_and_autocast():
    """A tensor converted once and used twice; recomputed in the backward; under autocast: the same gradients as one device."""
    torch.manual_seed(0)
    x0, w0 = torch.randn(4, 8), torch.randn(8, 8)

    def block(x, w, axis):
        r = c.i_to_r(x, axis)
        h = torch.relu(r @ w)
        return c.p_to_i(h @ w.t() + r * h.sum() / (8 * 4), axis)

    def whole(x, w):
        h = torch.relu(x @ w)
        return h @ w.t() + x * h.sum() / (8 * 4)

    def ranks(use_checkpoint, autocast):
        def run(axes, rank):
            tp = axes["tp"]
            x, w = x0.clone().requires_grad_(), w0.chunk(2, 1)[tp.rank].clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = checkpoint(block, x, w, tp, use_reentrant=False) if use_checkpoint else block(x, w, tp)
            y.float().square().sum().backward()
            return y.detach().float(), x.grad, w.grad

        return run_ranks((("tp", 2),), run)

    for autocast, tol in ((False, 1e-4), (True, 0.05)):
        x, w = x0.clone().requires_grad_(), w0.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = whole(x, w)
        y.float().square().sum().backward()
        plain = ranks(False, autocast)
        for a, b in zip(plain, ranks(True, autocast), strict=True):
            assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True)), "recomputation changed something"
        for got, want in (
            (plain[0][0], y.float()),
            (plain[1][1], x.grad),
            (torch.cat([plain[0][2], plain[1][2]], 1), w.grad),
        ):
            assert ((got - want).norm() / want.norm()).item() < tol


def test_second_derivative():
    """A backward is made of conversions, so it can be differentiated again."""

    def run(axes, rank):
        x = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
        w = torch.arange(1.0, 7.0, dtype=torch.float64).chunk(2)[rank]
        y = c.p_to_i((c.i_to_r(x, axes["tp"]) ** 3 * w).sum(), axes["tp"])
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), x)
        return h

    want = 6 * 2.0 * torch.tensor([5.0, 7.0, 9.0], dtype=torch.float64)
    for h in run_ranks((("tp", 2),), run):
        torch.testing.assert_close(h, want)


def test_expanded_and_strided_gradients_are_not_written():
    """The gradient that arrives may be shared with others: an all-reduce in the backward must not overwrite it."""

    def run(axes, rank):
        x, b = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
        (c.i_to_r(x, axes["tp"]) + b).sum().backward()
        y = torch.ones(4, 6, requires_grad=True)
        c.p_to_i(y.t(), axes["tp"]).sum().backward()
        return x.grad.clone(), b.grad.clone(), y.grad.clone()

    for gx, gb, gy in run_ranks((("tp", 2),), run):
        assert gx.tolist() == [2] * 4 and gb.tolist() == [1] * 4 and gy.eq(1).all()


def test_odd_split_is_an_error():
    with pytest.raises(LayoutError, match=r"dim 1 of a \(4, 5\) tensor of size 5 does not split evenly over the 2 ranks of mesh axis 'tp'"):
        run_ranks((("tp", 2),), lambda axes, rank: c.i_to_s(torch.ones(4, 5), axes["tp"], 1))


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]


def raw_ops(axes, rank):
    """Every raw op in every dtype, along every dim and with negative dims; what comes back is (name, tensor)."""
    a, out = axes["a"], []
    for dtype in [*DTYPES, torch.complex64, torch.float8_e4m3fn]:
        t = (torch.arange(16).view(4, 4) * (rank + 1) % 3).to(dtype)
        before = t.clone()
        if dtype not in (torch.float8_e4m3fn,):
            ops = ("sum",) if dtype.is_complex else ("sum", "max", "min")
            out += [(f"all_reduce {op}", a.all_reduce(t, op)) for op in ops]
            if dtype != torch.bool:
                out += [("reduce_scatter", a.reduce_scatter(t, d)) for d in (0, 1, -1)]
        out += [("all_gather", a.all_gather(t.t(), d)) for d in (0, 1, -1)]
        out += [("all_to_all", a.all_to_all(t, s, d)) for s, d in ((0, 1), (1, 0), (-1, -2))]
        out += [("broadcast", a.broadcast(t, src)) for src in range(a.size)]
        assert torch.equal(t.view(torch.uint8), before.view(torch.uint8)), "an argument was written"
    assert not any(t.requires_grad or not t.is_contiguous() for _, t in out)
    return [(n, t.view(torch.uint8) if t.dtype.itemsize == 1 else t) for n, t in out]


def test_raw_ops_by_definition():
    results = run_ranks((("a", 2),), raw_ops)
    ts = [torch.arange(16).view(4, 4) * (r + 1) % 3 for r in range(2)]
    for rank, got in enumerate(results):
        want = [
            ("all_reduce sum", ts[0] + ts[1]),
            ("all_reduce max", torch.maximum(*ts)),
            ("all_reduce min", torch.minimum(*ts)),
            *(("reduce_scatter", (ts[0] + ts[1]).chunk(2, d)[rank]) for d in (0, 1, -1)),
            *(("all_gather", torch.cat([t.t() for t in ts], d)) for d in (0, 1, -1)),
            *(("all_to_all", torch.cat([t.chunk(2, s)[rank] for t in ts], d)) for s, d in ((0, 1), (1, 0), (-1, -2))),
            *(("broadcast", ts[s]) for s in range(2)),
        ]
        for (name, t), (wanted, w) in zip(got[: len(want)], want, strict=True):
            assert name == wanted and torch.equal(t, w.to(torch.float32)), (name, t, w)


def everything(axes, rank):
    """The table and the raw ops, as one long program, for comparing transports."""
    rows = [one_row(axes, name, src, dst, dims)[:2] for name in axes.names for src, dst, dims in ROWS]
    return rows, raw_ops({"a": axes[axes.names[0]]}, rank), repr(axes)


@pytest.mark.procs
@pytest.mark.parametrize("mesh", [(("a", 2),), (("a", 3),), (("a", 2), ("b", 2))], ids=lambda m: "x".join(str(k) for _, k in m))
def test_gloo_processes_equal_in_process_ranks(mesh):
    from autopar.runtime.groups import rank_mesh

    n = Mesh(mesh).size
    if dict(mesh)["a"] == 3:  # raw_ops wants an even split
        here = run_ranks(Mesh(mesh), lambda axes, rank: [one_row(axes, "a", *row)[:2] for row in ROWS])
        there = run_processes(lambda rank: [one_row(rank_mesh(mesh), "a", *row)[:2] for row in ROWS], n)
        rows = zip(here, there, strict=True)
    else:
        here = run_ranks(Mesh(mesh), everything)
        there = run_processes(lambda rank: everything(rank_mesh(mesh), rank), n)
        for (_, a, name_a), (_, b, name_b) in zip(here, there, strict=True):
            assert name_a == name_b and len(a) == len(b)
            for (x, s), (y, t) in zip(a, b, strict=True):
                assert x == y and s.dtype == t.dtype and torch.equal(s, t), (x, s, t)
        rows = ((h[0], t[0]) for h, t in zip(here, there, strict=True))
    for h, t in rows:
        for (y1, g1), (y2, g2) in zip(h, t, strict=True):
            torch.testing.assert_close(y1, y2, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(g1, g2, rtol=1e-12, atol=1e-12)
