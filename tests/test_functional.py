"""autopar.runtime.functional: every emitted form equals torch's whole op, forward and backward, on in-process ranks.
Knows the conventions of types (which gradients add up), not the rules that emit the forms.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from autopar.ir.mesh import Mesh
from autopar.runtime import functional as ap
from autopar.runtime.exact import exact
from autopar.runtime.inproc import run_ranks
from autopar.runtime.shards import take, total

TOL = 1e-12


def close(a, b, what):
    assert a.shape == b.shape, (what, a.shape, b.shape)
    torch.testing.assert_close(a, b, rtol=TOL, atol=TOL, equal_nan=True, msg=lambda m: f"{what}: {m}")


def check(mesh, whole, split, inputs, shards, *, partial=(), out_shards=(), add=()):
    """whole(*inputs) against split(axes, *local inputs). shards: per input its (dim, axis name) pairs. `add`: per input, the axes
    over which its gradients add up (type R there). partial: axes on which the result is P; out_shards: how the result is sharded."""
    xs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    torch.manual_seed(5)
    want = whole(*xs)
    up = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    (want * up).sum().backward()

    def rank(axes, r):
        def local(pairs):
            return tuple((d, axes[a]) for d, a in pairs)

        ins = [take(x.detach(), local(s)).clone().requires_grad_(x.is_floating_point()) for x, s in zip(inputs, shards, strict=True)]
        out = split(axes, *ins)
        (out * take(up, local(out_shards))).sum().backward()
        with torch.no_grad():
            close(total(out, [axes[a] for a in partial]), take(want, local(out_shards)), "result")
            for i, (x, y, s) in enumerate(zip(xs, ins, shards, strict=True)):
                if not x.requires_grad or x.grad is None:
                    continue
                g = y.grad if y.grad is not None else torch.zeros_like(y)
                g = total(g, [axes[a] for a in (add[i] if add else ())])
                close(g, take(x.grad, local(s)), f"gradient of input {i}")

    run_ranks(mesh, rank, seed=5)


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


MESHES = [Mesh((("a", 2),)), Mesh((("a", 4),)), Mesh((("a", 2), ("b", 2)))]
mesh_case = pytest.mark.parametrize("mesh", MESHES, ids=["2", "4", "2x2"])


def names(mesh):
    return tuple(a for a, _ in mesh.axes)


@mesh_case
@pytest.mark.parametrize("padding", [None, 0, 5, -1])
def test_vocab_embedding(mesh, padding):
    ids = torch.randint(0, 16, (3, 5))
    ids[0, :3] = torch.tensor([0, 5, 15])
    ax = names(mesh)
    check(
        mesh,
        lambda i, w: F.embedding(i, w, padding),
        lambda axes, i, w: ap.vocab_embedding(i, w, tuple(axes[a] for a in ax), padding),
        [ids, rand(16, 6)],
        [(), [(0, a) for a in ax]],
        partial=ax,
    )


def test_vocab_embedding_refuses_what_torch_refuses():
    def rank(axes, r):
        with pytest.raises(IndexError, match="17 is out of range for size 16"):
            ap.vocab_embedding(torch.tensor([3, 17]), rand(8, 2), axes["a"])

    run_ranks(MESHES[0], rank)


LOSS = list(itertools.product(["mean", "sum", "none"], [False, True], [0.0, 0.1], ["index", "ignored", "prob"]))


def loss_case(shape, reduction, weighted, smoothing, kind):
    torch.manual_seed(0)
    classes = shape[1]
    x = rand(*shape) * 3
    target = torch.randint(0, classes, (shape[0], *shape[2:]))
    if kind == "ignored":
        target[0] = -100
        target.view(-1)[-1] = -100
    if kind == "prob":
        target = rand(*shape).softmax(1)
    weight = rand(classes).abs() if weighted else None
    options = {"reduction": reduction, "label_smoothing": smoothing}
    return x, target, weight, options


@mesh_case
@pytest.mark.parametrize("case", LOSS, ids=str)
@pytest.mark.parametrize("shape", [(4, 8), (4, 8, 3)], ids=["2d", "3d"])
def test_cross_entropy_split_on_batch(mesh, case, shape):
    x, target, weight, options = loss_case(shape, *case)
    ax = names(mesh)
    rows = [(0, a) for a in ax]
    prob = target.is_floating_point()
    check(
        mesh,
        lambda x, t: F.cross_entropy(x, t, weight, **options),
        lambda axes, x, t: ap.cross_entropy(x, t, weight, **options, batch=tuple(axes[a] for a in ax)),
        [x, target],
        [rows, rows],
        partial=() if options["reduction"] == "none" else ax,
        out_shards=rows if options["reduction"] == "none" else (),
        add=((), ()) if prob else (),
    )


@mesh_case
@pytest.mark.parametrize("case", LOSS, ids=str)
@pytest.mark.parametrize("shape", [(4, 8), (4, 8, 3)], ids=["2d", "3d"])
def test_cross_entropy_split_on_classes(mesh, case, shape):
    x, target, weight, options = loss_case(shape, *case)
    ax = names(mesh)
    cols = [(1, a) for a in ax]
    prob = target.is_floating_point()
    w = [] if weight is None else [weight]
    check(
        mesh,
        lambda x, t, *w: F.cross_entropy(x, t, w[0].detach() if w else None, **options),
        lambda axes, x, t, *w: ap.cross_entropy(x, t, w[0].detach() if w else None, **options, classes=tuple(axes[a] for a in ax)),
        [x, target, *w],
        [cols, cols if prob else (), *([(0, a) for a in ax] for _ in w)],
    )


@pytest.mark.parametrize("case", LOSS, ids=str)
@pytest.mark.parametrize("order", ["rows first", "classes first"])
def test_cross_entropy_split_on_both(case, order):
    mesh = MESHES[2]
    x, target, weight, options = loss_case((4, 8, 3), *case)
    b, c = ("a", "b") if order == "rows first" else ("b", "a")
    prob = target.is_floating_point()
    w = [] if weight is None else [weight]
    none = options["reduction"] == "none"
    check(
        mesh,
        lambda x, t, *w: F.cross_entropy(x, t, w[0].detach() if w else None, **options),
        lambda axes, x, t, *w: ap.cross_entropy(x, t, w[0].detach() if w else None, **options, batch=axes[b], classes=axes[c]),
        [x, target, *w],
        [[(0, b), (1, c)], [(0, b), (1, c)] if prob else [(0, b)], *([(0, c)] for _ in w)],
        partial=() if none else (b,),
        out_shards=[(0, b)] if none else (),
    )


@mesh_case
def test_cross_entropy_of_masked_out_classes(mesh):
    x = rand(4, 8)
    x[:, :4] = float("-inf")
    x[1, 4:6] = float("-inf")
    target = torch.tensor([4, 6, 7, 5])
    ax = names(mesh)
    check(
        mesh,
        F.cross_entropy,
        lambda axes, x, t: ap.cross_entropy(x, t, classes=tuple(axes[a] for a in ax)),
        [x, target],
        [[(1, a) for a in ax], ()],
    )


def test_cross_entropy_with_nothing_to_count_is_nan_as_in_torch():
    target = torch.full((4,), -100)
    x = rand(4, 8)
    assert F.cross_entropy(x, target).isnan()

    def rank(axes, r):
        assert ap.cross_entropy(x[r * 2 : r * 2 + 2], target[:2], batch=axes["a"]).isnan()
        assert ap.cross_entropy(x[:, r * 4 : r * 4 + 4], target, classes=axes["a"]).isnan()

    run_ranks(MESHES[0], rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_cross_entropy_in_half_precision_returns_the_dtype_torch_returns(dtype, autocast):
    x, target = torch.randn(8, 16).to(dtype), torch.randint(0, 16, (8,))
    with torch.autocast("cpu", dtype, enabled=autocast):
        want = F.cross_entropy(x, target)

    def rank(axes, r):
        with torch.autocast("cpu", dtype, enabled=autocast):
            a = ap.cross_entropy(x[r * 4 : r * 4 + 4], target[r * 4 : r * 4 + 4], batch=axes["a"])
            b = ap.cross_entropy(x[:, r * 8 : r * 8 + 8], target, classes=axes["a"])
        assert a.dtype == b.dtype == want.dtype
        a = axes["a"].all_reduce(a)
        torch.testing.assert_close(a, want, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(b, want, rtol=1e-2, atol=1e-2)

    run_ranks(MESHES[0], rank)


def test_cross_entropy_split_on_batch_does_not_overflow_in_half_precision():
    x = torch.zeros(64, 4096, dtype=torch.float16)
    x[:, 0] = -2000
    target = torch.zeros(64, dtype=torch.long)
    assert F.cross_entropy(x, target, reduction="sum").isinf()

    def rank(axes, r):
        assert ap.cross_entropy(x[r * 32 : r * 32 + 32], target[:32], batch=axes["a"]).isfinite()

    run_ranks(MESHES[0], rank)


@mesh_case
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_nll_loss(mesh, reduction, weighted):
    x, target, weight, _ = loss_case((4, 8, 3), reduction, weighted, 0.0, "ignored")
    ax = names(mesh)
    rows = [(0, a) for a in ax]
    check(
        mesh,
        lambda x, t: F.nll_loss(x, t, weight, reduction=reduction),
        lambda axes, x, t: ap.nll_loss(x, t, weight, reduction=reduction, batch=tuple(axes[a] for a in ax)),
        [x.log_softmax(1), target],
        [rows, rows],
        partial=() if reduction == "none" else ax,
        out_shards=rows if reduction == "none" else (),
    )


@mesh_case
@pytest.mark.parametrize("fn", ["softmax", "log_softmax"])
def test_softmax(mesh, fn):
    ax = names(mesh)
    cols = [(1, a) for a in ax]
    check(
        mesh,
        lambda x: getattr(F, fn)(x, 1),
        lambda axes, x: getattr(ap, fn)(x, 1, tuple(axes[a] for a in ax)),
        [rand(3, 8, 2)],
        [cols],
        out_shards=cols,
    )


DROPOUTS = {
    "dropout": ((4, 8, 6), F.dropout),
    "dropout1d": ((4, 8, 6), F.dropout1d),
    "dropout1d-unbatched": ((4, 8), F.dropout1d),
    "dropout2d": ((4, 8, 6, 2), F.dropout2d),
    "dropout3d": ((4, 8, 6, 2, 2), F.dropout3d),
    "dropout3d-unbatched": ((4, 8, 6, 2), F.dropout3d),
    "alpha_dropout": ((4, 8, 6), F.alpha_dropout),
    "feature_alpha_dropout": ((4, 8, 6), F.feature_alpha_dropout),
}


@mesh_case
@pytest.mark.parametrize("name", DROPOUTS)
@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1), (1, 1)])
def test_dropout_in_exact_mode_equals_the_whole(mesh, name, dims):
    shape, fn = DROPOUTS[name]
    shards = list(zip(dims, names(mesh), strict=False))
    ours = getattr(ap, name.partition("-")[0])

    def whole(x):
        with exact():
            return fn(x, 0.3, True)

    def split(axes, x):
        with exact():
            return ours(x, 0.3, True, shards=tuple((d, axes[a]) for d, a in shards))

    check(mesh, whole, split, [rand(*shape)], [shards], out_shards=shards)


@pytest.mark.parametrize("name", DROPOUTS)
def test_exact_mode_keeps_the_distribution(name):
    shape, fn = DROPOUTS[name]
    x = torch.ones(shape[0] * 16, shape[1] * 16, *shape[2:], dtype=torch.float64)
    plain = fn(x, 0.3, True)
    with exact():
        ours = fn(x, 0.3, True)
    torch.testing.assert_close(plain.unique(), ours.unique(), rtol=TOL, atol=TOL)
    torch.testing.assert_close(plain.mean(), ours.mean(), rtol=0.2, atol=0.05)


def test_production_dropout_differs_between_shards_only():
    mesh = MESHES[2]
    x = torch.ones(64, dtype=torch.float64)

    def rank(axes, r):
        split = ap.dropout(x, 0.5, True, shards=((0, axes["a"]),))
        again = ap.dropout(x, 0.5, True, shards=((0, axes["a"]),))
        return split, again, ap.dropout(x, 0.5, True)

    got = run_ranks(mesh, rank, seed=5)
    assert torch.equal(got[0][0], got[1][0]) and torch.equal(got[2][0], got[3][0])  # the same shard
    assert not torch.equal(got[0][0], got[2][0])
    assert not torch.equal(got[0][0], got[0][1])  # a later draw
    assert all(torch.equal(got[0][2], g[2]) for g in got)


def test_groups_of_a_shard_are_drawn_where_they_lie():
    mesh = MESHES[0]
    x = rand(3, 12)
    torch.manual_seed(5)
    with exact():
        want = F.dropout(x, 0.3)

    def rank(axes, r):
        shards = ((1, axes["a"], 3),)
        with exact():
            assert torch.equal(ap.dropout(take(x, shards), 0.3, True, shards=shards), take(want, shards))

    run_ranks(mesh, rank, seed=5)


ATTENTION = {
    "plain": (4, 4, None, {}),
    "causal": (4, 4, None, {"is_causal": True}),
    "float mask": (4, 4, (2, 1, 5, 5), {}),
    "bool mask": (4, 4, "bool", {}),
    "grouped": (8, 4, None, {"enable_gqa": True, "scale": 0.3}),
}


@mesh_case
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_attention_in_exact_mode_equals_the_whole(mesh, name, p):
    hq, hkv, mask, options = ATTENTION[name]
    if mask == "bool":
        mask = torch.rand(2, 1, 5, 5) > 0.4
        mask[0, 0, 2] = False  # a row with nothing to attend to
    elif mask:
        mask = rand(*mask)
    shards = [(1, a) for a in names(mesh)]

    def whole(q, k, v):
        with exact():
            return F.scaled_dot_product_attention(q, k, v, mask, p, **options)

    def split(axes, q, k, v):
        with exact():
            return ap.scaled_dot_product_attention(q, k, v, mask, p, **options, shards=tuple((d, axes[a]) for d, a in shards))

    check(mesh, whole, split, [rand(2, hq, 5, 4), rand(2, hkv, 5, 4), rand(2, hkv, 5, 4)], [shards] * 3, out_shards=shards)


@pytest.mark.parametrize("name", ATTENTION)
def test_the_attention_formula_is_torchs(name):
    from autopar.runtime.functional_random import attention_math

    hq, hkv, mask, options = ATTENTION[name]
    mask = torch.rand(2, 1, 5, 5) > 0.4 if mask == "bool" else rand(*mask) if mask else None
    q, k, v = rand(2, hq, 5, 4), rand(2, hkv, 5, 4), rand(2, hkv, 5, 4)
    close(attention_math(q, k, v, mask, **options), F.scaled_dot_product_attention(q, k, v, mask, **options), name)
