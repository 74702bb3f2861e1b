"""Rules of reductions, scans, softmax and normalisations.
Must not know how partial results are added: a summed factor is marked '+'.
"""

from __future__ import annotations

from collections.abc import Sequence

from autopar.rules.case import Case, NoRule, divisor
from autopar.rules.recipe import Emitted, Recipe, Split
from autopar.rules.registry import rule


def reduced(c: Case, dims: Sequence[int] | None, mark: str, linear: bool = False) -> Recipe:
    """Dims (all if None) are reduced: '+' as a sum, '^' in another way."""
    shape, n = c.inputs[0].shape, len(c.inputs[0].shape)
    gone = range(n) if dims is None else dims
    row = [f"d{i}" + (mark if i in gone else "") for i in range(n)]
    keep = n > 0 and len(c.outputs[0].shape) == n and len(gone) > 0
    out = ["1" if i in gone else f"d{i}" for i in range(n) if keep or i not in gone]
    if len(out) != len(c.outputs[0].shape) or any(len(o.shape) != len(out) for o in c.outputs):
        raise NoRule(f"{shape} does not reduce to {c.outputs[0].shape}")
    return c.make({"input": " ".join(row)}, " ".join(out), linear=[("input",)] if linear else ())


DIMS = "input|self, dim|axis=None, keepdim|keepdims=False, dtype=None"


@rule("sum", args=DIMS)
def sum_(c: Case) -> Recipe:
    return reduced(c, c.dims("dim") or None, "+", linear=True)


@rule("mean", args=DIMS)
def mean(c: Case) -> Recipe:
    return reduced(c, c.dims("dim") or None, "+", linear=True)


@mean.local
def _(c: Case, recipe: Recipe, splits: tuple[Split, ...]) -> Emitted:
    by = 1
    for s in splits:
        by *= s.size if recipe.factors[recipe.parse(s.factor)[0]].reduce == "sum" else 1
    return c.emitted(divide=by)


@rule("var", "std", "var_mean", "std_mean", args="input|self, dim|axis=None, unbiased=None, keepdim|keepdims=False, ...")
def var(c: Case) -> Recipe:
    return reduced(c, None if isinstance(c["dim"], bool) else c.dims("dim") or None, "^")


@rule("amax", "amin", "aminmax", "prod", "nansum", "nanmean", "count_nonzero", args=DIMS)
def amax(c: Case) -> Recipe:
    return reduced(c, c.dims("dim") or None, "^")


@rule("all", "any", "argmax", "argmin", "logsumexp", "median", "nanmedian", "mode", args=DIMS)
def keep_reduced(c: Case) -> Recipe:
    return reduced(c, c.dims("dim"), "^")


@rule("max", "min", args="input|self, dim|axis|other=None, keepdim|keepdims=False")
def max_(c: Case) -> Recipe:
    if c.tensor("dim"):
        from autopar.rules.elementwise import broadcast

        return broadcast(c)
    return reduced(c, c.dims("dim"), "^")


@rule("norm", "linalg_norm", "linalg_vector_norm", args="input|self|x|A, p|ord=None, dim|axis=None, keepdim|keepdims=False, dtype=None")
def norm(c: Case) -> Recipe:
    return reduced(c, c.dims("dim") or None, "^")


def along(c: Case, dims: Sequence[int], linear: bool = False) -> Recipe:
    """The shape stays; nothing is split along dims."""
    row = " ".join(f"d{i}" + ("^" if i in dims else "") for i in range(len(c.inputs[0].shape)))
    return c.make({"input": row}, row, linear=[("input",)] if linear else ())


@rule("cumsum", args="input|self, dim|axis, dtype=None")
def cumsum(c: Case) -> Recipe:
    return along(c, (c.dim("dim"),), linear=True)


@rule("cumprod", "logcumsumexp", "cummax", "cummin", args="input|self, dim|axis, dtype=None")
def cumprod(c: Case) -> Recipe:
    return along(c, (c.dim("dim"),))


@rule("diff", args="input|self, n=1, dim=-1, ...")
def diff(c: Case) -> Recipe:
    d = c.dim("dim")
    rows = [" ".join(str(s) if i == d else f"d{i}" for i, s in enumerate(v.shape)) for v in (c.inputs[0], c.outputs[0])]
    return c.make({"input": rows[0]}, rows[1], linear=[("input",)])


@rule("softmax", "log_softmax", "softmin", args="input|self, dim=None, ...")
def softmax(c: Case) -> Recipe:
    return along(c, (c.dim("dim"),))


@rule("normalize", args="input, p=2.0, dim=1, eps=1e-12")
def normalize(c: Case) -> Recipe:
    return along(c, c.dims("dim"))


@rule("cosine_similarity", args="input|x1, x2, dim=1, eps=1e-8")
def cosine_similarity(c: Case) -> Recipe:
    d = c.dim("dim")
    if c.inputs[0].shape != c.inputs[1].shape:
        raise NoRule("broadcasting")
    row = [f"d{i}" + ("^" if i == d else "") for i in range(len(c.inputs[0].shape))]
    return c.make({"input": " ".join(row), "x2": " ".join(row)}, " ".join(row[:d] + row[d + 1 :]))


@rule("layer_norm", args="input, normalized_shape, weight=None, bias=None, eps=1e-5, ...")
def layer_norm(c: Case) -> Recipe:
    return normed(c, len(c["normalized_shape"]))


@rule("rms_norm", args="input, normalized_shape, weight=None, eps=None")
def rms_norm(c: Case) -> Recipe:
    return normed(c, len(c["normalized_shape"]), bias=False)


def normed(c: Case, last: int, bias: bool = True) -> Recipe:
    row = " ".join(f"n{i}^" for i in range(last))
    return c.make({"input": f"* {row}", "weight": row, **({"bias": row} if bias else {})}, f"* {row}")


@rule("group_norm", args="input, num_groups, weight=None, bias=None, eps=1e-5, ...")
def group_norm(c: Case) -> Recipe:
    groups = c.number("num_groups")
    rest = " ".join(f"x{i}^" for i in range(len(c.inputs[0].shape) - 2))
    channels = "(g c^)"
    terms = {"input": f"b {channels} {rest}", "weight": channels, "bias": channels}
    return c.make(terms, f"b {channels} {rest}", sizes={"g": groups})


@group_norm.local
def _(c: Case, recipe: Recipe, splits: tuple[Split, ...]) -> Emitted:
    return c.emitted(num_groups=c.scaled(c["num_groups"], divisor(recipe, splits, recipe.outputs[0], 1)))
