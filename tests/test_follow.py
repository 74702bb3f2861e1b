"""follow: unnamed ops take the choice with the least conversion cost and never invent a split.
Uses handmade graphs and rules, no tracer.
"""

import handmade
import pytest
from handmade import B, D, H, Maker, T

from autopar.ir.graph import Argument, Graph, Ref
from autopar.ir.mesh import Mesh
from autopar.pas.build import plan_from
from autopar.pas.follow import follow
from autopar.pas.plan import Plan
from autopar.pas.resolve import resolve

TP = Mesh((("tp", 2),))
GRID = Mesh((("dp", 2), ("tp", 2)))


@pytest.fixture(autouse=True)
def rules(monkeypatch):
    monkeypatch.setattr("autopar.rules.recipe_of", handmade.recipe_of)
    monkeypatch.setattr(Graph, "fingerprint", "")


def choices(graph, plan, variant="Layer"):
    return {k: v[0] if len(v) == 1 else v for k, v in resolve(graph, plan).variants[variant].choices.items()}


def chain(*ops) -> Graph:
    """A graph of ops 'name fn arg arg...' on inputs x, y and parameter w, named one after another."""
    m = Maker("Model")
    known = {"x": m.input("x", (B, T, D)), "y": m.input("y", (B, T, D)), "n": m.input("n", (B, T, D), grad=False),
             "w": m.param("w", (D, D)), "b": m.param("b", (D,)), "v": m.param("v", (B, T, D))}  # fmt: skip
    for text in ops:
        name, fn, *args = text.split()
        grad = any(m.values[known[a].id].grad for a in args)
        known[name] = m.op(f"/{name}", fn, [known[a] for a in args], (B, T, D), grad=grad)
    root = m.block([known[ops[-1].split()[0]]])
    arguments = tuple(Argument(k, "positional", known[k], True) for k in "xyn")
    return Graph("Model", {"Model": root}, (), arguments, Ref(root.outputs[0]), False, True)


COLUMN, ROW = "lin linear x w b", "row linear lin w b"


@pytest.mark.parametrize(
    ("ops", "named", "expected"),
    [
        (["g gelu x"], {}, {"g": "I"}),  # nothing arrives sharded: nothing is split
        ([COLUMN, "g gelu lin"], {"lin": "n"}, {"g": "d"}),  # follows the shards
        ([COLUMN, "g layer_norm lin b"], {"lin": "n"}, {"g": "I"}),  # cannot follow
        ([COLUMN, "row linear lin w b"], {"lin": "n"}, {"row": "k"}),  # row split of what arrives sharded on k
        ([COLUMN, "row linear lin w b", "s add x row"], {"lin": "n"}, {"row": "k", "s": "I"}),  # I + P -> I, one all-reduce
        ([COLUMN, ROW, "q linear lin w b", "s add row q"], {"lin": "n"}, {"s": "P"}),  # P + P stays P
        ([COLUMN, ROW, "s add row v"], {"lin": "n"}, {"s": "P"}),  # a parameter enters a sum of P on the first rank
        ([COLUMN, ROW, "s mul row v"], {"lin": "n"}, {"s": "P"}),  # linear in row alone
        ([COLUMN, ROW, "s mul row row"], {"lin": "n"}, {"s": "I"}),  # not linear in both
        ([COLUMN, ROW, "s gelu row"], {"lin": "n"}, {"s": "I"}),
        ([COLUMN, "s add lin x"], {"lin": "n"}, {"s": "d"}),  # a tie prefers the split
        (["r gelu x", "s gelu r"], {"r": "R"}, {"s": "R"}),  # R stays R
        (["r gelu x", "s add r v"], {"r": "R"}, {"s": "R"}),  # parameters go along
        (["r gelu x", "s add r n"], {"r": "R"}, {"s": "R"}),  # so do values without gradient
        (["r gelu x", "s add r y"], {"r": "R"}, {"s": "I"}),  # y arrives I
        (["r gelu n", "s gelu r"], {"r": "R"}, {"s": "I"}),  # no gradient: R is I
        (["f gelu x", "s gelu f"], {"f": "t"}, {"s": "t"}),
        (["f gelu x", "g gelu y", "s add f g"], {"f": "t", "g": "b"}, {"s": "t"}),  # one of both is converted
        ([COLUMN, "m mystery lin"], {"lin": "n"}, {"m": "I"}),  # no rule
    ],
)
def test_one_axis(ops, named, expected):
    graph = chain(*ops)
    plan = follow(graph, Plan(TP, {f"/{k}": {"tp": c} for k, c in named.items()}))
    got = choices(graph, plan, "Model")
    assert {k: got[f"/{k}"] for k in expected} == expected
    assert {k: got[f"/{k}"] for k in named} == named


def test_layers_take_the_steady_state():
    # the first layer gets I from the embedding, the others get what the layer before leaves
    graph = handmade.stack(4)
    plan = follow(graph, Plan(TP, {"model.layers.*/add": {"tp": "t"}}))
    assert choices(graph, plan) == {"norm/layer_norm": "t", "up/linear": "t", "/gelu": "t", "down/linear": "t", "/add": "t"}
    assert choices(graph, plan, "Model")["head/linear"] == "t"


def test_instances_named_apart_are_followed_apart():
    graph = handmade.stack(3)
    plan = follow(graph, Plan(TP, {"model.layers.1.up/linear": {"tp": "n"}}))
    assert {n: v.instances for n, v in resolve(graph, plan).variants.items()} == {
        "Layer": ("model.layers.0", "model.layers.2"), "Layer_2": ("model.layers.1",), "Model": ("",),
    }  # fmt: skip
    assert choices(graph, plan, "Layer_2") == {"norm/layer_norm": "I", "up/linear": "n", "/gelu": "d", "down/linear": "k", "/add": "I"}
    assert set(choices(graph, plan).values()) == {"I"}


def test_nested_blocks():
    graph = handmade.nested()
    plan = follow(graph, Plan(TP, {"outer.*.inner.*.up/linear": {"tp": "n"}}))
    assert choices(graph, plan)["down/linear"] == "k"
    assert list(plan.ops) == [f"outer.*.inner.*{op}" for op in (".up/linear", "/gelu", ".down/linear")]


def test_axes_one_by_one_and_products():
    graph = handmade.stack(2)
    plan = follow(graph, Plan(GRID, {"**.up/linear": {"dp": "b", "tp": "n"}, "embed/*": {"dp": "b"}}))
    assert choices(graph, plan) == {
        "norm/layer_norm": ("b", "I"), "up/linear": ("b", "n"), "/gelu": ("b", "d"), "down/linear": ("b", "k"), "/add": ("b", "I"),
    }  # fmt: skip
    big = Mesh((("dp", 4), ("tp", 2)))  # b has size 4: both axes cannot split it
    plan = follow(
        graph, Plan(big, {"**.norm/*": {"dp": "b"}, "**.up/*": {"dp": "b"}, "**/gelu": {"tp": "b"}}), start={"ids": {"tp": "S(0)"}}
    )
    assert resolve(graph, plan)


def test_start_takes_inputs_as_sharded():
    graph = handmade.stack(2)
    plan = follow(graph, Plan(TP), start={"ids": {"tp": "S(0)"}})
    assert set(choices(graph, plan).values()) == {"b"}
    odd = follow(graph, Plan(Mesh((("tp", 3),))), start={"ids": {"tp": "S(0)"}})  # 4 rows, 3 devices
    assert odd.ops == {}


def test_what_is_named_stays():
    graph = handmade.stack(2)
    plan = follow(graph, plan_from(graph, TP, {"**.up/linear": {"tp": "S(-1)"}, "**/gelu": {"tp": "I"}}))
    assert choices(graph, plan) == {"norm/layer_norm": "I", "up/linear": "n", "/gelu": "I", "down/linear": "I", "/add": "I"}
    assert H % 2 == 0
