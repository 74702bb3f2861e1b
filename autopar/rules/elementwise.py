"""Rules of elementwise ops with broadcasting: arithmetic, comparisons, casts, copies, where, clamp.
Must not know how shards are held: only which output dim each input dim lines up with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from autopar.rules.case import Case, NoRule
from autopar.rules.recipe import Factor, Recipe
from autopar.rules.registry import rule


def broadcast(c: Case, linear: Iterable[Iterable[str | int]] = (), unpartitioned: Iterable[int] = ()) -> Recipe:
    """Every tensor input lines up with the output from the right; those in `unpartitioned` are left out ('?')."""
    out = c.outputs[0].shape
    if any(o.shape != out for o in c.outputs):
        return c.unsplit()
    n = len(out)
    factors = {f"d{i}": Factor(f"d{i}", s, True) for i, s in enumerate(out) if s != 1}
    ins: list[Any] = []
    for at, v in enumerate(c.inputs):
        if at in unpartitioned:
            ins.append(None)
            continue
        first, dims = n - len(v.shape), []
        for i, s in enumerate(v.shape):
            if s != 1 and (first + i < 0 or out[first + i] != s):
                raise NoRule(f"{v.shape} does not broadcast to {out}")
            dims.append((f"d{first + i}",) if s != 1 else ())
        ins.append(tuple(dims))
    outs = (tuple((f"d{i}",) if s != 1 else () for i, s in enumerate(out)),) * len(c.outputs)
    return Recipe(tuple(ins), outs, factors, c.groups(linear))


def is_zero(x: Any) -> bool:
    return isinstance(x, (int, float)) and x == 0


NONLINEAR = """
abs acos acosh asin asinh atan atanh ceil floor round trunc frac exp exp2 expm1 log log10 log1p log2 sqrt rsqrt square
reciprocal sin sinh sinc cos cosh tan tanh sigmoid logsigmoid relu relu6 gelu silu mish elu selu celu leaky_relu hardtanh
hardswish hardsigmoid softplus softsign tanhshrink softshrink hardshrink threshold erf erfc erfinv lgamma digamma sign sgn
isnan isinf isfinite isposinf isneginf logical_not bitwise_not nan_to_num angle logit i0 signbit
pow rpow floor_divide rfloor_divide remainder rremainder fmod maximum minimum fmax fmin atan2 hypot logaddexp logaddexp2 copysign
xlogy eq ne lt le gt ge isclose logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor bitwise_left_shift
bitwise_right_shift clamp clamp_min clamp_max heaviside
""".split()  # noqa: SIM905


@rule(*NONLINEAR)
def nonlinear(c: Case) -> Recipe:
    return broadcast(c)


# NB: real and imag of a complex value are linear over the reals, which is all that adding addends needs.
LINEAR = "neg positive clone contiguous detach data conj conj_physical resolve_conj real imag deg2rad rad2deg zeros_like".split()  # noqa: SIM905


@rule(*LINEAR)
def linear(c: Case) -> Recipe:
    return broadcast(c, linear=[(0,)])


@rule("add", "sub", "rsub", args="input|self, other, alpha=1")
def add(c: Case) -> Recipe:
    both = len(c.inputs) == 2
    # NB: a scalar addend would be added once per rank.
    alone = len(c.inputs) == 1 and (is_zero(c["other"]) or is_zero(c["input"]))
    return broadcast(c, linear=[(0, 1)] if both else [(0,)] if alone else [])


@rule("mul")
def mul(c: Case) -> Recipe:
    return broadcast(c, linear=[(i,) for i in range(len(c.inputs))])


@rule("div", args="input|self, other, rounding_mode=None")
def div(c: Case) -> Recipe:
    return broadcast(c, linear=[("input",)] if c["rounding_mode"] is None else [])


@rule("rdiv")  # other / tensor
def rdiv(c: Case) -> Recipe:
    return broadcast(c)


@rule("to", args="input|self, ...")
def to(c: Case) -> Recipe:
    return broadcast(c, linear=[("input",)], unpartitioned=range(1, len(c.inputs)))


@rule("type_as", args="input|self, other")
def type_as(c: Case) -> Recipe:
    return broadcast(c, linear=[("input",)], unpartitioned=(1,))


@rule("copy", args="input|self, src|other, ...")
def copy(c: Case) -> Recipe:
    return broadcast(c, linear=[("input", "src")])


@rule("where", args="condition, input, other|self")
def where(c: Case) -> Recipe:
    used = [n for n in ("input", "other") if c.tensor(n)]
    pure = all(c.tensor(n) or is_zero(c[n]) for n in ("input", "other"))
    return broadcast(c, linear=[used] if pure else [])


@rule("masked_fill", args="input|self, mask, value")
def masked_fill(c: Case) -> Recipe:
    if c.tensor("value"):
        return broadcast(c, linear=[("input", "value")])
    return broadcast(c, linear=[("input",)] if is_zero(c["value"]) else [])


@rule("autopar:select_training", args="in_training, otherwise")
def select_training(c: Case) -> Recipe:
    return broadcast(c, linear=[("in_training", "otherwise")])  # one of the two, by the module's mode


@rule("lerp", args="input|self, end, weight")
def lerp(c: Case) -> Recipe:
    return broadcast(c, linear=[("input", "end")])


@rule("addcmul", args="input|self, tensor1, tensor2, value=1")
def addcmul(c: Case) -> Recipe:
    return broadcast(c, linear=[("input", "tensor1"), ("input", "tensor2")])


@rule("addcdiv", args="input|self, tensor1, tensor2, value=1")
def addcdiv(c: Case) -> Recipe:
    return broadcast(c, linear=[("input", "tensor1")])


@rule("complex")
def complex_(c: Case) -> Recipe:
    return broadcast(c, linear=[(0, 1)])


@rule("polar")
def polar(c: Case) -> Recipe:
    return broadcast(c)  # NB: linear in abs, but torch's backward takes abs for positive, and addends are not


@rule("view_as_complex", args="input")
def view_as_complex(c: Case) -> Recipe:
    return c.make({"input": "* 2"}, "*", linear=[("input",)])


@rule("view_as_real", args="input")
def view_as_real(c: Case) -> Recipe:
    return c.make({"input": "*"}, "* 2", linear=[("input",)])


@rule("prelu", args="input, weight")
def prelu(c: Case) -> Recipe:
    x, w = c.inputs
    if len(x.shape) < 2 or w.shape[0] == 1:
        return c.make({"input": "*", "weight": " ".join("1" for _ in w.shape)}, "*")
    rest = " ".join(f"d{i}" for i in range(2, len(x.shape)))
    return c.make({"input": f"b c {rest}", "weight": "c"}, f"b c {rest}")


@rule("glu", args="input, dim=-1")
def glu(c: Case) -> Recipe:
    d = c.dim("dim")
    names = [f"d{i}" for i in range(len(c.inputs[0].shape))]
    whole, half = ([*names[:d], str(v.shape[d]), *names[d + 1 :]] for v in (c.inputs[0], c.outputs[0]))
    return c.make({"input": " ".join(whole)}, " ".join(half))
