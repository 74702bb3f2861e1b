"""Canonical op names: 'torch.Tensor.add_', 'torch.add', 'operator.add' are all 'add'.
Must not know what the ops do.
"""

from __future__ import annotations

from functools import lru_cache

DUNDERS = {
    **{f"__{p}{n}__": n for n in ("add", "mul") for p in ("", "r", "i")},
    **{f"__{p}{n}__": f"bitwise_{n}" for n in ("and", "or", "xor") for p in ("", "r", "i")},
    **{f"__{p}{n}__": c for n, c in (("sub", "sub"), ("matmul", "matmul"), ("pow", "pow"), ("mod", "remainder")) for p in ("", "i")},
    **{f"__{p}{n}__": "div" for n in ("truediv", "div") for p in ("", "i")},
    **{f"__{p}floordiv__": "floor_divide" for p in ("", "i")},
    "__rsub__": "rsub",
    "__rtruediv__": "rdiv",
    "__rdiv__": "rdiv",
    "__rpow__": "rpow",
    "__rmod__": "rremainder",
    "__rfloordiv__": "rfloor_divide",
    "__rmatmul__": "rmatmul",
    "__lshift__": "bitwise_left_shift",
    "__rshift__": "bitwise_right_shift",
    "__invert__": "bitwise_not",
    "__neg__": "neg",
    "__pos__": "positive",
    "__abs__": "abs",
    "__getitem__": "getitem",
    "__setitem__": "setitem",
    "__len__": "len",
    **{f"__{n}__": n for n in ("eq", "ne", "lt", "le", "gt", "ge")},
}

OPERATORS = {
    "truediv": "div",
    "itruediv": "div",
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "ipow": "pow",
    "imatmul": "matmul",
    "floordiv": "floor_divide",
    "ifloordiv": "floor_divide",
    "mod": "remainder",
    "imod": "remainder",
    "and_": "bitwise_and",
    "or_": "bitwise_or",
    "xor": "bitwise_xor",
    "iand": "bitwise_and",
    "ior": "bitwise_or",
    "ixor": "bitwise_xor",
    "inv": "bitwise_not",
    "invert": "bitwise_not",
    "pos": "positive",
}

CASTS = ("float", "double", "half", "bfloat16", "long", "int", "short", "char", "byte", "bool", "type", "cpu", "cuda", "cfloat", "cdouble")

ALIASES = {
    **dict.fromkeys(CASTS, "to"),
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "expit": "sigmoid",
    "ger": "outer",
    "fix": "trunc",
    "ravel": "flatten",
    "grouped_mm": "_grouped_mm",
    **{f"arc{f}": f"a{f}" for f in ("cos", "sin", "tan", "cosh", "sinh", "tanh", "tan2")},
}


@lru_cache(maxsize=8192)
def canonical(fn: str) -> str:
    """The rule name of a qualified op name. Functions outside torch ('pkg.mod:f', 'apply:...') keep their own."""
    if fn.startswith("torch.ops."):  # 'torch.ops.namespace.name.overload'
        return ".".join(fn.split(".")[:4])
    if ":" in fn or fn.startswith("ap."):
        return fn
    head, _, last = fn.removesuffix(".__get__").rpartition(".")
    if head == "operator":
        return OPERATORS.get(last, last)
    if last in DUNDERS:
        return DUNDERS[last]
    if last.endswith("_") and not last.startswith("__"):
        last = last[:-1]
    group = head.removeprefix("torch.")
    if group in ("linalg", "fft"):
        return f"{group}_{last}"
    return ALIASES.get(last, last)
