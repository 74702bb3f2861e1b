"""Printing of calls, literals and long lines, as tables.
Must not need a trace.
"""

from __future__ import annotations

import math

import pytest
import torch

from autopar.codegen.expr import Imports, Printer, attribute, string
from autopar.codegen.layout import Stmt, print_body
from autopar.codegen.names import identifier
from autopar.ir.graph import AxisRef, Global, Ref, Source, Struct
from autopar.rules.recipe import Scaled, TrainingOnly

T, F = "torch.Tensor.", "torch.nn.functional."
x, y, n = Ref(0), Ref(1), Ref(2)


def printer() -> Printer:
    return Printer(Imports(), lambda v: "xyn"[v], lambda axis: f"self.{axis}")


CALLS = [
    (T + "add", (x, y), {}, "x + y"),
    (T + "add", (x, y), {"alpha": 2}, "x.add(y, alpha=2)"),
    (T + "__radd__", (x, 1), {}, "1 + x"),
    (T + "__rsub__", (x, 1.5), {}, "1.5 - x"),
    (T + "__rtruediv__", (x, 1), {}, "1 / x"),
    (T + "mul", (x, -1), {}, "x * -1"),
    (T + "pow", (x, 2), {}, "x ** 2"),
    (T + "pow", (x, -2), {}, "x ** -2"),
    (T + "__rpow__", (x, -2), {}, "(-2) ** x"),
    (T + "div", (x, y), {"rounding_mode": "floor"}, 'x.div(y, rounding_mode="floor")'),
    (T + "__floordiv__", (x, 2), {}, "x // 2"),
    (T + "floor_divide", (x, 2), {}, "x.floor_divide(2)"),
    (T + "matmul", (x, y), {}, "x @ y"),
    (T + "__and__", (x, y), {}, "x & y"),
    (T + "logical_and", (x, y), {}, "x.logical_and(y)"),
    (T + "__invert__", (x,), {}, "~x"),
    (T + "neg", (x,), {}, "-x"),
    (T + "le", (x, 0), {}, "x <= 0"),
    (T + "eq", (x, y), {}, "x == y"),
    (T + "float", (x,), {}, "x.float()"),
    (T + "view", (x, n, -1, 16), {}, "x.view(n, -1, 16)"),
    (T + "view", (x, (n, Scaled(n, 2))), {}, "x.view((n, n // 2))"),
    (T + "__getitem__", (x, 0), {}, "x[0]"),
    (T + "__getitem__", (x, (slice(None), slice(1, None))), {}, "x[:, 1:]"),
    (T + "__getitem__", (x, (Ellipsis, slice(None, n, 2))), {}, "x[..., :n:2]"),
    (T + "__getitem__", (x, (None, slice(None), y)), {}, "x[None, :, y]"),
    (T + "__getitem__", (x, (0,)), {}, "x[0,]"),
    (T + "__getitem__", (x, ()), {}, "x[()]"),
    (T + "__getitem__", (x, slice(-3, None)), {}, "x[-3:]"),
    (T + "__setitem__", (x, (slice(None), 0), y), {}, "x[:, 0] = y"),
    (T + "__iadd__", (x, y), {}, "x += y"),
    (T + "add_", (x, y), {}, "x.add_(y)"),
    (T + "T.__get__", (x,), {}, "x.T"),
    (T + "data.__set__", (x, y), {}, "x.data = y"),
    (T + "__len__", (x,), {}, "len(x)"),
    ("torch.add", (x, y), {}, "torch.add(x, y)"),
    ("torch.cat", ([x, y],), {"dim": -1}, "torch.cat([x, y], dim=-1)"),
    ("torch.full", ((), float("-inf")), {"dtype": torch.bfloat16}, 'torch.full((), float("-inf"), dtype=torch.bfloat16)'),
    ("torch.zeros", (n,), {"device": Global("autopar:device")}, "torch.zeros(n, device=self.device)"),
    ("torch.zeros", ((n,),), {"device": torch.device("cpu")}, 'torch.zeros((n,), device=torch.device("cpu"))'),
    (T + "contiguous", (x,), {"memory_format": torch.channels_last}, "x.contiguous(memory_format=torch.channels_last)"),
    ("torch._C._nn.gelu", (x,), {}, "torch._C._nn.gelu(x)"),
    (F + "linear", (x, y), {}, "F.linear(x, y)"),
    (F + "dropout", (x, 0.1, Global("autopar:training")), {}, "F.dropout(x, 0.1, self.training)"),
    (F + "dropout", (x, 0.1), {"training": TrainingOnly(True, False)}, "F.dropout(x, 0.1, training=self.training)"),
    (F + "scaled_dot_product_attention", (x, x, y), {"dropout_p": TrainingOnly(0.1, 0.0)},
     "F.scaled_dot_product_attention(x, x, y, dropout_p=0.1 if self.training else 0.0)"),
    (T + "mul", (x, TrainingOnly(2, 1)), {}, "x * (2 if self.training else 1)"),
    ("ap.vocab_embedding", (x, y, AxisRef("tp")), {}, "ap.vocab_embedding(x, y, self.tp)"),
    ("torch.ops.my.op.default", (x,), {}, "torch.ops.my.op.default(x)"),
    ("pkg.mod:func", (x, "a'b"), {"k": [1, None]}, "func(x, \"a'b\", k=[1, None])"),
    ("apply:pkg.mod:Gelu", (x,), {}, "Gelu.apply(x)"),
    ("pkg.mod:Outer.method", (x,), {}, "Outer.method(x)"),
    ("operator.add", (n, 1), {}, "n + 1"),
    ("operator.floordiv", (Scaled(n, 2), 2), {}, "n // 2 // 2"),
    ("operator.sub", (1, Scaled(n, 2)), {}, "1 - n // 2"),
    ("operator.neg", (n,), {}, "-n"),
    ("math.floor", (n,), {}, "math.floor(n)"),
    ("builtins.round", (n,), {}, "round(n)"),
    ("autopar:set_buffer", ("a.0.buf", x), {}, "self.a[0].buf = x"),
    ("torch.einsum", ("b i, b j -> b i j", x, y), {}, 'torch.einsum("b i, b j -> b i j", x, y)'),
    ("torch.where", (x, float("nan"), -0.0), {}, 'torch.where(x, float("nan"), -0.0)'),
    ("pkg:f", (x,), {"class": 1}, 'f(x, **{"class": 1})'),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "args", "kwargs", "text"), CALLS, ids=[c[3] for c in CALLS])
def test_calls(fn, args, kwargs, text):
    code = printer().call(fn, args, kwargs)
    assert code.text == text
    compile(code.text, "generated", "exec")


def test_operators_keep_their_grouping():
    """Every pair of operators, nested to either side through a literal conditional or Scaled, evaluates as the call does."""
    p = printer()
    for outer in ("add", "sub", "mul", "floordiv", "pow", "mod"):
        for inner in (Scaled(n, 2), TrainingOnly(3, 4), -5):
            for args in ((inner, n), (n, inner)):
                code = p.call(f"operator.{outer}", args, {})
                env = {"n": 6, "self": type("Self", (), {"training": True})}
                value = lambda a: 6 if a is n else 3 if a is not n and not isinstance(a, int) else a  # noqa: E731
                assert eval(code.text, env) == pytest.approx(getattr(__import__("operator"), outer)(*map(value, args))), code.text


@pytest.mark.parametrize(
    "value",
    [0.1, -1e-5, float("inf"), 1 + 2j, (1,), {"a": (1, [2])}, slice(1, None), True, "q\"'\n", range(3), {1, 2}, None],
)  # fmt: skip
def test_literals_read_back(value):
    assert eval(printer().code(value).text, {"torch": torch}) == value


@pytest.mark.parametrize("value", [torch.float32, torch.strided, torch.preserve_format, torch.device("cuda", 1)])
def test_torch_literals_read_back(value):
    assert eval(printer().code(value).text, {"torch": torch}) == value


def test_nan_reads_back():
    assert math.isnan(eval(printer().code(math.nan).text))


def test_struct():
    code = printer().code(Struct("pkg.mod:Output", ("loss", "logits"), (x, (y, None))))
    assert code.text == 'ap.struct("pkg.mod:Output", loss=x, logits=(y, None))'


def test_import_clashes_get_an_alias():
    imports = Imports()
    names = [imports.object(o) for o in ("a.one:f", "b.two:f", "c.two:f", "a.one:f", "d:F")]
    assert names == ["f", "f_two", "f_2", "f", "F_d"]
    assert "from b.two import f as f_two" in imports.lines()


@pytest.mark.parametrize(
    ("path", "text"),
    [("a.b", "self.a.b"), ("layers.3.w", "self.layers[3].w"), ("x.foo-bar", 'self.x["foo-bar"]'), ("a.class", 'self.a["class"]'),
     ("__w", 'self["__w"]'), ("", "self"), ("l.03", 'self.l["03"]')],
)  # fmt: skip
def test_attribute_paths(path, text):
    assert attribute("self", path) == text


@pytest.mark.parametrize(
    ("hint", "name"),
    [("a.b", "b"), ("class", "class_"), ("3d", "x_3d"), ("", "x"), ("foo-bar", "foo_bar"), ("_x", "x"), ("sum", "sum_")],
)
def test_identifiers(hint, name):
    assert identifier(hint) == name


def test_strings():
    assert [string(s) for s in ("a", "it's", 'say "x"', "a\nb")] == ['"a"', '"it\'s"', "'say \"x\"'", '"a\\nb"']


def test_long_lines_are_broken_inside_their_call():
    args = ", ".join(f'argument_number_{i}="a, (b"' for i in range(12))
    lines = print_body([Stmt(f"out = some_function({args})", note="S(1)", src=Source("f.py", 3, "f", "y = " + "z" * 200))], 8)
    assert all(len(line) <= 140 for line in lines)
    assert lines[0].endswith(" ...") and lines[-1].endswith(")  # S(1)")
    compile("\n".join(line.strip() for line in lines), "generated", "exec")


def test_long_comments_are_broken_between_words():
    lines = print_body([Stmt("# " + ", ".join(f"argument_number_{i}: a:S(1/3) b:S(0)" for i in range(12)))], 8)
    assert len(lines) > 1 and all(len(line) <= 140 and line.startswith("        # ") for line in lines)


def test_scopes_are_opened_once():
    grad, cast = "with torch.no_grad():", "with torch.autocast(...):"
    scopes = {"a": (grad,), "b": (grad, cast), "c": (grad, cast), "d": (grad,), "e": ()}
    stmts = [Stmt(text, scopes=s) for text, s in scopes.items()]
    assert print_body(stmts, 0) == [grad, "    a", f"    {cast}", "        b", "        c", "    d", "e"]
