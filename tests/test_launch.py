"""Launching: world sizes that do not fit, one rank that fails to compile or load, real torchrun.
Forked gloo processes but for the last tests; the savedir alone is in test_savedir.py.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from procs import run_processes
from torch import nn
from torchrun import torchrun

import autopar
from autopar.runtime.launch import load

pytestmark = pytest.mark.procs
X = torch.ones(4, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Broken(Net):
    def forward(self, x):
        return torch.vmap(self.up)(x)


class Untraceable(nn.Module):
    def forward(self, x):
        raise AssertionError("traced before the processes were counted")


def failing(fn, limit=20.0):
    """fn(rank) as a function of a rank that says how it ended: (kind of error, text), within the limit."""

    def run(rank):
        start = time.monotonic()
        try:
            fn(rank)
        except Exception as e:
            assert time.monotonic() - start < limit
            return type(e).__name__, str(e)
        return "", ""

    return run


def parallelize(tmp_path, module=None, policy="tp", n=2, **more):
    return autopar.parallelize(module or Net(), {"x": X}, policy, {"plan_ngpus": n}, gen_savedir=tmp_path, **more)


def compile(tmp_path, n=2):
    return parallelize(tmp_path, n=n, load_module=False)


# ---- world sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 3])
def test_a_world_that_is_not_the_configured_one(world, tmp_path):
    config = {"plan_ngpus": 2, "runtime_ngpus": 4}
    run = failing(lambda rank: autopar.parallelize(Untraceable(), {"x": X}, "tp", config, gen_savedir=tmp_path))
    for kind, text in run_processes(run, world, connect=False):
        assert kind == "LayoutError"
        running = "1 process is running" if world == 1 else f"{world} processes are running"
        assert f"{running}, but runtime_ngpus is 4; launch 4 (torchrun --nproc_per_node 4 ...)" in text
    assert not list(tmp_path.iterdir())


def test_a_world_that_is_no_multiple_of_the_generated_code(tmp_path):
    folder = compile(tmp_path)
    for kind, text in run_processes(failing(lambda rank: load(folder)), 3, connect=False):
        assert kind == "LayoutError" and "the generated code is for 2 devices (tp=2), but 3 processes are running" in text
        assert "`torchrun --nproc_per_node 2 your_script.py`, or generate the code again with plan_ngpus=3" in text


def test_loading_outside_of_torchrun(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    folder = compile(tmp_path)
    with pytest.raises(autopar.LayoutError, match=r"not a process of a distributed run: .*Launch with `torchrun --nproc_per_node N"):
        load(folder)


# ---- one rank fails ------------------------------------------------------------------------------------------------------------


def policy_raises(graph, config):
    raise ValueError("the policy has no idea")


COMPILE = {
    "policy": (Net, policy_raises, "ValueError", "the policy has no idea"),
    "model": (Broken, "tp", "TraceError", "inside torch.vmap or torch.func; the tracer cannot look inside"),
    "name": (Net, "tpp", "ConfigError", "unknown policy 'tpp': did you mean 'tp'?"),
}


@pytest.mark.parametrize("case", COMPILE)
def test_rank_0_fails_to_compile(case, tmp_path):
    """Rank 0 raises its own error, the others one that quotes it with its line; nobody waits for anybody."""
    cls, policy, own, text = COMPILE[case]
    got = run_processes(failing(lambda rank: parallelize(tmp_path, cls(), policy, n=3)), 3, connect=False)
    assert got[0][0] == own and text in got[0][1]
    for kind, message in got[1:]:
        assert kind == "LayoutError" and message.startswith("rank 0 failed to compile: ") and text in message and ".py:" in message


def test_a_module_that_cannot_be_built(tmp_path):
    def build():
        raise KeyError("no such size")

    run = failing(lambda rank: autopar.parallelize(Net, {"x": X}, "tp", {"plan_ngpus": 2}, gen_savedir=tmp_path, module_fn=build))
    (kind, _), (other, text) = run_processes(run, 2, connect=False)
    assert kind == "KeyError" and other == "LayoutError" and "rank 0 failed to compile: KeyError: 'no such size'" in text


def test_rank_0_takes_too_long(tmp_path):
    """The others end at the time limit; rank 0 ends with the same words when it is done."""

    def slow(graph, config):
        time.sleep(4)
        return autopar.Plan(autopar.Mesh((("tp", 3),)))

    run = failing(lambda rank: parallelize(tmp_path, policy=slow, n=3, timeout=2.0))
    for kind, text in run_processes(run, 3):
        assert kind == "LayoutError" and text == "rank 0 did not compile within 2 s"


LOAD = {
    "weights.safetensors": "weights.safetensors is missing",
    "model.py": "model.py is missing",
    "manifest.json": "holds no complete generated code (no manifest.json)",
}


@pytest.mark.parametrize("file", LOAD)
def test_one_rank_lacks_a_file(file, tmp_path):
    """As where nodes do not share a disk."""
    folder = compile(tmp_path)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / file).unlink()
    run = failing(lambda rank: load(other if rank == 1 else folder, timeout=20))
    got = run_processes(run, 2, connect=False)
    assert got[1][0] == "SavedirError" and LOAD[file] in got[1][1]
    assert got[0][0] == "LayoutError" and got[0][1].startswith("rank 1 failed to read the generated code: ") and LOAD[file] in got[0][1]


def test_one_rank_has_other_weights(tmp_path):
    """Found only while tensors are filled."""
    from safetensors.torch import load_file, save_file

    folder = compile(tmp_path)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    values = load_file(other / "weights.safetensors")
    save_file({**values, "up.weight": values["up.weight"].flatten().view(8, 16).clone()}, other / "weights.safetensors")
    got = run_processes(failing(lambda rank: load(other if rank == 1 else folder, timeout=20)), 2, connect=False)
    assert got[0][0] == "LayoutError" and "rank 1 failed to load: " in got[0][1] and "up.weight" in got[0][1] + got[1][1]
    assert got[1][0] in ("LayoutError", "SavedirError")


# ---- torchrun ------------------------------------------------------------------------------------------------------------------


def test_training_under_torchrun(tmp_path):
    """Losses of three steps and every merged gradient equal the plain module's; then a rank without weights ends both."""
    done = torchrun("train", tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1)]
    for got in results:
        ours, theirs = got["losses"][::2], got["losses"][1::2]
        assert ours == pytest.approx(theirs, rel=1e-5) and len(set(theirs)) == 3
        assert max(got["gradients"]) < 1e-5 and got["held"][0] < 0.65 * got["held"][1]
    assert results[0]["missing"].startswith("LayoutError: rank 1 failed to read the generated code: ")
    assert results[1]["missing"].startswith("SavedirError: ") and "weights.safetensors is missing" in results[1]["missing"]


def test_a_failing_policy_ends_a_torchrun(tmp_path):
    start = time.monotonic()
    done = torchrun("policy", tmp_path, timeout=90)
    assert done.returncode != 0 and time.monotonic() - start < 75
    assert "ValueError: the policy has no idea" in done.stderr
    assert "LayoutError: rank 0 failed to compile: ValueError: the policy has no idea (at " in done.stderr
