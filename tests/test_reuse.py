"""The reuse matrix as a test: every mode and kind of difference does what docs/savedir.md says.
Must not know how a folder is recognised.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from reuse_matrix import GROUPS, KINDS, MODES, cell, compile_kind, matrix

import autopar
from autopar import driver
from autopar.codegen import identity

GRAPH_FILES = {"graph.json", "constants.safetensors", "weights.safetensors"}
# With the graph reused, most differences change plan and code; these do not.
IN_CODE = {"`guards`": {"model.py"}, "`runtime_ngpus`": set(), "autopar's version": set()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_matrix(kind, mode):
    got = cell(kind, mode)
    changed = set(got.changed)
    assert changed <= GROUPS.keys() and bool(got.error) == (mode == "match" and bool(kind.part))
    if got.error:
        assert not changed
        assert re.search(rf"^  {re.escape(kind.field)}: saved .+, now .+$", got.error, re.MULTILINE), got.error
        consequence = {"`plan_ngpus`": "runtime_ngpus", "input: dtype": "structure"}.get(kind.name, kind.field)
        expected = ("  " + kind.field.partition(".")[0], "  " + consequence)
        assert all(row.startswith(expected) for row in got.error.splitlines()[1:-1]), got.error
        assert "use reuse='moo' to regenerate where it differs, 'override' always, or another instance_name" in got.error
    elif not kind.part:
        assert changed == ({"weights.safetensors"} if kind.seed else set())
    elif kind.part == "code":  # the same graph, whether it was traced again or not
        assert not GRAPH_FILES & changed
        expected = IN_CODE.get(kind.name)
        assert changed == expected if expected is not None else {"plan.json", "model.py"} <= changed


@pytest.mark.parametrize("kind", [k for k in KINDS if k.part == "graph" and k.field != "torch"], ids=lambda k: k.name)
def test_a_stale_graph_is_never_used(kind, tmp_path):
    """With reuse='graph' the result is that of a fresh compile, whatever was there before."""
    compile_kind(type(kind)(kind.name, "", "", **kind.first), tmp_path)
    folder = compile_kind(kind, tmp_path, "graph")
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    compile_kind(kind, tmp_path, "override")
    assert files == {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("kind", [k for k in KINDS if k.part], ids=lambda k: k.name)
def test_what_is_traced_again(kind, tmp_path, monkeypatch):
    """`graph` traces where the graph differs, `moo` where anything does, `override` always."""
    traced = []
    plain = driver.trace
    monkeypatch.setattr(driver, "trace", lambda *args, **kwargs: traced.append(1) or plain(*args, **kwargs))
    for mode, expected in (("graph", kind.part == "graph"), ("moo", True), ("override", True)):
        work = tmp_path / mode
        work.mkdir()
        compile_kind(type(kind)(kind.name, "", "", **kind.first), work)
        traced.clear()
        compile_kind(kind, work, mode)
        assert bool(traced) == expected, mode


def test_a_changed_policy_keeps_graph_and_weights_to_the_byte(tmp_path):
    kind = next(k for k in KINDS if k.name == "policy: another")
    folder = compile_kind(type(kind)(kind.name, "", ""), tmp_path)
    before = {n: ((folder / n).read_bytes(), (folder / n).stat().st_ino) for n in GRAPH_FILES}
    plan = (folder / "plan.json").read_bytes()
    compile_kind(kind, tmp_path, "graph")
    assert plan != (folder / "plan.json").read_bytes()
    assert before == {n: ((folder / n).read_bytes(), (folder / n).stat().st_ino) for n in GRAPH_FILES}  # not even copied


def test_every_setting_is_part_of_the_identity():
    """A field that is added to ComputeConfig cannot be forgotten."""
    import torch

    config = autopar.ComputeConfig(2, pas_config={"a": 1}, user_config={"b": {"c": 2}})
    found = identity.identify(torch.nn.Linear(2, 2), {"input": torch.ones(1, 2)}, "tp", config, "1")
    keys = {k.partition(".")[0] for k in (*found.graph, *found.code)}
    assert config.to_dict().keys() <= keys
    assert found.graph["user_config.b.c"] == 2 and found.code["pas_config.a"] == 1


def test_the_docs_show_this_matrix():
    text = (Path(__file__).parents[1] / "docs" / "savedir.md").read_text()
    assert matrix() in text, "python tests/reuse_matrix.py prints the table"
