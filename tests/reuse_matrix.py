"""The reuse matrix: what a second compile into the same folder does, for every mode and every kind of difference.
Must not know how a folder is recognised. `python tests/reuse_matrix.py` prints the table of docs/savedir.md.

The initial numbers are the same in both compiles, but for one row.
"""

from __future__ import annotations

import importlib
import linecache
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

import autopar
from autopar import Mesh, Plan, SavedirError
from autopar.rules.registry import _rules
from autopar.trace.leaves import unregister_leaf

MODES = ("match", "override", "moo", "graph")
SOURCE = """
import torch
from torch import nn

RATE = 0.5

def helper(x):
    return torch.relu(x)

def registered(x):
    return x * 2

class Base(nn.Module):
    def finish(self, x):
        return x * RATE

class Net(Base):
    def __init__(self, width=8, gain=1.0):
        super().__init__()
        self.up, self.down, self.gain = nn.Linear(4, width), nn.Linear(width, 4), gain

    def forward(self, x, mask=None, scale=1.0):
        h = registered(helper(self.up(x)))
        if mask is not None and mask.all():
            h = h + 1
        return self.finish(self.down(h)) * self.gain * scale

def tool(graph):
    return "n"

def policy(graph, config):
    import autopar
    return autopar.plan_from(graph, autopar.Mesh((("tp", config.plan_ngpus),)), {"up/linear": {"tp": tool(graph)}})
"""
GROUPS = {  # what the table calls the files
    "graph.json": "graph",
    "constants.safetensors": "graph",
    "weights.safetensors": "weights",
    "buffers.safetensors": "weights",
    "plan.json": "plan",
    "model.py": "code",
    "rank0.py": "code",
    "rank1.py": "code",
    "rank2.py": "code",
    "rank3.py": "code",
}


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of difference. part: 'graph', 'code' or '' for none; field: what the error of `match` names.

    The other fields say how the second compile differs from the first, and `first` how the first differs from the usual.
    """

    name: str
    part: str
    field: str
    source: tuple[str, str] = ("", "")  # replaced in SOURCE
    module: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], Any] | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    policy: Any = None
    around: Callable[[], Any] = nullcontext
    notation: str = "* -> *"
    seed: int = 0  # of the initial weights
    first: dict[str, Any] = field(default_factory=dict)


X = torch.ones(4, 4)
ONES = torch.ones(4, 8, dtype=torch.bool)
PADDED = ONES.clone().index_fill(1, torch.tensor([0]), False)
TP2 = Mesh((("tp", 2),))
COLUMNS, ROWS = (Plan(TP2, {"up/linear": {"tp": c}}) for c in ("n", "*0"))

KINDS = [
    Kind("nothing", "", ""),
    Kind("initial weights only", "", "", seed=1),
    Kind("source: a method", "graph", "source.reuse_model.Net", source=("self.gain * scale", "scale * self.gain")),
    Kind("source: a base class", "graph", "source.reuse_model.Base", source=("x * RATE", "RATE * x")),
    Kind("source: a function it calls", "graph", "source.reuse_model.helper", source=("torch.relu(x)", "torch.sigmoid(x)")),
    Kind("source: a constant it reads", "graph", "source.reuse_model.RATE", source=("RATE = 0.5", "RATE = 0.25")),
    Kind("structure: a layer's width", "graph", "structure.up.weight", module={"width": 16}),
    Kind("structure: a number the module holds", "graph", "structure.root", module={"gain": 2.0}),
    Kind("structure: a frozen parameter", "graph", "structure.down.bias", prepare=lambda m: m.down.bias.requires_grad_(False)),
    Kind("structure: weights there, on meta before", "graph", "weights", first={"prepare": lambda m: m.to("meta")}),
    Kind("mode: eval", "graph", "training", prepare=lambda m: m.eval()),
    Kind("mode: no_grad around it", "graph", "ambient", around=torch.no_grad),
    Kind("input: shape", "graph", "inputs.x", inputs={"x": torch.ones(2, 4)}),
    Kind("input: dtype", "graph", "inputs.x", inputs={"x": X.double()}, prepare=lambda m: m.double()),
    Kind("input: a number", "graph", "inputs.scale", inputs={"scale": 2.0}),
    Kind("input: a mask with zeros, all ones before", "graph", "inputs.mask", inputs={"mask": PADDED}),
    Kind("`constant_folding`", "graph", "constant_folding", config={"constant_folding": True}),
    Kind("`trace_strategy`", "graph", "trace_strategy", config={"trace_strategy": "cpu"}),
    Kind("`user_config`", "graph", "user_config.size", config={"user_config": {"size": 1}}),
    Kind("torch's version", "graph", "torch", around=lambda: mock.patch("torch.__version__", "9.9+cpu")),
    Kind("policy: another", "code", "policy", policy="data"),
    Kind("policy: its source", "code", "policy", source=('"up/linear"', '"down/linear"'), policy="own", first={"policy": "own"}),
    Kind("policy: a function it calls", "code", "policy", source=('return "n"', 'return "k"'), policy="own", first={"policy": "own"}),
    Kind("policy: another Plan", "code", "policy", policy=ROWS, first={"policy": COLUMNS}),
    Kind("`pas_config`", "code", "pas_config.seed", config={"pas_config": {"seed": 7}}),
    Kind("`plan_ngpus`", "code", "plan_ngpus", config={"plan_ngpus": 4}),
    Kind("`runtime_ngpus`", "code", "runtime_ngpus", config={"runtime_ngpus": 8}),
    Kind("`guards`", "code", "guards", config={"guards": "warn"}),
    Kind("the notation of a registered op", "code", "registered.reuse_model:registered", notation="a b -> a b"),
    Kind("autopar's version", "code", "autopar", around=lambda: mock.patch("autopar.__version__", "9.9")),
]


def import_source(text: str, folder: Path) -> ModuleType:
    """The text as the module 'reuse_model', always the same file, as if it had been edited between two runs."""
    folder.mkdir(exist_ok=True)
    (folder / "reuse_model.py").write_text(text)
    sys.modules.pop("reuse_model", None)
    importlib.invalidate_caches()
    with mock.patch.object(sys, "path", [str(folder), *sys.path]), mock.patch.object(sys, "dont_write_bytecode", True):
        found = importlib.import_module("reuse_model")
    linecache.clearcache()
    return found


def compile_kind(kind: Kind, work: Path, reuse: str = "match") -> Path:
    """Compile the model of a kind of difference into work/saved."""
    found = import_source(SOURCE.replace(*kind.source) if kind.source[0] else SOURCE, work / "source")
    torch.manual_seed(kind.seed)
    module = found.Net(**kind.module)
    if kind.prepare is not None:
        kind.prepare(module)
    policy = found.policy if kind.policy == "own" else kind.policy or "tp"
    config = {"plan_ngpus": 2, **kind.config}
    with _registered(found.registered, kind.notation), kind.around():
        return autopar.parallelize(
            module, {"x": X, "mask": ONES, **kind.inputs}, policy, config, gen_savedir=work / "saved", reuse=reuse, load_module=False
        )


@contextmanager
def _registered(fn: Any, notation: str) -> Iterator[None]:
    autopar.register_op(fn, notation)
    try:
        yield
    finally:
        unregister_leaf(fn)
        _rules.pop(f"{fn.__module__}:{fn.__qualname__}")


@dataclass(frozen=True)
class Outcome:
    """error: the text of a refusal; changed: files with other bytes than before, manifest.json left out."""

    error: str
    changed: tuple[str, ...]

    def __str__(self) -> str:
        if self.error:
            return "error"
        groups = dict.fromkeys(GROUPS[f] for f in (*GROUPS, *self.changed) if f in self.changed)
        return ", ".join(groups) or "-"


def outcome(kind: Kind, mode: str, work: Path) -> Outcome:
    """Compile as usual, then with the difference and this reuse mode, and compare the files."""
    folder = compile_kind(Kind(kind.name, "", "", **kind.first), work)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    error = ""
    try:
        assert compile_kind(kind, work, mode) == folder
    except SavedirError as e:
        error = str(e)
    after = {p.name: p.read_bytes() for p in folder.iterdir()}
    names = sorted(before.keys() | after.keys() - {"manifest.json"})
    return Outcome(error, tuple(n for n in names if n != "manifest.json" and before.get(n) != after.get(n)))


@cache
def cell(kind: Kind, mode: str) -> Outcome:
    """outcome in a folder of its own; each pair is tried once."""
    with tempfile.TemporaryDirectory() as work:
        return outcome(kind, mode, Path(work))


def matrix() -> str:
    """The table, in Markdown."""
    rows = ["| what differs | " + " | ".join(f"`{m}`" for m in MODES) + " |", "|---" * (len(MODES) + 1) + "|"]
    for kind in KINDS:
        found = [cell(kind, mode) for mode in MODES]
        cells = [f"error: `{kind.field}`" if c.error and kind.field in c.error else str(c) for c in found]
        rows.append(f"| {kind.name} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(matrix())
