"""The built-in policies, policies by patterns, random plans; their settings and errors.
Uses handmade graphs and rules, no tracer.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import handmade
import pytest

from autopar.config import ComputeConfig
from autopar.errors import ConfigError, PlanError
from autopar.ir.graph import Graph
from autopar.ir.mesh import Mesh
from autopar.pas.build import find_ops, plan_from, split_share
from autopar.pas.plan import Plan
from autopar.pas.policies import get_policy, mesh_policy, policies, random_plan
from autopar.pas.resolve import resolve

TP = Mesh((("tp", 2),))


@pytest.fixture(autouse=True)
def rules(monkeypatch):
    monkeypatch.setattr("autopar.rules.recipe_of", handmade.recipe_of)
    monkeypatch.setattr(Graph, "fingerprint", "")


def choices(graph, plan, variant="Layer"):
    return {k: v[0] if len(v) == 1 else v for k, v in resolve(graph, plan).variants[variant].choices.items()}


# ---- dp, tp, data ------------------------------------------------------------------------------------------------------------


def test_dp():
    plan = policies["dp"](handmade.stack(), ComputeConfig(1, 4))
    assert plan == Plan(policy="dp")


def test_data_splits_the_batch_everywhere():
    graph = handmade.stack()
    plan = policies["data"](graph, ComputeConfig(2))
    assert plan.mesh == Mesh((("dp", 2),))
    assert set(choices(graph, plan).values()) == {"b"}
    assert choices(graph, plan, "Model") == {"embed/embedding": "b", "head/linear": "b", "/mystery": "I", "/mul_": "I"}
    assert split_share(graph, plan) == 1.0


def test_data_with_a_batch_that_does_not_divide_is_unsplit():
    assert policies["data"](handmade.stack(), ComputeConfig(3)).ops == {}


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_tp_splits_every_matmul(n, seed):
    graph = handmade.stack()
    plan = policies["tp"](graph, ComputeConfig(n, pas_config={"seed": seed}))
    assert split_share(graph, plan) == 1.0
    assert len(resolve(graph, plan).variants) == 2


def test_tp_seeds_differ_and_default_is_one():
    graph = handmade.stack()
    plans = [policies["tp"](graph, ComputeConfig(2, pas_config={"seed": s})) for s in range(8)]
    assert len({p.to_json() for p in plans}) > 4
    assert policies["tp"](graph, ComputeConfig(2)) == plans[1]


@pytest.mark.parametrize("name", ["tp", "data"])
def test_one_device_needs_no_axis(name):
    assert policies[name](handmade.stack(), ComputeConfig(1)).mesh == Mesh()


def test_same_plan_for_every_hash_seed():
    code = (
        "import sys; sys.path.insert(0, 'tests'); import handmade, autopar.rules as r; r.recipe_of = handmade.recipe_of\n"
        "from autopar.ir.graph import Graph; Graph.fingerprint = ''\n"
        "from autopar.ir.mesh import Mesh; from autopar.pas.policies import *; from autopar.config import ComputeConfig\n"
        "g = handmade.stack(); print(tp(g, ComputeConfig(2)).to_json(), random_plan(g, Mesh((('a', 2), ('b', 2))), 3).to_json())"
    )
    root = Path(__file__).parent.parent
    runs = {
        subprocess.run([sys.executable, "-c", code], cwd=root, env={"PYTHONHASHSEED": str(s)}, capture_output=True, check=True).stdout
        for s in range(3)
    }
    assert len(runs) == 1 and len(runs.pop()) > 500


# ---- settings and names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("dp", ComputeConfig(2, 4), "plan_ngpus must be 1, not 2; set plan_ngpus=1 and runtime_ngpus=4"),
        ("dp", ComputeConfig(1, pas_config={"seed": 1}), "policy 'dp' has no setting 'seed': it takes none"),
        ("data", ComputeConfig(2, pas_config={"seed": 1}), "policy 'data' has no setting 'seed': it takes none"),
        ("tp", ComputeConfig(2, pas_config={"sede": 1}), "policy 'tp' has no setting 'sede': did you mean 'seed'? Valid: seed"),
        ("tp", ComputeConfig(2, pas_config={"seed": "x"}), "pas_config['seed'] is 'x'; it must be a whole number"),
    ],
)
def test_bad_settings(name, config, message):
    with pytest.raises(ConfigError) as e:
        policies[name](handmade.stack(), config)
    assert message in str(e.value)


@pytest.mark.parametrize(("name", "pas"), [("dp", {"_note": 1}), ("tp", {"_note": 1, "seed": 2})])
def test_free_settings(name, pas):
    assert policies[name](handmade.stack(), ComputeConfig(1 if name == "dp" else 2, pas_config=pas))


def test_unknown_policy():
    with pytest.raises(ConfigError, match=r"unknown policy 'dta': did you mean 'data'\? Valid: data, dp, tp; or pass a function"):
        get_policy("dta")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda g, c: None, "returned NoneType, not a Plan"),
        (lambda g, c: Plan(Mesh((("tp", 4),))), r"made a plan for mesh\(tp=4\) of 4 devices, but plan_ngpus is 2"),
    ],
)
def test_own_policy_errors(policy, message):
    with pytest.raises(PlanError, match=message):
        get_policy(policy)(handmade.stack(), ComputeConfig(2))


def test_own_policy():
    def mine(graph, config):
        return plan_from(graph, TP, {"**.up/linear": {"tp": "S(-1)"}})

    plan = get_policy(mine)(handmade.stack(), ComputeConfig(2))
    assert plan.policy == "mine" and plan.ops == {"model.layers.*.up/linear": {"tp": "n"}}


# ---- policies by patterns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("n", "n"), ("I", "I"), ("R", "R"), ("P", "P"), ("S(2)", "n"), ("S(-1)", "n"), ("S(0)", "b"), ("S(-1/4)", "n/4"), ("in:S(2)", "k"),
     ("in:S(-1)", "k"), ("in:S(1)", "t"), ("n?", "n"), ("zz?", "I"), ("in:S(-1)?", "k")],
)  # fmt: skip
def test_choices_by_dim(text, expected):
    graph = handmade.stack()
    assert choices(graph, plan_from(graph, TP, {"**.up/linear": {"tp": text}}))["up/linear"] == expected


def test_optional_choices_skip_what_does_not_fit():
    graph = handmade.stack()
    plan = plan_from(graph, Mesh((("tp", 16),)), {"**": {"tp": "S(1)?"}, "**.up/*": {"tp": "S(-1)?"}, "**.norm/*": {"tp": "S(-1)?"}})
    assert plan.ops == {"model.layers.*.up/linear": {"tp": "n"}}  # 8 positions are not divided by 16, layer_norm needs its last dim


@pytest.mark.parametrize(
    ("pattern", "text", "message"),
    [
        (
            "**.norm/*",
            "S(-1)",
            "norm/layer_norm (model.py:10): 'S(-1)' asks for a split of its first output of shape (4, 8, 16), which has none there",
        ),
        ("**.up/*", "S(7)", "'S(7)' asks for a split of its first output"),
        ("**.up/*", "in:S(7)", "'in:S(7)' asks for a split of its first data input"),
        ("**.up/*", "S(x)", "'S(x)' is not a choice: 'S(x)' is not an axis type"),
        ("/mystery", "S(0)", "no rule knows mystery"),
        ("**.upp/*", "S(0)", "matches no op of this graph; the nearest is"),
    ],
)
def test_pattern_errors(pattern, text, message):
    with pytest.raises(PlanError) as e:
        plan_from(handmade.stack(), TP, {pattern: {"tp": text}})
    assert message in str(e.value)


def test_find_ops():
    graph = handmade.stack(4)
    found = find_ops(graph, matmul=True)
    assert {f.address: f.matmul_flops for f in found} == {
        "model.layers.*.up/linear": 4 * 2 * 4 * 8 * 16 * 64,
        "model.layers.*.down/linear": 4 * 2 * 4 * 8 * 16 * 64,
        "head/linear": 2 * 4 * 8 * 16 * 24,
    }  # fmt: skip
    assert [f.address for f in find_ops(graph, "model.layers.2.**", fn="linear")] == [
        "model.layers.*.up/linear",
        "model.layers.*.down/linear",
    ]
    assert [f.op.fn for f in find_ops(graph, fn="gelu")] == ["gelu"]
    with pytest.raises(PlanError, match=r"pattern 'nothing.\*\*' matches no op"):
        find_ops(graph, "nothing.**")


# ---- several axes, random plans ------------------------------------------------------------------------------------------------


def test_mesh_of_built_in_policies():
    graph = handmade.stack()
    plan = mesh_policy({"dp": (2, "data"), "tp": (2, "tp")})(graph, ComputeConfig(4))
    got = choices(graph, plan)
    assert plan.mesh == Mesh((("dp", 2), ("tp", 2))) and plan.policy == "data+tp"
    assert all(c[0] == "b" for c in got.values())
    assert all(got[op][1] in ("b", "t", "k", "n") for op in ("up/linear", "down/linear"))


def test_mesh_with_an_own_policy():
    def megatron(graph, config):
        return plan_from(graph, Mesh((("x", config.plan_ngpus),)), {"**.up/linear": {"x": "S(-1)"}, "model.layers.1.up/linear": {"x": "I"}})

    graph = handmade.stack()
    for axes in ({"dp": (2, "data"), "tp": (4, megatron)}, {"tp": (4, megatron), "dp": (2, "data")}):
        plan = mesh_policy(axes)(graph, ComputeConfig(8))
        index = list(axes).index("tp")
        got = resolve(graph, plan)
        assert got.variants["Layer"].choices["up/linear"][index] == "n" and got.variants["Layer"].choices["up/linear"][1 - index] == "b"
        assert got.variants["Layer_2"].choices["up/linear"][index] == "I" and got.variants["Layer_2"].instances == ("model.layers.1",)


def test_mesh_size_must_fit():
    with pytest.raises(ConfigError, match=r"mesh\(dp=2, tp=2\) has 4 devices, but plan_ngpus is 2"):
        mesh_policy({"dp": (2, "data"), "tp": (2, "tp")})(handmade.stack(), ComputeConfig(2))


@pytest.mark.parametrize("sizes", [(2,), (4,), (2, 2), (2, 4), (2, 2, 2)])
@pytest.mark.parametrize("graph", [handmade.stack(), handmade.nested()])
def test_random_plans_are_legal(graph, sizes):
    mesh = Mesh(tuple((n, k) for n, k in zip("abc", sizes)))
    seen = set()
    for seed in range(10):
        plan = random_plan(graph, mesh, seed)
        seen |= {c for v in resolve(graph, plan).variants.values() for t in v.choices.values() for c in t}
        assert Plan.from_json(plan.to_json()) == plan
    assert {"I", "R", "P", "b", "n", "k"} <= seen


def test_alternating_blocks_keep_their_own_choices():
    # two blocks whose instances share the pattern 'layers.*': the plan must tell them apart
    graph = handmade.stack(4, "layers")
    layer, root = graph.blocks["Layer"], graph.blocks["Model"]
    odd = replace(layer, name="Odd", instances=("layers.1", "layers.3"))
    ops = tuple(replace(op, block="Odd") if op.id in odd.instances else op for op in root.ops)
    blocks = {"Layer": replace(layer, instances=("layers.0", "layers.2")), "Odd": odd, "Model": replace(root, ops=ops)}
    graph = replace(graph, blocks=blocks)
    for seed in range(5):
        plan = random_plan(graph, TP, seed)
        again = plan_from(graph, TP, plan.ops)
        assert resolve(graph, plan).variants == resolve(graph, again).variants
        got = resolve(graph, plan).variants
        assert got["Layer"].instances == ("layers.0", "layers.2") and got["Odd"].instances == ("layers.1", "layers.3")
    assert got["Layer"].choices != got["Odd"].choices
