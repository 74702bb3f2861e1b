"""Plan: JSON round trip, and what a malformed plan file says.
Knows no graph.
"""

import json

import pytest

from autopar.errors import PlanError
from autopar.ir.mesh import Mesh
from autopar.pas.plan import Plan

GRID = Mesh((("dp", 2), ("tp", 4)))
PLAN = Plan(
    GRID, {"a.*.b/linear": {"dp": "b", "tp": "n"}, "/add": {"tp": "R"}}, {"a.0.b.weight": {"dp": "S(0)"}}, graph="ff00", policy="mine"
)


@pytest.mark.parametrize("plan", [PLAN, Plan(), Plan(GRID)])
def test_round_trip(plan, tmp_path):
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    json.loads(plan.to_json())
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_order_is_kept():
    plan = Plan(GRID, {"z/*": {"dp": "b"}, "a/*": {"dp": "b"}})
    assert list(Plan.from_json(plan.to_json()).ops) == ["z/*", "a/*"]


def test_one_op_per_line():
    assert '    "a.*.b/linear": {"dp": "b", "tp": "n"},\n' in PLAN.to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1,', "p.json is not valid JSON: Expecting property name enclosed in double quotes at line 1, column 14"),
        (PLAN.to_json()[:-40], "p.json is not valid JSON"),
        ("[]", "p.json is not an autopar plan: it has no 'format' field"),
        ("{}", "it has no 'format' field"),
        ('{"format": 7}', "p.json has plan format 7; this version reads format 1"),
        ('{"format": 1, "opps": {}}', "p.json has unknown fields opps; known are format, graph, mesh, ops, params, policy"),
        ('{"format": 1, "ops": []}', "'ops' must be an object of address -> {axis: choice}"),
        ('{"format": 1, "ops": {"/add": "n"}}', "ops['/add'] must be an object of axis -> text, got 'n'"),
        ('{"format": 1, "params": {"w": {"tp": 0}}}', "params['w'] must be an object of axis -> text, got {'tp': 0}"),
        ('{"format": 1, "mesh": {"tp": "2"}}', "'mesh' must be an object of axis name -> size, got {'tp': '2'}"),
        ('{"format": 1, "mesh": {"tp": 0}}', "mesh axis 'tp' has size 0; it must be at least 1"),
    ],
)
def test_malformed(text, message, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ValueError) as e:
        Plan.load(path)
    assert message in str(e.value)


def test_missing_file(tmp_path):
    with pytest.raises(PlanError, match=r"cannot read plan .*none.json: No such file"):
        Plan.load(tmp_path / "none.json")


def test_merge():
    other = Plan(GRID, {"/add": {"tp": "I"}})
    assert (PLAN | other).ops["/add"] == {"tp": "I"} and (PLAN | other).params == PLAN.params
    with pytest.raises(PlanError, match=r"different meshes: mesh\(dp=2, tp=4\) and mesh\(\)"):
        PLAN | Plan()
