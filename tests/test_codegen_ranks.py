"""Generated code of lowered programs written by hand: conversions, types, random streams, names; and a few models on all ranks.
Must not depend on how lower derives a program.
"""

from __future__ import annotations

import pytest
import torch
from codegen_models import Pair
from test_codegen import case, check_text

from autopar import runtime as ap
from autopar.codegen.emit import emit
from autopar.codegen.load import load_file, load_module_class
from autopar.config import ComputeConfig
from autopar.ir.graph import Argument, AxisRef, Block, Context, Graph, Guard, Param, Ref, Source, Struct, Tensor, Value
from autopar.ir.mesh import Mesh
from autopar.ir.types import I, P, R, S
from autopar.lower.program import Convert, Local, LoweredBlock, Placement, Program, TypedValue
from autopar.pas.plan import Plan
from autopar.verification import verify

ONE, TP, DP_TP = Mesh(), Mesh((("tp", 2),)), Mesh((("dp", 2), ("tp", 2)))
ADD, F = "torch.Tensor.add", "torch.nn.functional."


class Hand:
    """One root block, statement by statement; every value is a 4 x 8 float unless said otherwise."""

    def __init__(self, mesh=ONE):
        self.mesh, self.values, self.body, self.params, self.inputs, self.tensors = mesh, [], [], [], [], []

    def value(self, name, t=None, kind="tensor", dtype="float32", shape=(4, 8), grad=True):
        t = (I,) * len(self.mesh.axes) if t is None else t
        self.values.append(TypedValue(len(self.values), len(self.values), name, kind, shape, dtype, grad, t))
        return Ref(len(self.values) - 1)

    def input(self, name="x", **kw):
        v = self.value(name, **kw)
        self.inputs.append(v)
        return v

    def param(self, name, t=None, kind="param"):
        v = self.value(name.rpartition(".")[2], t)
        self.params.append(Param(name, v.id, kind))
        self.tensors.append(Tensor(name, kind, (4, 8), "float32", kind == "param"))
        return v

    def op(self, fn, *args, out="y", t=None, text="", writes=(), line=0, path="", ctx=None, **kw):
        fields = {k: kw.pop(k) for k in ("divide", "times", "rng", "training") if k in kw}
        result = self.value(out, t) if isinstance(out, str) else out
        src = Source("model.py", line, "forward", text)
        pairs = tuple((a.id, b.id) for a, b in writes)
        self.body.append(Local(f"{path}/{len(self.body)}", fn, args, kw, result, (), src, ctx or Context(), path, pairs, **fields))
        return result

    def convert(self, v, axis, src, dst, t, copy=False, name=None, grad=True):
        out = self.value(name or self.values[v.id].name, t, grad=grad)
        self.body.append(Convert(v.id, out.id, axis, src, dst, copy))
        return out

    def text(self, *outputs, tree=None, arguments=None, **options):
        ids = tuple(v.id for v in outputs)
        inputs = tuple(v.id for v in self.inputs)
        block = LoweredBlock("Model", "Model", inputs, ids, tuple(self.params), tuple(self.values), tuple(self.body), instances=("",))
        types = {self.values[p.value].name: self.values[p.value].type for p in self.params}
        places = tuple(Placement(t.name, types[t.name.rpartition(".")[2]]) for t in self.tensors)
        tree = tree if tree is not None else outputs[0] if len(outputs) == 1 else outputs
        program = Program(self.mesh, "Model", {"Model": block}, places, tree, Plan(self.mesh))
        values = tuple(Value(v.id, v.name, v.kind, v.shape, v.dtype, v.grad) for v in self.values)
        source = Block("Model", "by.Hand", block.inputs, ids, block.params, values, ())
        arguments = arguments or tuple(Argument(self.values[v.id].name, "positional", v, True) for v in self.inputs)
        graph = Graph("Model", {"Model": source}, tuple(self.tensors), arguments, tree, False, True, module="by.Hand")
        self.files = emit(graph, program, **options)
        check_text(self.files["model.py"])
        return self.files["model.py"]

    def lines(self, *outputs, **options):
        """The statements of the forward, after the checks."""
        text = self.text(*outputs, **options).partition("    def forward(")[2]
        return [s.strip() for s in text.split("\n")[1:] if s.strip() and "ap.check_" not in s]

    def run(self, *args, **kwargs):
        return load_module_class(self.files)(ap.RankMesh((), 0, 1, lambda *_: None, torch.device("cpu")))(*args, **kwargs)


CONVERSIONS = [
    (P, I, "ap.p_to_i(x, self.tp)  # all-reduce"),
    (P, R, "ap.p_to_r(x, self.tp)  # R; all-reduce; backward all-reduce"),
    (P, S(1), "ap.p_to_s(x, self.tp, 1)  # S(1); reduce-scatter; backward all-gather"),
    (I, R, "ap.i_to_r(x, self.tp)  # R; backward all-reduce"),
    (S(0), R, "ap.s_to_r(x, self.tp, 0)  # R; all-gather; backward reduce-scatter"),
    (S(0), I, "ap.s_to_i(x, self.tp, 0)  # all-gather; backward slice"),
    (I, S(1), "ap.i_to_s(x, self.tp, 1)  # S(1); slice; backward all-gather"),
    (S(0), S(1), "ap.s_to_s(x, self.tp, 0, 1)  # S(1); all-to-all; backward all-to-all"),
    (S(1, outer=2), I, "ap.s_to_i(x, self.tp, (1, 2))  # all-gather; backward slice"),
    (S(0), S(1, outer=2), "ap.s_to_s(x, self.tp, 0, (1, 2))  # S(1/2); all-to-all; backward all-to-all"),
    (I, P, "ap.i_to_p(x, self.tp)  # P; keep on the first rank"),
    (S(1), P, "ap.s_to_p(x, self.tp, 1)  # P; place into zeros; backward slice"),
]


@pytest.mark.parametrize(("src", "dst", "text"), CONVERSIONS, ids=[f"{a} to {b}" for a, b, _ in CONVERSIONS])
def test_conversions(src, dst, text):
    h = Hand(TP)
    y = h.convert(h.input(t=(src,)), "tp", src, dst, (dst,))
    assert f"x = {text}" in h.lines(y)


def test_a_conversion_that_keeps_its_source_is_named_after_the_type():
    h = Hand(TP)
    x = h.input()
    r, s = h.convert(x, "tp", I, R, (R,)), h.convert(x, "tp", I, S(1), (S(1),))
    assert [line.split(" =")[0] for line in h.lines(x, r, s)[:2]] == ["x_r", "x_s1"]


def test_without_gradient_there_is_no_backward_to_tell_of():
    h = Hand(TP)
    y = h.convert(h.input(t=(S(0),), grad=False), "tp", S(0), I, (I,), grad=False)
    assert "x = ap.s_to_i(x, self.tp, 0)  # all-gather" in h.lines(y)


def test_written_copies():
    h = Hand(TP)
    x = h.input()
    y = h.convert(x, "tp", I, R, (R,), copy=True)
    z = h.value("x", (R,))
    h.op("torch.Tensor.add_", y, 1, out=z, writes=[(y, z)])
    assert h.lines(z, x)[0] == "x_r = ap.i_to_r(x, self.tp).clone()  # R; backward all-reduce"
    assert h.lines(z, x)[1:] == ["x_r.add_(1)", "return x_r, x"]


def test_types_on_several_axes():
    h = Hand(DP_TP)
    y = h.op(ADD, h.input(t=(S(0), R)), h.param("w", (R, R)), t=(S(0), P))
    z = h.op(ADD, y, 1, out="z", t=(S(0), S(0, 1)))
    text = h.text(z)
    assert "# x: dp:S(0) tp:R" in text and "y = x + self.w  # dp:S(0) tp:P" in text and "z = y + 1  # dp:S(0) tp:S(0,1)" in text
    assert 'self.declare("w", (4, 8), torch.float32, "R", "R")' in text
    assert sorted(h.files) == ["model.py", "rank0.py", "rank1.py", "rank2.py", "rank3.py"]
    rank = load_file(h.files, "rank3.py")
    assert rank.COORDS == {"dp": 1, "tp": 1} and list(rank.MESH) == list(DP_TP.axes) and rank.RANK == 3


def test_types_of_several_outputs():
    h = Hand(TP)
    outs = (h.value("a", (S(1),)), h.value("b", (S(1),)), h.value("c", (I,)))
    h.op("torch.Tensor.split", h.input(t=(S(1),)), 2, out=outs)
    assert h.lines(*outs)[1] == "a, b, c = x.split(2)  # S(1), S(1), I"
    assert h.lines(*outs[:2])[1] == "a, b, _ = x.split(2)  # S(1)"


def test_scaling_after_an_op():
    h = Hand(TP)
    y = h.op(F + "mse_loss", h.input(t=(S(0),)), 0.5, t=(P,), divide=2)
    n = h.op("torch.Tensor.size", y, 0, out=h.value("n", (), "scalar", "int"), times=2)
    z = h.op(ADD, y, n, out="z")
    assert h.lines(z)[1:-1] == ["y = F.mse_loss(x, 0.5) / 2  # P", "n = y.size(0) * 2", "z = y + n"]


def test_random_streams_and_contexts():
    h = Hand(DP_TP)
    x = h.input()
    y = h.op(F + "dropout", x, p=0.1, rng=("dp", "tp"))
    z = h.op(ADD, y, 1, out="z", ctx=Context(False, (("cpu", "bfloat16", True),)))
    c = h.convert(z, "tp", I, R, (I, R), grad=True)
    w = h.op(ADD, c, 1, out="w", ctx=Context(False, (("cpu", "bfloat16", False),)))
    lines = h.lines(w)
    assert lines[:2] == ["with ap.random_streams(self.dp, self.tp):", "y = F.dropout(x, p=0.1)"]
    assert lines[2:4] == ["with torch.no_grad():", "with torch.autocast(self.device.type, dtype=torch.bfloat16):"]
    assert lines[5].startswith("z = ap.i_to_r"), "a conversion that carries a gradient stays out of no_grad"
    assert lines[7] == "with torch.autocast(self.device.type, enabled=False):"


def test_training_only_statements():
    h = Hand()
    n = h.param("bn.count", kind="buffer")
    new = h.value("count")
    h.op("torch.Tensor.add_", n, 1, out=new, writes=[(n, new)], training=True, text="self.count += 1", line=3)
    assert h.lines(h.op(ADD, h.input(), 0))[:3] == ["# model.py:3  self.count += 1", "if self.training:", "self.bn.count.add_(1)"]


def test_axis_functions_and_an_axis_named_like_a_module():
    h = Hand(TP)
    y = h.op("ap.vocab_embedding", h.input(), h.param("tp.weight", (S(0),)), AxisRef("tp"))
    text = h.text(y)
    assert 'self.tp_axis = mesh["tp"]' in text and "y = ap.vocab_embedding(x, self.tp.weight, self.tp_axis)" in text


def test_buffers_replaced_are_read_first():
    h = Hand()
    old = h.param("count", kind="buffer")
    new = h.op(ADD, old, 1, out="count")
    h.op("autopar:set_buffer", "count", new, out=None)
    lines = h.lines(h.op(ADD, old, h.input()))
    assert lines[0] == "count = self.count" and "self.count = count_1" in lines and lines[-2] == "y = count + x"


# ---- names


def residual(h, x, later):
    """h = x + 1; h2 = h * 2 (same name); out = kept + h2, where the user calls the first h `kept`."""
    a = h.op(ADD, x, 1, out="h", text="h = x + 1", line=1)
    b = h.op("torch.Tensor.mul", a, 2, out="h", text="h = norm(h)", line=2)
    extra = later(h)
    return h.op(ADD, a, b, out="out", text="out = kept + h", line=3), extra


def test_a_live_value_gets_the_name_the_user_gave_it():
    h = Hand()
    out, _ = residual(h, h.input(), lambda h: None)
    assert [s for s in h.lines(out) if s[0] != "#"] == ["h = x + 1", "kept = h", "h = h * 2", "out = kept + h", "return out"]


def test_but_not_where_that_name_is_in_use():
    h = Hand()
    x = h.input()
    kept = h.op(ADD, x, 5, out="kept")
    out, more = residual(h, x, lambda h: h.op(ADD, kept, 3, out="more"))
    lines = [s for s in h.lines(out, more) if s[0] != "#"]
    assert "kept = h" not in lines and "h_1 = h * 2" in lines
    v = torch.randn(4, 8)
    got = h.run(v)
    torch.testing.assert_close(got[0], (v + 1) + (v + 1) * 2)
    torch.testing.assert_close(got[1], v + 8)


def test_names_of_imports_and_builtins_are_not_shadowed():
    h = Hand()
    x = h.input()
    a = h.op("test_codegen_ranks:residual", x, out="residual")
    b = h.op("torch.Tensor.sum", a, out="sum")
    c = h.op("test_codegen_ranks:residual", b, out="F")
    text = h.text(c, a)
    assert "from test_codegen_ranks import residual" in text and "residual_1 = residual(x)" in text and "sum_ = " in text and "f = " in text


def test_in_place_versions_share_a_variable():
    h = Hand()
    x = h.input()
    y = h.op(ADD, x, 1)
    view = h.op("torch.Tensor.__getitem__", y, 0, out="view")
    y2, view2 = h.value("other"), h.value("view")
    h.op("torch.Tensor.mul_", view, 3, out=view2, writes=[(view, view2), (y, y2)])
    z = h.op(ADD, y2, view2, out="z")
    assert h.lines(z) == ["y = x + 1", "view = y[0]", "view.mul_(3)", "z = y + view", "return z"]


def test_dead_names_are_reused_and_dead_results_dropped():
    h = Hand()
    x = h.op(ADD, h.input(), 1, out="x")
    x = h.op(ADD, x, 2, out="x")
    h.op("torch.Tensor.sigmoid", x, out="unused")
    assert h.lines(x) == ["x = x + 1", "x = x + 2", "x.sigmoid()", "return x"]


# ---- arguments


def test_one_tensor_for_two_arguments():
    h = Hand()
    x = h.input()
    arguments = (Argument("x", "positional", x, True), Argument("y", "keyword", x, True))
    text = h.text(h.op(ADD, x, 1), arguments=arguments)
    assert "def forward(self, x, *, y):" in text and 'ap.check_argument("y is x", y is x, True)' in text


def test_nested_and_variable_arguments():
    h = Hand()
    a, b, c = h.input("a"), h.input("b"), h.input("c")
    arguments = (
        Argument("first", "positional", Struct("codegen_models:Pair", ("first", "second"), (a, 3)), True),
        Argument("rest", "var_positional", (b,), True),
        Argument("named", "var_keyword", {"key": [c, "s"]}, True),
    )
    text = h.text(h.op(ADD, h.op(ADD, a, b), c), arguments=arguments)
    assert "def forward(self, first, *rest, **named):" in text
    for line in ("a = first.first", 'ap.check_argument("first.second", first.second, 3)', 'ap.check_structure("rest", rest, 1)',
                 "b = rest[0]", 'ap.check_structure("named", named, ("key",))', 'c = named["key"][0]'):  # fmt: skip
        assert f"        {line}\n" in text
    one = torch.ones(4, 8)
    torch.testing.assert_close(h.run(Pair(one, 3), one, key=[one, "s"]), one * 3)


def test_guards_read_values():
    h = Hand()
    x = h.input()
    for read, expected in (("bool", True), ("item", 2.5), ("tolist", [1, 2]), ("int", 3), ("equal:(1, 2)", True)):
        h.body.append(Guard("g", x, read, expected, "", Source("/site-packages/a/b.py", 7, "f", "if x:")))
    lines = [s for s in h.lines(x) if s.startswith("ap.guard")]
    assert [s.split(", ")[0] for s in lines[:4]] == ["ap.guard(bool(x)", "ap.guard(x.item()", "ap.guard(x.tolist()", "ap.guard(int(x)"]
    assert lines[0] == 'ap.guard(bool(x), True, "a/b.py:7", "if x:", self.guards)'
    assert "self.guards = \"warn\"" in h.text(x, guards="warn") and "guard" not in h.text(x, guards="off")


def test_dead_comparisons_of_guards_go_with_them():
    h = Hand()
    n = h.op("torch.Tensor.size", h.input(), 0, out=h.value("n", (), "scalar", "int"))
    c = h.op("operator.gt", n, 1, out=h.value("gt", (), "scalar", "bool"))
    h.body.append(Guard("g", c, "bool", True, "", Source("m.py", 1, "f", "if n > 1:")))
    y = h.op(ADD, h.inputs[0], 1)
    assert 'ap.guard(n > 1, True, "m.py:1", "if n > 1:", self.guards)' in h.text(y)
    assert h.lines(y, guards="off") == ["y = x + 1", "return y"]


# ---- models on all ranks


@pytest.mark.parametrize("policy", ["data", "tp"])
@pytest.mark.parametrize("name", ["stack", "heads", "checkpointed"])
def test_models_on_two_ranks(name, policy):
    module, args, _ = case(name)
    verify(module, args, policy, ComputeConfig(plan_ngpus=2)).check()
