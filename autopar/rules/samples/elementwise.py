"""Sample calls of rules/elementwise.py.
Must not know how the ops are split.
"""

import torch

from autopar.rules.samples import Sample, Scalar, T

X, Y = T(8, 12, 4), T(8, 12, 4)
POS = T(8, 12, values="positive")
UNIT = T(8, 12, values="unit")
FLAGS, INTS = T(8, 12, values="bool"), T(8, 12, values=7)
F = "torch.nn.functional."

FREE = "sin cos tan tanh sinh cosh asinh atan exp exp2 expm1 sigmoid relu square abs erf erfc sign sgn sinc isnan isinf isfinite isposinf"
FREE += " isneginf ceil floor round trunc frac signbit deg2rad rad2deg neg positive nan_to_num clone detach angle conj"
FREE += " conj_physical resolve_conj zeros_like i0"
POSITIVE = "log log10 log1p log2 sqrt rsqrt reciprocal lgamma digamma"
ACTIVATIONS = "gelu silu mish elu selu celu leaky_relu hardtanh hardswish hardsigmoid softplus softsign tanhshrink softshrink hardshrink"
ACTIVATIONS += " relu6 logsigmoid"
TWO = "maximum minimum fmax fmin atan2 hypot logaddexp logaddexp2 copysign fmod remainder eq ne lt le gt ge isclose"
LOGIC = "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor"

SAMPLES = [
    *(Sample(f"torch.{n}", T(8, 12), splits="d0 d1") for n in FREE.split()),
    *(Sample(f"torch.{n}", POS, splits="d0 d1") for n in POSITIVE.split()),
    *(Sample(f"torch.{n}", UNIT, splits="d0 d1") for n in ("acos", "asin", "atanh", "erfinv")),
    Sample("torch.acosh", T(8, 12, values="above")),
    *(Sample(F + n, T(8, 12), splits="d0 d1") for n in ACTIVATIONS.split()),
    *(Sample(f"torch.{n}", T(8, 12), T(12), splits="d0 d1") for n in TWO.split()),
    *(Sample(f"torch.{n}", FLAGS, T(12, values="bool"), splits="d0 d1") for n in LOGIC.split()),
    Sample("torch.heaviside", T(8, 12), T(12), grad=False),
    Sample("torch.xlogy", POS, T(12, values="positive")),
    Sample("torch.logit", T(8, 12, values="positive"), 1e-6),
    Sample(F + "threshold", T(8, 12), 0.1, 2.0),
    Sample(F + "relu", T(8, 12), inplace=True, splits="d0 d1"),
    Sample("torch.logical_not", FLAGS),
    Sample("torch.Tensor.__invert__", FLAGS),
    Sample("torch.bitwise_left_shift", INTS, 2),
    Sample("torch.bitwise_right_shift", INTS, 1),
    Sample("torch.Tensor.contiguous", T(8, 12)),
    Sample("torch.Tensor.data.__get__", T(8, 12)),
    Sample("torch.real", T(8, 12, values="complex")),
    Sample("torch.imag", T(8, 12, values="complex")),
    Sample("torch.resolve_conj", T(8, 12, values="complex")),
    # broadcasting
    Sample("torch.add", X, Y, splits="d0 d1 d2"),
    Sample("torch.add", X, T(12, 1), splits="d0 d1 d2"),
    Sample("torch.add", T(8, 1, 4), T(12, 1), splits="d0 d1 d2"),
    Sample("torch.add", X, T(), alpha=2),
    Sample("torch.add", X, 3.0),
    Sample("torch.add", X, 0),
    Sample("torch.add", X, T(4, values=5)),
    Sample("torch.add", input=X, other=Y),
    Sample("torch.Tensor.__radd__", X, 2),
    Sample("torch.Tensor.add_", X, T(12, 4), alpha=0.5, splits="d0 d1 d2"),
    Sample("torch.Tensor.__iadd__", X, 1.0),
    Sample("operator.add", X, Y),
    Sample("torch.sub", X, T(4)),
    Sample("torch.Tensor.__rsub__", X, 1.0),
    Sample("torch.rsub", X, Y),
    Sample("torch.Tensor.sub_", X, T(1, 12, 1)),
    Sample("torch.mul", X, T(8, 1, 4)),
    Sample("torch.mul", X, T()),
    Sample("torch.mul", X, -2.5),
    Sample("torch.mul", X, Scalar(3)),
    Sample("torch.mul", X, T(12, 4, values=5)),
    Sample("torch.mul", X, T(8, 12, 4, values="complex")),
    Sample("torch.Tensor.mul_", X, T(4)),
    Sample("torch.div", X, T(8, 12, 4, values="positive")),
    Sample("torch.div", X, 3),
    Sample("torch.div", X, T(4, values="positive"), rounding_mode="floor"),
    Sample("torch.div", T(8, 12, values=9), T(12, values="positive")),
    Sample("torch.Tensor.div_", X, 2.0),
    Sample("torch.Tensor.__rtruediv__", POS, 1.0),
    Sample("torch.Tensor.__rdiv__", POS, 2),
    Sample("torch.Tensor.__rfloordiv__", POS, 3.3, grad=False),
    Sample("torch.Tensor.__rmod__", POS, 7.1, grad=False),
    Sample("torch.floor_divide", INTS, 3),
    Sample("torch.floor_divide", POS, T(12), grad=False, splits="d0 d1"),
    Sample("torch.remainder", INTS, 3),
    Sample("torch.pow", POS, 3),
    Sample("torch.pow", POS, T(12)),
    Sample("torch.Tensor.__rpow__", T(8, 12), 2.0),
    Sample("torch.Tensor.pow_", POS, 2),
    Sample("torch.clamp", T(8, 12), -0.5, 0.5),
    Sample("torch.clamp", T(8, 12), min=T(12), max=T()),
    Sample("torch.clamp_min", T(8, 12), 0.0),
    Sample("torch.clamp_max", T(8, 12), 0.0),
    Sample("torch.Tensor.clamp_", T(8, 12), 0.0),
    # casts and copies
    Sample("torch.Tensor.to", T(8, 12), torch.float64),
    Sample("torch.Tensor.to", T(8, 12, values=5), dtype=torch.float64),
    Sample("torch.Tensor.to", T(8, 12), T(3)),
    Sample("torch.Tensor.double", T(8, 12, values=9)),
    Sample("torch.Tensor.bool", T(8, 12, values=2)),
    Sample("torch.Tensor.long", T(8, 12)),
    Sample("torch.Tensor.to", T(8, 12), torch.complex128),
    Sample("torch.Tensor.type", T(8, 12), torch.float64),
    Sample("torch.Tensor.type_as", T(8, 12), T(3, 5), splits="d0 d1"),
    Sample("torch.Tensor.copy_", T(8, 12), T(12)),
    # selections and mixtures
    Sample("torch.where", FLAGS, T(8, 12), T(12)),
    Sample("torch.where", T(12, values="bool"), T(8, 1), 0.0),
    Sample("torch.where", FLAGS, 1.0, T(8, 12)),
    Sample("torch.Tensor.where", T(8, 12), FLAGS, T(1, 12)),
    Sample("torch.masked_fill", T(8, 12), T(12, values="bool"), 0.0),
    Sample("torch.masked_fill", T(8, 12), FLAGS, -1e4),
    Sample("torch.masked_fill", T(8, 1), FLAGS, T()),
    Sample("torch.Tensor.masked_fill_", T(8, 12), FLAGS, 0),
    Sample("autopar:select_training", T(8, 12), T(8, 12), splits="d0 d1"),
    Sample("torch.lerp", T(8, 12), T(12), T(8, 1)),
    Sample("torch.lerp", T(8, 12), T(8, 12), 0.3),
    Sample("torch.addcmul", T(12), T(8, 12), T(8, 1), value=0.5),
    Sample("torch.addcdiv", T(8, 12), T(12), T(8, 12, values="positive")),
    Sample("torch.complex", T(8, 12), T(8, 12)),
    Sample("torch.polar", POS, T(8, 12)),
    Sample("torch.view_as_complex", T(8, 12, 2), splits="*0 *1"),
    Sample("torch.view_as_real", T(8, 12, values="complex"), splits="*0 *1"),
    Sample(F + "prelu", T(8, 12, 4), T(12), splits="b c d2"),
    Sample(F + "prelu", T(8, 12), T(1)),
    Sample(F + "glu", T(8, 12, 16), dim=1, splits="d0 d2"),
]
