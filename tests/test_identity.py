"""identity: which edits of a program count as another model or policy, and that the same program is the same in every process.
Must not know folders (test_savedir.py) or reuse modes (test_reuse.py).
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reuse_matrix import import_source
from torch import nn

from autopar.codegen.identity import Identity, identify, policy_name, structure
from autopar.codegen.origins import text
from autopar.config import ComputeConfig

PROGRAM = """
import functools
import torch
from torch import nn
import identity_helpers
from identity_helpers import scale as rescale

LIMIT = 3
TABLE = {"relu": torch.relu, "own": lambda x: x + 1}
OTHER = 7

def helper(x):
    def inner(y):
        return deep(y)
    return inner(x)

def deep(x):
    return x * 2

def unused(x):
    return x * 11

def logged(fn):
    @functools.wraps(fn)
    def wrapper(*args):
        return fn(*args) + 0
    return wrapper

class Unused(nn.Module):
    pass

class Part(nn.Module):
    factor = 1.5

    @property
    def rate(self):
        return rate_of(self)

    @staticmethod
    def shift(x):
        return x - 1

    @logged
    def forward(self, x):
        return self.shift(x) * self.rate * self.factor

def rate_of(part):
    return 0.5

class Net(Part):
    def __init__(self):
        super().__init__()
        self.part = Part()

    def forward(self, x):
        x = helper(rescale(x)) + identity_helpers.offset(x)
        if x.size(0) > LIMIT:
            x = TABLE["own"](x)
        return self.part(x)
"""
HELPERS = """
def scale(x):
    return x * 4

def offset(x):
    return constant() + x

def constant():
    return 5

def unused():
    return 6
"""
EDITS = [  # (old, new, whether it is another model)
    ("x * 2", "x * 3", True),  # two functions down, inside a nested one
    ("x * 4", "x * 5", True),  # imported from another file
    ("return 5", "return 6", True),  # reached through an attribute of a module
    ("x + 1", "x + 2", True),  # a lambda in a table
    ("LIMIT = 3", "LIMIT = 4", True),
    ("factor = 1.5", "factor = 1.6", True),
    ("x - 1", "x - 2", True),  # a static method
    ("return 0.5", "return 0.6", True),  # what a property calls
    ("self.part(x)", "self.part(x) + 0", True),
    ("fn(*args) + 0", "fn(*args) + 9", True),  # a decorator
    ("x * 11", "x * 12", False),
    ("OTHER = 7", "OTHER = 8", False),
    ("class Unused(nn.Module):\n    pass", "class Unused(nn.Module):\n    size = 1", False),
    ("return 6", "return 7", False),  # in the other file, not called
    ("\nclass Part", "# a remark\n\nclass Part", False),
]


def identity_of(program: str, helpers: str, folder: Path) -> Identity:
    helpers_file, model_file = folder / "identity_helpers.py", folder / "source"
    folder.mkdir(exist_ok=True)
    helpers_file.write_text(helpers)
    sys.modules.pop("identity_helpers", None)
    sys.path.insert(0, str(folder))
    try:
        found = import_source(program, model_file)
    finally:
        sys.path.remove(str(folder))
    return identify(found.Net(), {"x": torch.ones(2, 2)}, "tp", ComputeConfig(), "1")


@pytest.mark.parametrize(("old", "new", "counts"), EDITS, ids=[e[1].strip()[:20] for e in EDITS])
def test_edits(old, new, counts, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert old in PROGRAM + HELPERS
    before = identity_of(PROGRAM, HELPERS, tmp_path / "a")
    after = identity_of(PROGRAM.replace(old, new), HELPERS.replace(old, new), tmp_path / "b")
    differences = after.differences({"graph": before.graph}, "graph")
    assert bool(differences) == counts, differences
    assert all(d.startswith("source.") for d in differences)


def test_policies_are_told_apart():
    def made(n, inner=None):
        return lambda graph, config: (n, inner)

    names = [policy_name(p) for p in (made(1), made(1), made(2), made(1, made(3)), made(1, made(4)), "tp")]
    assert names[0] == names[1] and len(set(names)) == 5 and names[-1] == "tp"


class Holds(nn.Module):
    def __init__(self, **held):
        super().__init__()
        for k, v in held.items():
            setattr(self, k, v)


class Settings:
    def __init__(self, size, inner=None):
        self.size, self.inner, self.fn = size, inner, len


PAIRS = [
    (1.0, 2.0),
    ("gelu", "relu"),
    ([1, 2], [2, 1]),
    ({"a": 1}, {"a": 2}),
    ({1, 2, 3}, {1, 2}),
    (torch.float16, torch.float32),
    (torch.ones(3), torch.zeros(3)),
    (torch.ones(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)),
    (Settings(1), Settings(2)),
    (Settings(1, Settings(3)), Settings(1, Settings(4))),
    (torch.relu, torch.sigmoid),
    (float("inf"), 1.0),
]


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=lambda v: type(v).__name__)
def test_what_a_module_holds(a, b):
    assert structure(Holds(x=a)) == structure(Holds(x=a)) != structure(Holds(x=b))


def test_objects_are_described_field_by_field():
    config = Settings(4)
    net = nn.Sequential(Holds(config=config), Holds(config=config))
    found = structure(net)
    assert found["structure.*"] == "Holds config=Settings (x2)" and found["settings.Settings.size"] == 4


def test_layers_are_described_together():
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(100)])
    found = structure(net)
    assert found["structure.*.weight"] == "float32[4, 4] (x100)" and len(found) == 4
    other = structure(nn.Sequential(*[nn.Linear(4, 4, dtype=torch.float64 if i == 7 else None) for i in range(100)]))
    moved = structure(nn.Sequential(*[nn.Linear(4, 4, dtype=torch.float64 if i == 8 else None) for i in range(100)]))
    assert len({d["structure.*.weight"] for d in (found, other, moved)}) == 3
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    untied = structure(tied)
    tied[1].weight = tied[0].weight
    assert structure(tied) != untied


def test_values_of_cached_properties_do_not_count():
    class Grid:
        def __init__(self, n):
            self.n = n

        @functools.cached_property
        def area(self):
            return self.n**2

    class Net(nn.Module):
        grid = Grid(2)

        @functools.cached_property
        def twice(self):
            return 2 * self.grid.n

    def of(grid):
        return lambda graph, config: grid.area

    grid, net = Grid(2), Net()
    net.grid = grid
    before = text(grid), policy_name(of(grid)), structure(net)
    assert grid.area == net.twice == 4
    assert (text(grid), policy_name(of(grid)), structure(net)) == before
    grid.n = 3
    assert all(a != b for a, b in zip(before, (text(grid), policy_name(of(grid)), structure(net)), strict=True))


def test_what_refers_to_itself_has_an_end():
    loop: list = [1]
    loop.append(loop)
    module = Holds(loop=loop, owner=Settings(1))
    module.owner.inner = [module]
    module.many = list(range(100_000))
    assert structure(module) == structure(module) and len(text(module.many)) < 1_000_000


SAME = """
import json, models, small_models
from autopar.codegen.identity import identify
from autopar.config import ComputeConfig

found = []
for m, a in (small_models.inputs("lm"), models.build("llama")):
    i = identify(m, a, small_models.inputs, ComputeConfig(2, pas_config={"names": {"a", "b", "c"}}), "1")
    m(**a)
    assert not identify(m, a, "tp", ComputeConfig(2), "1").differences({"graph": i.graph}, "graph"), "running it changes nothing"
    found.append(json.dumps([i.graph, i.code]))
"""


@pytest.mark.procs
def test_the_same_in_every_process():
    """Also where texts hash differently."""
    root, here = Path(__file__).parents[1], {}
    folders = [str(root), str(root / "tests"), str(root / "benchmarks")]
    sys.path.append(folders[2])
    exec(SAME, here)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, "-c", SAME + "print(*found, sep='\\n')"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == here["found"] and len(here["found"][1]) > 5000
