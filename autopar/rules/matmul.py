"""Rules of matrix products: linear, matmul, mm, bmm, addmm, baddbmm, einsum, dot, outer, grouped products.
Must not know how a contraction is reduced: the contracted factor is marked '+'.
"""

from __future__ import annotations

from math import prod

from autopar.rules.case import Case, NoRule
from autopar.rules.recipe import Recipe
from autopar.rules.registry import rule


@rule("linear", args="input, weight, bias=None")
def linear(c: Case) -> Recipe:
    x, w = c.tensor("input"), c.tensor("weight")
    n = "n" if len(w.shape) == 2 else ""
    return c.make(
        {"input": "* k+", "weight": f"{n} k+", "bias": n},
        f"* {n}",
        linear=[("input", "bias"), ("weight", "bias")],
        partial_bias=["bias"],
        flops=2.0 * prod(x.shape[:-1]) * prod(w.shape),
        matmul=True,
    )


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", args="input|self, other|tensor2|mat2|vec")
def matmul(c: Case) -> Recipe:
    if c.name == "inner" and max(len(v.shape) for v in c.inputs) > 1:
        raise NoRule("inner of matrices")
    return _product(c, "input", "other")


@rule("rmatmul", args="input|self, other")  # other @ tensor
def rmatmul(c: Case) -> Recipe:
    return _product(c, "other", "input")


def _product(c: Case, left: str, right: str) -> Recipe:
    a, b, out = c.tensor(left).shape, c.tensor(right).shape, c.outputs[0].shape
    m, n = ["m"] if len(a) > 1 else [], ["n"] if len(b) > 1 else []
    batch = out[: len(out) - len(m) - len(n)]
    rows = []
    for shape, tail in ((a, [*m, "k+"]), (b, ["k+", *n])):
        lead = shape[: len(shape) - len(tail)]
        skip = len(batch) - len(lead)
        rows.append(" ".join([*("1" if s == 1 else f"b{skip + i}" for i, s in enumerate(lead)), *tail]))
    left_out = " ".join([*("1" if s == 1 else f"b{i}" for i, s in enumerate(batch)), *m, *n])
    return c.make({left: rows[0], right: rows[1]}, left_out, linear=[(left,), (right,)], flops=2.0 * prod(out) * a[-1], matmul=True)


@rule("addmm", args="input|self, mat1, mat2, beta=1, alpha=1")
def addmm(c: Case) -> Recipe:
    return _with_addend(c, "mat1", "mat2", "")


@rule("baddbmm", args="input|self, batch1, batch2, beta=1, alpha=1")
def baddbmm(c: Case) -> Recipe:
    return _with_addend(c, "batch1", "batch2", "b ")


@rule("addmv", args="input|self, mat, vec, beta=1, alpha=1")
def addmv(c: Case) -> Recipe:
    return c.make(
        {"input": _aligned(c.tensor("input").shape, ["m"]), "mat": "m k+", "vec": "k+"},
        "m",
        linear=[("input", "mat"), ("input", "vec")],
        partial_bias=["input"],
        flops=2.0 * prod(c.tensor("mat").shape),
        matmul=True,
    )


def _aligned(shape: tuple[int, ...], names: list[str]) -> str:
    """A tensor that broadcasts to dims of these names."""
    return " ".join("1" if s == 1 else n for s, n in zip(shape, names[len(names) - len(shape) :], strict=True))


def _with_addend(c: Case, left: str, right: str, batch: str) -> Recipe:
    names = f"{batch}m n".split()
    return c.make(
        {"input": _aligned(c.tensor("input").shape, names), left: f"{batch}m k+", right: f"{batch}k+ n"},
        f"{batch}m n",
        linear=[("input", left), ("input", right)],
        partial_bias=["input"],
        flops=2.0 * prod(c.outputs[0].shape) * c.tensor(left).shape[-1],
        matmul=True,
    )


@rule("outer", args="input|self, vec2|other")
def outer(c: Case) -> Recipe:
    return c.make({"input": "m", "vec2": "n"}, "m n", linear=[("input",), ("vec2",)])


@rule("einsum", args="equation, *operands")
def einsum(c: Case) -> Recipe:
    eq = c["equation"]
    if not isinstance(eq, str):
        raise NoRule("einsum with sublists")
    left, arrow, right = eq.replace(" ", "").partition("->")
    parts = left.split(",")
    if not arrow:
        letters = sorted(x for x in set(left) - set(",.") if left.count(x) == 1)
        right = ("..." if "..." in left else "") + "".join(letters)
    rank = len(c.outputs[0].shape) - len(right.replace("...", ""))  # NB: '...' may cover fewer dims in some operands
    terms, sizes = [], {}
    for part, v in zip(parts, c.inputs, strict=True):
        head, dots, tail = part.partition("...")
        hidden = len(v.shape) - len(head) - len(tail)
        if (hidden > rank and "..." in right) or (dots and "..." not in right and hidden):
            raise NoRule("'...' is summed")
        names = [*head, *(f"e{rank - hidden + i}" for i in range(hidden)), *tail]
        row = []
        for n, s in zip(names, v.shape, strict=True):
            mark = "^" if names.count(n) > 1 else "" if n in right or (n[0] == "e" and len(n) > 1) else "+"
            row.append("1" if s == 1 else n + mark)
            sizes[n] = max(s, sizes.get(n, 1))
        terms.append(" ".join(row))
    head, _, tail = right.partition("...")
    names = [*head, *(f"e{i}" for i in range(rank)), *tail]
    out = " ".join("1" if s == 1 else n for n, s in zip(names, c.outputs[0].shape, strict=True))
    groups = [(i,) for i in range(len(c.inputs))]
    flops = float(len(c.inputs) * prod(sizes.values()))
    return c.make({"operands": terms}, out, linear=groups, flops=flops, matmul=len(c.inputs) > 1)


@rule("_grouped_mm", args="input|self|mat_a, mat2|mat_b, offs=None, bias=None, out_dtype=None")
def grouped_mm(c: Case) -> Recipe:
    a, b = c.tensor("input"), c.tensor("mat2")
    if c["bias"] is not None:
        raise NoRule("bias")
    # NB: the kernel wants rows aligned to 16 bytes, so k and n are split in whole multiples of that only.
    whole = 16 // {"float64": 8, "float32": 4}.get(a.dtype, 2)
    wide = {}
    for name, size in (("k", a.shape[-1]), ("n", b.shape[-1])):
        wide[name] = f"({name}{'+' if name == 'k' else ''} {name}_{whole}^)" if size % whole == 0 else f"{name}^"
    sizes = {f"{n}_{whole}": whole for n in ("k", "n")}
    k, n = wide["k"], wide["n"]
    if c.outputs[0].shape[-1] != b.shape[-1]:
        raise NoRule("an unknown form")
    rows = {(2, 3): (f"t^ {k}", f"g^ {k} {n}", f"t^ {n}"), (3, 3): (f"g m {k}", f"g {k} {n}", f"g m {n}"), (2, 2): (None,) * 3}
    left, right, out = rows.get((len(a.shape), len(b.shape)), (None,) * 3)
    if left is None:
        return c.unsplit()
    tokens = a.shape[-2] if len(a.shape) == 2 else a.shape[0] * a.shape[1]
    return c.make(
        {"input": left, "mat2": right, "offs": "?"},
        out,
        sizes=sizes,
        linear=[("input",), ("mat2",)],
        flops=2.0 * tokens * a.shape[-1] * b.shape[-1],
        matmul=True,
    )
