"""build: dead ops, blocks, live values, in-place versions, ownership of parameters; on hand-made recordings."""

import time

import pytest
import torch
from interp import Interpreter
from recorder import F, Recorder, T

from autopar.ir.graph import Block, Call, Guard, Op, Ref, op_inputs, op_outputs, refs
from autopar.trace.build import build, class_name, short_name


def layer(r, x, path, *, relu=False, cls="tests.Layer", extra=0):
    with r.call(path, cls):
        h = r.linear(x, f"{path}.fc1", 2)
        h = r.op(F + ("relu" if relu else "gelu"), h, line=3)
        h = r.linear(h, f"{path}.fc2", 4)
        for _ in range(extra):
            h = r.op(F + "silu", h, line=5)
        return r.op(T + "__add__", x, h, line=6)


def check(graph):
    """Every invariant of a Graph that later stages rely on."""
    assert next(reversed(graph.blocks)) == graph.root
    seen: set[str] = set()
    owned: list[str] = []
    for name, b in graph.blocks.items():
        assert name == b.name and name.isidentifier()
        assert [v.id for v in b.values] == list(range(len(b.values)))
        known = {*b.inputs, *(p.value for p in b.params)}
        assert len(known) == len(b.inputs) + len(b.params)
        ids = [x.id for x in b.ops]
        assert len(set(ids)) == len(ids)
        for x in b.ops:
            if isinstance(x, Call):
                callee = graph.blocks[x.block]
                assert x.block in seen, "callees come before callers"
                assert len(x.args) == len(callee.inputs) and len(x.out) == len(callee.outputs)
                used, made = list(x.args), list(x.out)
                for mine, theirs in zip((*x.args, *x.out), (*callee.inputs, *callee.outputs), strict=True):
                    a, c = b.values[mine], callee.values[theirs]
                    assert (a.kind, a.shape, a.dtype, a.grad) == (c.kind, c.shape, c.dtype, c.grad)
                assert all(old in x.args and new in x.out for old, new in x.writes)
            elif isinstance(x, Guard):
                used, made = [r.id for r in refs(x.value)], []
            else:
                assert isinstance(x, Op)
                assert x.id.partition("#")[0] == f"{x.path}/{short_name(x.fn)}"
                used = [v.id for v in op_inputs(b, x)] + [old for old, _ in x.writes]
                made = [v.id for v in op_outputs(b, x)] + [r.id for r in refs(x.out) if not b.values[r.id].is_tensor]
            assert known.issuperset(used), x
            assert known.isdisjoint(made), x
            known.update(made)
        assert known.issuperset(b.outputs)
        assert known == {v.id for v in b.values}
        seen.add(name)
        owned += [f"{path}.{p.name}" if path else p.name for path in b.instances for p in b.params]
    assert len(set(owned)) == len(owned), "a tensor has one owner"
    assert set(owned) <= {t.name for t in graph.tensors}
    assert {t.name for t in graph.tensors if t.kind == "constant"} == graph.constants.keys()
    return graph


def made(r, output) -> tuple:
    g = check(build(r.done(output)))
    return g, g.body


def fns(b: Block) -> list[str]:
    return [short_name(x.fn) if isinstance(x, Op) else type(x).__name__.lower() for x in b.ops]


def calls(b: Block) -> list[tuple[str, str]]:
    return [(x.id, x.block) for x in b.ops if isinstance(x, Call)]


def test_equal_layers_are_one_block():
    r = Recorder()
    x = r.input()
    for i in range(4):
        x = layer(r, x, f"model.layers.{i}")
    g, body = made(r, x)
    assert calls(body) == [(f"model.layers.{i}", "Layer") for i in range(4)]
    b = g.blocks["Layer"]
    assert b.instances == tuple(f"model.layers.{i}" for i in range(4)) and b.address == "model.layers.*"
    assert [x.id for x in b.ops] == ["fc1/linear", "/gelu", "fc2/linear", "/add"]
    assert [p.name for p in b.params] == ["fc1.weight", "fc2.weight"]
    assert body.params == () and g.output == Ref(body.outputs[0])


DIFFERENT = {
    "function": {"relu": True},
    "class": {"cls": "tests.Other"},
    "more ops": {"extra": 1},
}


@pytest.mark.parametrize("change", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_layers_that_differ_are_two_blocks(change):
    r = Recorder()
    x = layer(r, r.input(), "layers.0")
    g, body = made(r, layer(r, x, "layers.1", **change))
    assert len(g.blocks) == 3 and len({b for _, b in calls(body)}) == 2


LITERALS = [(1, True), (1, 1.0), (0.0, -0.0), ((1, 2), [1, 2]), ("a", "b"), (slice(1), slice(2)), (torch.float32, torch.float64)]


@pytest.mark.parametrize(("a", "b"), LITERALS, ids=str)
def test_literals_that_differ_make_blocks_differ(a, b):
    def blocks(*literals):
        r = Recorder()
        x = r.input()
        for i, v in enumerate(literals):
            with r.call(f"layers.{i}"):
                for _ in range(4):
                    x = r.op(F + "f", x, v)
        return len(made(r, x)[0].blocks)

    assert blocks(a, b) == 3
    assert blocks(a, a) == 2


def test_nan_literals_are_equal():
    r = Recorder()
    x = r.input()
    for i in range(2):
        with r.call(f"layers.{i}"):
            for _ in range(4):
                x = r.op(F + "f", x, float("nan"))
    assert len(made(r, x)[0].blocks) == 2


def test_small_and_unnumbered_calls_are_inlined():
    r = Recorder()
    x = r.linear(r.input(), "net.0")
    with r.call("net.1", "torch.nn.modules.activation.ReLU"):
        x = r.op(F + "relu", x)
    x = layer(r, x, "encoder", extra=20)
    g, body = made(r, x)
    assert list(g.blocks) == ["Model"]
    assert [o.id for o in body.ops[:4]] == ["net.0/linear", "net.1/relu", "encoder.fc1/linear", "encoder/gelu"]
    assert [p.name for p in body.params] == ["net.0.weight", "encoder.fc1.weight", "encoder.fc2.weight"]


def test_repeated_big_calls_are_blocks():
    r = Recorder()
    x = layer(r, r.input(), "left", extra=6)
    g, body = made(r, layer(r, x, "right", extra=6))
    assert calls(body) == [("left", "Layer"), ("right", "Layer")]
    assert g.blocks["Layer"].instances == ("left", "right")


def test_repeats_inside_a_block_are_not_split_again():
    r = Recorder()
    x = r.input()
    for i in range(3):
        with r.call(f"layers.{i}", "tests.Outer"):
            x = layer(r, x, f"layers.{i}.attn", extra=6)
    g, _ = made(r, x)
    assert list(g.blocks) == ["Outer", "Model"]


def test_blocks_nest():
    r = Recorder()
    x = r.input()
    for s in range(2):
        with r.call(f"stages.{s}", "tests.Stage"):
            for i in range(2):
                x = layer(r, x, f"stages.{s}.blocks.{i}")
            x = r.op(F + "pool", x)
    g, body = made(r, x)
    assert list(g.blocks) == ["Layer", "Stage", "Model"]
    assert calls(g.blocks["Stage"]) == [("blocks.0", "Layer"), ("blocks.1", "Layer")]
    assert g.blocks["Layer"].instances == tuple(f"stages.{s}.blocks.{i}" for s in range(2) for i in range(2))
    assert g.blocks["Layer"].address == "stages.*.blocks.*"
    assert calls(body) == [("stages.0", "Stage"), ("stages.1", "Stage")]


def test_wrappers_of_one_block_are_inlined():
    r = Recorder()
    x = r.input()
    for i in range(2):
        with r.call(f"groups.{i}", "tests.Group"), r.call(f"groups.{i}.inner", "tests.Inner"):
            x = layer(r, x, f"groups.{i}.inner.layers.0")
    _, body = made(r, x)
    assert calls(body) == [(f"groups.{i}.inner.layers.0", "Layer") for i in range(2)]


def test_class_names_are_unique():
    r = Recorder("pkg.Layer")
    x = layer(r, r.input(), "a.0", cls="one.Layer")
    g, _ = made(r, layer(r, x, "a.1", cls="two.Layer"))
    assert list(g.blocks) == ["Layer_1", "Layer_2", "Layer"]


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        ("a.b:Foo", "Foo"),
        ("m.f.<locals>.Net", "Net"),
        ("m:run_block", "RunBlock"),
        ("m:<lambda>", "Lambda"),
        ("x.class", "Class"),
        ("x.1d", "Block1d"),
        ("x.None", "None_"),
    ],
)
def test_class_name(cls, name):
    assert class_name(cls) == name and name.isidentifier()


FN = {
    "torch.nn.functional.linear": "linear",
    "torch.Tensor.__getitem__": "getitem",
    "torch.Tensor.add_": "add_",
    "apply:pkg.mod:Class": "Class",
    "pkg.mod:func": "func",
    "torch.ops.aten.add.Tensor": "add",
    "torch.Tensor.T.__get__": "T",
    "torch.Tensor.data.__set__": "data",
    "operator.mul": "mul",
    "autopar:set_buffer": "set_buffer",
    "torch.ops.my.op.default": "op",
}


@pytest.mark.parametrize(("fn", "name"), FN.items())
def test_short_name(fn, name):
    assert short_name(fn) == name


def test_live_values_cross_blocks():
    r = Recorder()
    x, mask = r.input("x"), r.input("mask")
    bias, kept = None, []
    for i in range(3):
        with r.call(f"layers.{i}"):
            h = r.op(F + "f", x, mask)
            h = r.op(F + "g", h)
            extra = r.op(F + "h", h, out="extra")
            x = r.op(F + "k", h, extra)
            kept.append(extra)
    g, body = made(r, {"x": x, "all": kept, "bias": bias})
    b = g.blocks["Layer"]
    assert [b.values[i].name for i in b.inputs] == ["x", "mask"]
    assert [b.values[i].name for i in b.outputs] == ["extra", "y"]
    assert g.output["bias"] is None and len(g.output["all"]) == 3
    assert body.outputs == tuple(dict.fromkeys(r.id for r in refs(g.output)))


def test_unused_inputs_stay_and_come_in_order():
    r = Recorder()
    a, _, c = r.input("a"), r.input("b"), r.input("c")
    g, body = made(r, r.op(F + "f", c, a))
    assert [body.values[i].name for i in body.inputs] == ["a", "b", "c"]
    assert [list(refs(arg.tree)) for arg in g.arguments] == [[Ref(i)] for i in body.inputs]


# ---- dead code ----------------------------------------------------------------------------------------------


def dead(make) -> list[str]:
    r = Recorder()
    x = r.input()
    out = make(r, x)
    return fns(made(r, out)[1])


def written_unused(r, x):
    y = r.op(F + "zeros", x)
    r.inplace(T + "add_", y, x)
    return r.op(F + "f", x)


def written_used(r, x):
    y = r.op(F + "zeros", x)
    return r.inplace(T + "add_", y, x)


def written_view(r, x):
    y = r.op(F + "zeros", x)
    v = r.op(T + "view", y, -1, alias=y)
    _, y = r.inplace(T + "add_", v, x, aliases=[y])
    return y


def written_tensor(kind):
    def f(r, x):
        v = r.op(T + "view", r.tensor("b", kind=kind), -1, alias=r.tensor("b"))
        r.inplace(T + "add_", v, x)
        return x

    return f


def written_input(r, x):
    r.inplace(T + "add_", x, 1)
    return r.op(F + "ones")


def random(fn, **kw):
    return lambda r, x: (r.op(fn, x, **kw), x)[1]


def guarded(r, x):
    r.guard(r.op(F + "any", x))
    return x


def chain(r, x):
    r.op(F + "g", r.op(F + "f", x))
    return x


def effect(r, x):
    r.op(F + "f", x, effect=True)
    return x


DEAD = {
    "a chain nobody uses": (chain, []),
    "effects stay": (effect, ["f"]),
    "guards and what they read stay": (guarded, ["any", "guard"]),
    "write to unused memory": (written_unused, ["f"]),
    "write to used memory": (written_used, ["zeros", "add_"]),
    "write through a view": (written_view, ["zeros", "view", "add_"]),
    "write to a buffer": (written_tensor("buffer"), ["view", "add_"]),
    "write to a parameter": (written_tensor("param"), ["view", "add_"]),
    "write to an input": (written_input, ["add_", "ones"]),
    "dropout": (random(F + "dropout"), ["dropout"]),
    "rand": (random("torch.rand_like"), ["rand_like"]),
    "normal_": (random("torch.Tensor.normal_"), ["normal_"]),
    "bernoulli": (random("torch.bernoulli"), ["bernoulli"]),
    "attention with dropout": (random(F + "scaled_dot_product_attention", dropout_p=0.5), ["scaled_dot_product_attention"]),
    "attention without": (random(F + "scaled_dot_product_attention", dropout_p=0.0), []),
    "relu": (random(F + "relu"), []),
}


@pytest.mark.parametrize(("make", "left"), DEAD.values(), ids=DEAD.keys())
def test_dead_ops(make, left):
    assert dead(make) == left


def test_dead_constants_go_but_unused_parameters_stay():
    r = Recorder()
    x = r.input()
    r.op(F + "f", x, r.tensor("constant0", kind="constant", data=torch.zeros(4, 4)))
    r.op(F + "f", x, r.tensor("unused.weight"))
    g, body = made(r, x)
    assert [t.name for t in g.tensors] == ["unused.weight"] and body.params == () and g.constants == {}


# ---- memory shared by several values ------------------------------------------------------------------------


def whole(make) -> dict[str, bool]:
    r = Recorder()
    x = r.input()
    out = make(r, x)
    return {o.id: o.whole for o in made(r, out)[1].ops}


def lone_add(r, x):
    y = r.op(F + "f", x)
    return r.inplace(T + "add_", y, 1)


def lone_setitem(r, x):
    y = r.op(F + "f", x)
    return r.inplace(T + "__setitem__", y, 0, 1.0)


def base_seen(r, x):
    y = r.op(F + "f", x)
    v = r.op(T + "view", y, -1, alias=y)
    v, y = r.inplace(T + "add_", v, 1, aliases=[y])
    return r.op(F + "g", y)


def both_seen(r, x):
    y = r.op(F + "f", x)
    v = r.op(T + "view", y, -1, alias=y)
    y, v = r.inplace(T + "add_", y, 1, aliases=[v])
    return r.op(F + "g", y, v)


def view_dead(r, x):
    y = r.op(F + "f", x)
    v = r.op(T + "view", y, -1, alias=y)
    z = r.op(F + "g", v)
    y, _ = r.inplace(T + "add_", y, 1, aliases=[v])
    return r.op(F + "h", y, z)


def overlapping(r, x):
    y = r.op(F + "f", x)
    v = r.op(T + "__getitem__", y, 0, alias=y)
    y, _ = r.inplace(T + "__setitem__", y, 1, v, aliases=[v])
    return y


def view_later(r, x):
    y = r.op(F + "f", x)
    y = r.inplace(T + "add_", y, 1)
    v = r.op(T + "view", y, -1, alias=y)
    return r.op(F + "g", y, v)


def batch_norm(r, x):
    m = r.tensor("running_mean", (4,), "buffer", False)
    new = r.value("running_mean", (4,), storage=r.values[m.id].storage)
    return r.op(F + "batch_norm", x, m, writes=[(m, new)])


WHOLE = {
    "lone add_": (lone_add, []),
    "lone setitem": (lone_setitem, []),
    "base seen later": (base_seen, ["/f", "/view", "/add_"]),
    "both seen": (both_seen, ["/f", "/view", "/add_"]),
    "view dead at the write": (view_dead, []),
    "view read by the write": (overlapping, ["/f", "/getitem", "/setitem"]),
    "view made later": (view_later, []),
    "input": (written_input, ["/add_"]),
    "buffer": (written_tensor("buffer"), ["/view", "/add_"]),
    "batch norm": (batch_norm, []),
}


@pytest.mark.parametrize(("make", "marked"), WHOLE.values(), ids=WHOLE.keys())
def test_whole(make, marked):
    assert [k for k, v in whole(make).items() if v] == marked


def test_writes_of_a_live_in_leave_the_block():
    r = Recorder()
    x = r.op(F + "f", r.input())
    v = r.op(T + "view", x, -1, alias=x)
    for i in range(2):
        with r.call(f"layers.{i}"):
            h = r.op(F + "g", x)
            x, v = r.inplace(T + "add_", x, h, aliases=[v])
            h = r.op(F + "k", x)
            x, v = r.inplace(T + "mul_", x, h, aliases=[v])
    g, body = made(r, (x, v))
    assert fns(g.blocks["Layer"]) == ["g", "add_", "k", "mul_"]
    first, second = (o for o in body.ops if isinstance(o, Call))
    assert first.writes == tuple(zip(first.args, first.out, strict=True))
    assert second.args == first.out


def test_writes_nobody_sees_leave_nothing():
    r = Recorder()
    x = r.input()
    with r.call("layers.0"):
        y = r.op(F + "f", x)
        y = r.inplace(T + "add_", y, 1)
        y = r.inplace(T + "mul_", y, 1)
        z = r.op(F + "g", y)
    _, body = made(r, z)
    (call,) = (o for o in body.ops if isinstance(o, Call))
    assert call.writes == () and len(call.out) == 1


# ---- parameters ---------------------------------------------------------------------------------------------


def test_shared_parameter_belongs_to_the_root():
    r = Recorder()
    x = r.input()
    for i in range(3):
        with r.call(f"layers.{i}"):
            x = r.op(F + "linear", x, r.tensor("shared.weight"))
            x = r.linear(x, f"layers.{i}.fc")
            x = r.op(F + "f", r.op(F + "f", x), r.tensor("layers.0.table"))
    g, body = made(r, x)
    assert [p.name for p in body.params] == ["shared.weight", "layers.0.table"]
    b = g.blocks["Layer"]
    assert [p.name for p in b.params] == ["fc.weight"]
    assert [b.values[i].name for i in b.inputs] == ["x", "weight", "table"]


def test_tied_weight_used_outside_its_block_belongs_to_the_root():
    r = Recorder()
    x = layer(r, r.input(), "layers.0")
    g, body = made(r, r.op(F + "linear", x, r.tensor("layers.0.fc1.weight")))
    assert [p.name for p in body.params] == ["layers.0.fc1.weight"]
    assert [p.name for p in g.blocks["Layer"].params] == ["fc2.weight"]


def constants(*data):
    r = Recorder()
    x = r.input()
    for i, t in enumerate(data):
        with r.call(f"layers.{i}"):
            for _ in range(4):
                x = r.op(F + "f", x, r.tensor(f"layers.{i}.constant{3 * i}", (2,), "constant", False, data=t))
    return made(r, x)[0]


def test_constants_are_compared_by_content_and_numbered_anew():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    g = constants(one, one.clone(), two)
    assert [b.instances for b in g.blocks.values()] == [("layers.0", "layers.1"), ("layers.2",), ("",)]
    assert list(g.constants) == [f"layers.{i}.constant0" for i in range(3)]
    assert g.constants["layers.2.constant0"] is two
    assert [p.name for p in g.blocks["Layer"].params] == ["constant0"]


def test_a_tensor_met_twice_is_one_value():
    r = Recorder()
    x = r.input()
    w = r.tensor("w")
    again = r.value("w", (4, 4), origin="param", qualified="w")
    y = r.op(F + "f", x, w)
    r.guard(again)
    _, body = made(r, (r.op(F + "g", y, again), again))
    assert len(body.params) == 1 and [len(list(refs(o.args))) for o in body.ops if isinstance(o, Op)] == [2, 2]


# ---- modules called several times ---------------------------------------------------------------------------


def test_one_module_called_again_and_again():
    r = Recorder()
    x = r.input()
    for _ in range(3):
        x = layer(r, x, "groups.0")
    g, body = made(r, x)
    assert calls(body) == [("groups.0", "Layer"), ("groups.0#1", "Layer"), ("groups.0#2", "Layer")]
    assert g.blocks["Layer"].instances == ("groups.0",)
    assert [p.name for p in g.blocks["Layer"].params] == ["fc1.weight", "fc2.weight"]


def test_unlike_calls_of_one_module_are_inlined():
    r = Recorder()
    x = layer(r, r.input(), "groups.0")
    g, body = made(r, layer(r, x, "groups.0", relu=True))
    assert list(g.blocks) == ["Model"]
    assert [o.id for o in body.ops][:5] == [
        "groups.0.fc1/linear",
        "groups.0/gelu",
        "groups.0.fc2/linear",
        "groups.0/add",
        "groups.0.fc1/linear#1",
    ]
    assert [p.name for p in body.params] == ["groups.0.fc1.weight", "groups.0.fc2.weight"]


def test_calls_of_one_module_from_two_blocks_are_inlined():
    r = Recorder()
    x = r.input()
    with r.call("stages.0", "tests.Stage"):
        x = layer(r, x, "stages.0.sub.0")
        x = r.op(F + "f", x)
    x = layer(r, x, "stages.0.sub.0")
    g, body = made(r, x)
    assert list(g.blocks) == ["Stage", "Model"]
    assert calls(body) == [("stages.0", "Stage")] and len(body.params) == 2


def test_a_module_of_another_layer_is_inlined_where_it_is_called():
    r = Recorder()
    x = r.input()
    for i in range(3):
        with r.call(f"layers.{i}", "tests.Outer"):
            x = r.op(F + "f", x)
            x = layer(r, x, "layers.0.attn.0")
    g, _ = made(r, x)
    assert [b.instances for b in g.blocks.values()] == [("layers.0",), ("layers.1", "layers.2"), ("",)]
    assert [o.id for o in g.blocks["Outer_1"].ops][:2] == ["/f", "layers.0.attn.0.fc1/linear"]


# ---- recompute ----------------------------------------------------------------------------------------------


def test_checkpoint_of_a_whole_layer_is_the_layer():
    r = Recorder()
    x = r.input()
    for i in range(2):
        with r.call("", "torch.utils.checkpoint", recompute=True):
            x = layer(r, x, f"layers.{i}")
    g, body = made(r, x)
    assert calls(body) == [("layers.0", "Layer"), ("layers.1", "Layer")]
    assert g.blocks["Layer"].recompute and g.blocks["Layer"].cls == "tests.Layer"


def test_checkpoint_that_fills_a_layer_is_the_layer():
    r = Recorder()
    x = r.input()
    for i in range(2):
        with r.call(f"layers.{i}"), r.call(f"layers.{i}", "m:inner", recompute=True):
            x = r.linear(r.op(F + "f", x), f"layers.{i}.fc")
    g, body = made(r, x)
    assert calls(body) == [("layers.0", "Layer"), ("layers.1", "Layer")]
    assert g.blocks["Layer"].recompute and [p.name for p in g.blocks["Layer"].params] == ["fc.weight"]


def test_checkpoint_of_a_part_of_a_layer_owns_no_parameters():
    r = Recorder()
    x = r.input()
    for i in range(2):
        with r.call(f"layers.{i}"):
            for part in ("attn", "mlp"):
                with r.call(f"layers.{i}", f"m:run_{part}", recompute=True):
                    h = r.op(F + part, x)
                    h = layer(r, h, f"layers.{i}.{part}.0")
                x = r.op(T + "__add__", x, h)
    g, _ = made(r, x)
    assert list(g.blocks) == ["RunAttn", "RunMlp", "Layer", "Model"]
    b = g.blocks["Layer"]
    assert calls(b) == [("checkpoint", "RunAttn"), ("checkpoint_1", "RunMlp")]
    assert g.blocks["RunMlp"].recompute and g.blocks["RunMlp"].params == () and len(g.blocks["RunMlp"].inputs) == 3
    assert g.blocks["RunMlp"].instances == ("layers.0.checkpoint_1", "layers.1.checkpoint_1")
    assert [p.name for p in b.params] == ["attn.0.fc1.weight", "attn.0.fc2.weight", "mlp.0.fc1.weight", "mlp.0.fc2.weight"]


# ---- buffers set --------------------------------------------------------------------------------------------


def test_buffers_are_set_where_their_value_is_made():
    r = Recorder()
    x = r.input()
    for i in range(2):
        r.tensor(f"layers.{i}.state", kind="buffer")
        with r.call(f"layers.{i}"):
            for _ in range(4):
                x = r.op(F + "f", x)
            r.buffers_set.append((f"layers.{i}.state", r.op(F + "g", x).id))
    r.tensor("other", kind="buffer")
    r.buffers_set.append(("other", x.id))
    g, body = made(r, x)
    b = g.blocks["Layer"]
    assert fns(b) == ["f"] * 4 + ["g", "set_buffer"]
    assert b.ops[-1].args == ("state", Ref(b.ops[-2].out.id)) and b.ops[-1].fn == "autopar:set_buffer"
    assert fns(body) == ["call", "call", "set_buffer"] and body.ops[-1].args[0] == "other"


# ---- guards -------------------------------------------------------------------------------------------------


def test_guards_belong_to_their_block_and_its_structure():
    def blocks(*expected):
        r = Recorder()
        x = r.input()
        for i, e in enumerate(expected):
            with r.call(f"layers.{i}"):
                for _ in range(3):
                    x = r.op(F + "f", x)
                r.guard(x, "item", e)
        return made(r, x)[0].blocks

    assert len(blocks(1, 1)) == 2 and len(blocks(1, 2)) == 3 and len(blocks(1, True)) == 3
    assert blocks(1, 1)["Layer"].ops[-1].id == "/guard"


def test_scalars_cross_blocks():
    r = Recorder()
    x = r.input()
    n = r.op(T + "size", x, 0, out=r.value("n", (), "int", False, kind="scalar"))
    for i in range(2):
        with r.call(f"layers.{i}"):
            for _ in range(4):
                x = r.op(T + "view", x, n, -1)
    g, _ = made(r, x)
    b = g.blocks["Layer"]
    assert [b.values[i].kind for i in b.inputs] == ["tensor", "scalar"]


# ---- malformed recordings, speed ----------------------------------------------------------------------------


def test_values_defined_twice_or_never_are_refused():
    r = Recorder()
    x = r.input()
    y = r.op(F + "f", x)
    r.op(F + "g", x, out=y)
    with pytest.raises(AssertionError, match=r"defined twice, by torch\.nn\.functional\.g at model\.py:1"):
        build(r.done(y))
    r = Recorder()
    ghost = r.value("ghost")
    with pytest.raises(AssertionError, match="ghost"):
        build(r.done(r.op(F + "f", ghost)))


def test_time_is_linear_and_small():
    def seconds(layers):
        r = Recorder()
        x = r.input()
        for i in range(layers):
            with r.call(f"model.layers.{i}"):
                for part in ("attn", "mlp", "norm"):
                    with r.call(f"model.layers.{i}.{part}"):
                        for k in range(18):
                            x = r.op(F + "f", x, k, r.tensor(f"model.layers.{i}.{part}.w{k}"), dim=-1)
        rec = r.done(x)
        start = time.process_time()
        g = build(rec)
        assert len(g.blocks) == 2
        return time.process_time() - start

    seconds(2)
    big = min(seconds(130) for _ in range(2))
    assert big < 1.5, f"7000 ops took {big:.2f} s"


def test_interpreted_graph_equals_the_recorded_program():
    """The interpreter that later tests use as oracle, on a program written twice by hand."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(
        torch.nn.ModuleDict({"fc1": torch.nn.Linear(4, 4, False), "fc2": torch.nn.Linear(4, 4, False)}) for _ in range(3)
    )
    r = Recorder()
    v = r.input()
    for i in range(3):
        v = layer(r, v, f"layers.{i}")
    x = torch.randn(2, 4)
    got = Interpreter(made(r, v)[0], model).run(x=x)
    for m in model.layers:
        x = x + m["fc2"](torch.nn.functional.gelu(m["fc1"](x)))
    assert torch.equal(got, x)
