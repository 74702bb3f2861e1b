"""Graphs through JSON and safetensors and back, fingerprints, printed text."""

import json
import math

import pytest
import torch
from handmade import stack
from recorder import F, Recorder

from autopar.errors import SavedirError
from autopar.ir.codec import decode, encode, graph_fingerprint, graph_from_json, graph_to_json, load_graph, save_graph
from autopar.ir.graph import Global, Param, Ref, Source, Struct
from autopar.ir.mesh import Mesh
from autopar.ir.text import format_graph
from autopar.ir.types import I, R, S
from autopar.lower.program import Convert, Local, LoweredBlock, Program, TypedValue
from autopar.pas.plan import Plan
from autopar.trace.build import build

LITERALS = [
    None,
    True,
    1,
    0,
    -3,
    2**70,
    1.0,
    -0.0,
    0.1,
    1e-320,
    math.inf,
    -math.inf,
    1j,
    complex(math.inf, -0.0),
    "text \u00e9 \"'\n",
    "",
    ...,
    torch.float32,
    torch.bfloat16,
    torch.device("cuda", 1),
    torch.device("cpu"),
    torch.strided,
    torch.channels_last,
    slice(None, 3, Ref(2)),
    slice(Ref(1), None),
    Global("autopar:device"),
    (1, (2, [3, {"a": Ref(0), 1: (None,)}])),
    [],
    (),
    {},
    Struct("m:C", ("a", "b"), (Ref(1), None)),
    (1, True, 1.0),
]


@pytest.mark.parametrize("x", LITERALS, ids=repr)
def test_literals_come_back_equal_and_of_the_same_type(x):
    back = decode(json.loads(json.dumps(encode(x))))
    assert back == x
    assert repr(back) == repr(x)
    assert type(back) is type(x)


def test_nan_comes_back():
    assert math.isnan(decode(json.loads(json.dumps(encode(float("nan"))))))


def test_unknown_objects_are_refused_by_name():
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        encode(torch.zeros(2))


CONSTANTS = {
    "constant0": torch.tensor([1.0, math.nan, math.inf, -0.0]),
    "a.constant0": torch.tensor(3),
    "a.constant1": torch.randn(2, 3, dtype=torch.complex64).conj(),
    "a.constant2": torch.randn(3, dtype=torch.complex128),
    "a.constant3": torch.randn(4, 6).T[1:3],
    "a.constant4": torch.zeros(0, 3),
    "a.constant5": torch.tensor([True, False]),
    "a.constant6": torch.randn(3).to(torch.float8_e4m3fn),
    "a.constant7": torch.randn(3, 1).expand(3, 4).bfloat16(),
    "a.constant8": torch.tensor(2.5 + 1j),
    "a.constant9": torch.tensor([1, 2, 65535], dtype=torch.uint16),
}


def graph_with_constants():
    r = Recorder()
    x = r.input()
    for name, t in CONSTANTS.items():
        dtype = str(t.dtype).removeprefix("torch.")
        x = r.op(
            F + "f", x, r.tensor(name, tuple(t.shape), "constant", False, data=t, dtype=dtype), scale=float("inf"), dtype=torch.float16
        )
    return build(r.done({"y": x, "z": (x, None)}))


def bits(t):
    t = t.resolve_conj().contiguous().reshape(-1)
    return (torch.view_as_real(t) if t.is_complex() else t).reshape(-1).view(torch.uint8).tolist()


def test_saved_graphs_come_back_with_their_constants(tmp_path):
    g = graph_with_constants()
    save_graph(g, tmp_path)
    back = load_graph(tmp_path)
    assert back == g
    assert back.fingerprint == g.fingerprint
    assert back.constants.keys() == g.constants.keys()
    for name, t in g.constants.items():
        b = back.constants[name]
        assert (b.dtype, b.shape, bits(b)) == (t.dtype, t.shape, bits(t)), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["constants.safetensors", "graph.json"]


@pytest.mark.parametrize("g", [stack(), graph_with_constants()], ids=["stack", "constants"])
def test_json_is_stable(g):
    text = graph_to_json(g)
    assert graph_to_json(graph_from_json(text)) == text
    assert graph_from_json(text) == g


BROKEN = {
    "": "not valid JSON: .* line 1",
    "[]": "no 'format' field",
    '{"format": 99}': "another graph format",
    '{"format": 1}': "damaged: KeyError: 'blocks'",
    '{"format": 1, "blocks": [], "surprise": 1}': "damaged: TypeError: .*surprise",
    '{"format": 1, "blocks": [{"name": {"what": 1}}]}': "damaged: KeyError: 'what'",
}


@pytest.mark.parametrize(("text", "message"), BROKEN.items())
def test_broken_json_says_what_is_wrong(text, message):
    with pytest.raises(SavedirError, match=message):
        graph_from_json(text)


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(SavedirError, match=r"cannot read .*graph\.json: No such file"):
        load_graph(tmp_path)
    save_graph(graph_with_constants(), tmp_path)
    file = tmp_path / "constants.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(SavedirError, match=r"cannot read .*constants\.safetensors"):
        load_graph(tmp_path)


def recording(line=1, scale=2.0, hint="y", constant=1.0, weight="fc.weight", shape=(2, 4), module_file="model.py"):
    r = Recorder()
    x = r.op(F + "linear", r.input(), r.tensor(weight), out=hint, line=line, shape=shape)
    x = r.op(F + "f", x, r.tensor("c", (1,), "constant", data=torch.tensor([constant])), scale=scale)
    return r.done(x)


DIFFER = [{"scale": 2}, {"scale": 2.5}, {"constant": 1.5}, {"weight": "fd.weight"}, {"shape": (4, 2)}, {"constant": -0.0}]


@pytest.mark.parametrize("change", DIFFER, ids=str)
def test_fingerprints_tell_graphs_apart(change):
    assert graph_fingerprint(build(recording(**change))) != graph_fingerprint(build(recording()))


@pytest.mark.parametrize("change", [{"line": 7}, {"hint": "other"}, {}], ids=str)
def test_fingerprints_do_not_depend_on_source_positions_or_names(change):
    assert graph_fingerprint(build(recording(**change))) == graph_fingerprint(build(recording()))


def test_printed_graph():
    r = Recorder("pkg.Model")
    x = r.input("x", (4, 6, 64))
    with r.call("self_attn"):
        q = r.op(F + "linear", x, r.tensor("self_attn.q.weight", (64, 64)), out="q", shape=(4, 6, 64), line=254)
        q = r.inplace("torch.Tensor.__setitem__", q, (slice(None), 0), 0.5)
    r.guard(q, "bool", True, line=9)
    text = format_graph(build(r.done((q,))))
    expected = [
        "  input %0 x: f32[4,6,64]",
        "  param %1 self_attn.q.weight: f32[64,64]",
        "  %2 q: f32[4,6,64] = linear(%0, %1)  # self_attn  model.py:254",
        "  setitem(%2, (:, 0), 0.5) writes %2 -> %3  # self_attn  model.py:1",
        "  guard bool(%3) == True  # model.py:9",
        "  return %3",
    ]
    assert text.splitlines()[-6:] == expected


def test_printed_program():
    mesh = Mesh((("dp", 2), ("tp", 4)))
    src = Source("/home/me/model.py", 12, "forward", "return self.fc(x)")
    value = lambda i, name, *t: TypedValue(i, i, name, "tensor", (4, 8), "float32", True, t)  # noqa: E731
    values = (value(0, "x", I, I), value(1, "weight", R, S(0)), value(2, "x", S(0), R), value(3, "y", S(0), S(1)))
    body = (
        Convert(0, 2, "dp", I, S(0), copy=True),
        Local("fc/linear", F + "linear", (Ref(2), Ref(1)), {}, Ref(3), ("b", "n"), src, path="fc", divide=2, rng=("tp",)),
    )
    block = LoweredBlock("Model", "Model", (0,), (3,), (Param("fc.weight", 1, "param"),), values, body, instances=("",))
    program = Program(mesh, "Model", {"Model": block}, (), Ref(3), Plan(mesh))
    assert str(program).splitlines()[3:] == [
        "block Model  # root, from Model",
        "  input %0 x: f32[4,8]",
        "  param %1 fc.weight: f32[4,8 @dp:R tp:S(0)]",
        "  %2 x: f32[4,8 @dp:S(0) tp:R] = %0: I -> S(0) on dp [copy]",
        "  %3 y: f32[4,8 @dp:S(0) tp:S(1)] = linear(%2, %1) [split dp:b tp:n, / 2, random per tp]  # fc  model.py:12",
        "  return %3",
    ]
