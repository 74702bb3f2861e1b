"""resolve: patterns, variants of blocks, and every error a plan can give.
Uses handmade graphs and rules, no tracer.
"""

import time
from dataclasses import replace

import handmade
import pytest

from autopar.errors import PlanError
from autopar.ir.mesh import Mesh
from autopar.ir.types import S
from autopar.pas.address import matches
from autopar.pas.plan import Plan
from autopar.pas.resolve import resolve

TP = Mesh((("tp", 2),))
GRID = Mesh((("dp", 2), ("tp", 4)))


@pytest.fixture(autouse=True)
def rules(monkeypatch):
    monkeypatch.setattr("autopar.rules.recipe_of", handmade.recipe_of, raising=False)


@pytest.mark.parametrize(
    ("pattern", "address", "expected"),
    [
        ("model.layers.3.up/linear", "model.layers.3.up/linear", True),
        ("model.layers.*.up/linear", "model.layers.3.up/linear", True),
        ("model.layers.*.up/*", "model.layers.3.up/linear", True),
        ("model.layers.*/linear", "model.layers.3.up/linear", False),
        ("model.**.up/linear", "model.layers.3.up/linear", True),
        ("**.up/linear", "up/linear", True),
        ("**/linear", "up/linear", True),
        ("**", "/add", True),
        ("model.layers.3.**", "model.layers.3/add", True),
        ("model.layers.3.**", "model.layers.3.up/linear", True),
        ("model.layers.3.**", "model.layers.31.up/linear", False),
        ("model.layers.3.**.up/*", "model.layers.3.up/linear", True),
        ("**.*_proj/*", "layers.0.q_proj/linear", True),
        ("**.*_proj/*", "layers.0.norm/linear", False),
        ("add", "/add", True),
        ("/add", "/add", True),
        ("/add*", "/add#1", True),
        ("/add", "/add#1", False),
        ("**/add#1", "model.layers.0/add#1", True),
        ("a.**.b.**.c/f", "a.x.b.b.y.c/f", True),
        ("a.**.b.**.c/f", "a.x.y.c/f", False),
    ],
)
def test_patterns(pattern, address, expected):
    assert matches(pattern, address) is expected


def test_instances_whose_parameters_are_placed_differently_are_variants():
    plan = Plan(TP, params={"model.layers.1.up.weight": {"tp": "S(0)"}})
    r = resolve(handmade.stack(), plan)
    layers = {v.instances for v in r.variants.values() if v.block == "Layer"}
    assert len(layers) == 2 and ("model.layers.1",) in layers
    alike = resolve(handmade.stack(), Plan(TP, params={"model.layers.*.up.weight": {"tp": "S(0)"}}))
    assert list(alike.variants) == ["Layer", "Model"]


def test_one_variant_when_all_instances_are_alike():
    r = resolve(handmade.stack(), Plan(TP, {"model.layers.*.up/linear": {"tp": "n"}, "**.down/linear": {"tp": "k"}}))
    assert list(r.variants) == ["Layer", "Model"]
    assert r.variants["Layer"].choices == {
        "norm/layer_norm": ("I",), "up/linear": ("n",), "/gelu": ("I",), "down/linear": ("k",), "/add": ("I",),
    }  # fmt: skip
    assert r.variants["Layer"].instances == tuple(f"model.layers.{i}" for i in range(4))
    assert r.variants["Model"].callees == {f"model.layers.{i}": "Layer" for i in range(4)}
    assert r.root == "Model" and r.variants["Model"].instances == ("",)


def test_an_instance_by_name_makes_a_variant():
    r = resolve(handmade.stack(), Plan(TP, {"model.layers.*.up/linear": {"tp": "n"}, "model.layers.2.up/linear": {"tp": "I"}}))
    assert r.variants["Layer"].instances == ("model.layers.0", "model.layers.1", "model.layers.3")
    assert r.variants["Layer_2"].instances == ("model.layers.2",)
    assert r.variants["Layer_2"].choices["up/linear"] == ("I",)
    assert r.variants["Model"].callees["model.layers.2"] == "Layer_2"


def test_equal_choices_written_per_instance_stay_one_variant():
    r = resolve(handmade.stack(), Plan(TP, {f"model.layers.{i}.up/linear": {"tp": "n"} for i in range(4)}))
    assert list(r.variants) == ["Layer", "Model"]


def test_later_entries_win_axis_by_axis():
    plan = Plan(GRID, {"**.up/linear": {"dp": "b", "tp": "n"}, "model.**.up/*": {"tp": "k"}})
    assert resolve(handmade.stack(), plan).variants["Layer"].choices["up/linear"] == ("b", "k")


def test_nested_blocks():
    r = resolve(handmade.nested(), Plan(TP, {"outer.*.inner.*.up/linear": {"tp": "n"}, "outer.1.inner.0.**": {"tp": "b"}}))
    assert {n: v.instances for n, v in r.variants.items()} == {
        "Layer": ("outer.0.inner.0", "outer.0.inner.1", "outer.1.inner.1", "outer.2.inner.0", "outer.2.inner.1"),
        "Outer": ("outer.0", "outer.2"),
        "Layer_2": ("outer.1.inner.0",),
        "Outer_2": ("outer.1",),
        "Model": ("",),
    }
    assert r.variants["Outer_2"].callees == {"inner.0": "Layer_2", "inner.1": "Layer"}


def test_axes_may_share_a_factor():
    r = resolve(handmade.stack(), Plan(GRID, {"**.up/linear": {"dp": "n", "tp": "n"}}))
    assert r.variants["Layer"].choices["up/linear"] == ("n", "n")


def test_parameters_by_pattern():
    plan = Plan(
        GRID, params={"model.layers.*.up.*": {"dp": "S(0)"}, "model.layers.1.up.weight": {"tp": "S(0)"}, "embed.weight": {"tp": "R"}}
    )
    params = resolve(handmade.stack(2), plan).params
    assert params["model.layers.0.up.weight"] == {"dp": S(0)}
    assert params["model.layers.1.up.weight"] == {"dp": S(0), "tp": S(0, 1)}
    assert set(params) == {
        "model.layers.0.up.weight",
        "model.layers.0.up.bias",
        "model.layers.1.up.weight",
        "model.layers.1.up.bias",
        "embed.weight",
    }


@pytest.mark.parametrize(
    ("mesh", "ops", "message"),
    [
        (TP, {"model.layers.*.upp/linear": {"tp": "n"}},
         "plan entry 'model.layers.*.upp/linear' matches no op of this graph; the nearest is 'model.layers.*.up/linear'"),
        (TP, {"model.layers.7.up/linear": {"tp": "n"}}, "plan entry 'model.layers.7.up/linear' matches no op"),
        (TP, {"**.up/linear": {"pt": "n"}}, "plan entry '**.up/linear' names an unknown mesh axis 'pt'; did you mean 'tp'? Valid: tp"),
        (Mesh(), {"**.up/linear": {"tp": "n"}}, "unknown mesh axis 'tp'; the mesh has no axes"),
        (TP, {"**.up/linear": {"tp": "m"}},
         "model.layers.0.up/linear (model.py:11: %5 = linear(...)): 'm' on axis 'tp' is not a factor of linear. Its factors: "
         "b (size 4), t (size 8), k (size 16), n (size 64); 'I', 'R', 'P' always fit"),
        (TP, {"model.layers.*.norm/*": {"tp": "d"}},
         "model.layers.0.norm/layer_norm (model.py:10: %2 = layer_norm(...)): factor 'd' may not be split: the op needs it whole. "
         "Its factors: b (size 4), t (size 8), d (size 16, may not be split)"),
        (Mesh((("tp", 3),)), {"**.up/linear": {"tp": "n"}},
         "factor 'n' has size 64 (dim 2 of output 0, shape (4, 8, 64)), which tp=3 does not divide"),
        (Mesh((("a", 2), ("b", 4))), {"**.up/linear": {"a": "b", "b": "b"}},
         "factor 'b' has size 4 (dim 0 of output 0, shape (4, 8, 64)), which a=2 x b=4 = 8 does not divide"),
        (Mesh((("tp", 32),)), {"**.up/linear": {"tp": "k"}},
         "factor 'k' has size 16 (dim 2 of input 0, shape (4, 8, 16)), which tp=32 does not divide"),
        (TP, {"**/layer_norm": {"tp": "P"}}, "'P' on axis 'tp', but the op is not linear in any input"),
        (TP, {"**.up/linear": {"tp": "P:2"}}, "'P:2' on axis 'tp' names no linear group of the op; "
         "it has 'P:0' (inputs 0), 'P:1' (inputs 1)"),
        (TP, {"/mystery": {"tp": "b"}},
         "/mystery (model.py:16: %10 = mystery(...)): the plan asks for 'b' on axis 'tp', "
         "but no rule knows mystery: it can only be 'I' or 'R'"),
        (TP, {"/mul_": {"tp": "b"}}, "the plan asks for 'b' on axis 'tp', "
         "but a mutation is seen through an alias here: the op must stay 'I'"),
        (TP, {"**.up/linear": {"tp": "n/5"}}, "factor 'n/5' may not be split: its size 64 does not make 5 equal groups"),
        (Mesh((("tp", 16),)), {"**.up/linear": {"tp": "n/8"}}, "factor 'n' has size 64 / 8 groups "
         "(dim 2 of output 0, shape (4, 8, 64)), which tp=16"),
        (GRID, {"**.up/linear": {"dp": "n/2", "tp": "n"}}, "factor 'n' is split inside 2 groups, which only one axis may do"),
        (TP, {"embed/*": {"tp": "v/2"}}, "the local form depends on which entries a rank holds"),
    ],
)  # fmt: skip
def test_errors(mesh, ops, message):
    with pytest.raises(PlanError) as e:
        resolve(handmade.stack(), Plan(mesh, ops))
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"embde.weight": {"tp": "R"}},
            "plan entry 'embde.weight' of params matches no parameter or buffer; the nearest is 'embed.weight'",
        ),
        ({"embed.weight": {"tp": "S(2)"}}, "S(2) of a tensor of shape (24, 16), which has no dim 2"),
        ({"embed.weight": {"tp": "S(0)", "dp": "S(0)"}}, ""),
        ({"head.bias": {"tp": "S(0/4)"}}, "params['head.bias'] on axis 'tp': dim 0 has size 24, which 16 does not divide"),
        ({"head.bias": {"tp": "P"}}, "a parameter cannot be placed 'P'"),
        ({"head.bias": {"tp": "T"}}, "'T' is not an axis type"),
        ({"head.bias": {"zz": "R"}}, "unknown mesh axis 'zz'"),
        ({"model.layers.0.up.bias": {"dp": "S(0/2)", "tp": "S(0)"}}, "sharded inside groups, which only one axis may do"),
    ],
)
def test_parameter_errors(params, message):
    if not message:
        assert resolve(handmade.stack(), Plan(GRID, params=params)).params["embed.weight"] == {"dp": S(0), "tp": S(0, 1)}
        return
    with pytest.raises(PlanError) as e:
        resolve(handmade.stack(), Plan(GRID, params=params))
    assert message in str(e.value)


def test_plan_for_another_graph(monkeypatch):
    monkeypatch.setattr(type(handmade.stack()), "fingerprint", property(lambda g: f"{len(g.tensors):064d}"))
    plan = Plan(
        TP, {"model.layers.*.up/linear": {"tp": "n"}, "model.layers.3.down/linear": {"tp": "k"}}, graph=handmade.stack(4).fingerprint
    )
    resolve(handmade.stack(4), plan)
    with pytest.raises(
        PlanError, match=r"made for graph 0+, this one is 0+: these op addresses are not in this graph: model.layers.3.down/linear"
    ):
        resolve(handmade.stack(2), plan)
    with pytest.raises(PlanError, match="shapes, arguments or constants differ"):
        resolve(handmade.stack(5), plan)
    with pytest.raises(PlanError, match=r"these parameters are not in this graph: model.layers.3.up.bias"):
        resolve(handmade.stack(2), Plan(TP, params={"model.layers.3.up.bias": {"tp": "R"}}, graph="ff"))
    assert resolve(handmade.stack(5), replace(plan, graph="")).variants


def test_cost_does_not_grow_with_depth():
    ops = {f"model.layers.*.{p}/*": {"tp": "b"} for p in ("up", "down", "norm")} | {"model.layers.*/*": {"tp": "b"}}
    times = []
    for n in (16, 512):
        graph = handmade.stack(n)
        start = time.process_time()
        resolve(graph, Plan(TP, ops))
        times.append(time.process_time() - start)
    assert times[1] < 0.05, times
