"""Training under every layout, ZeRO mode and optimizer equals plain PyTorch: a pairwise covering of the matrix, all of it with `-m slow`.
Must not know how a cell is run (matrix.py).
"""

from __future__ import annotations

from itertools import combinations
from unittest import mock

import pytest
import torch

from autopar.runtime import collectives, optimizer, reducer, zero
from autopar.runtime.pending import Pending
from tests.matrix import CELLS, LAYOUTS, NAMES, OPTIMIZERS, TOLERANCE, ZEROS, build, compile_in, row
from tests.matrix_models import original
from tests.procs import run_processes

pytestmark = pytest.mark.procs

# One cell of each row, so that every two of model, layout, ZeRO and optimizer meet: 36 of 360.
COVERING = {
    (name, layout): (list(ZEROS)[(i + j) % 5], list(OPTIMIZERS)[(i + j // 2 + (i + j) // 5) % 2])
    for i, name in enumerate(NAMES)
    for j, layout in enumerate(LAYOUTS)
}


def test_the_covering_is_one():
    cells = [(*place, *cell) for place, cell in COVERING.items()]
    axes = [NAMES, LAYOUTS, ZEROS, OPTIMIZERS]
    for a, b in combinations(range(4), 2):
        assert {(c[a], c[b]) for c in cells} == {(x, y) for x in axes[a] for y in axes[b]}


def check(found):
    for cell, result in found.items():
        assert not result.skipped, f"{cell} is not run: {result.skipped}"
        assert result.error <= TOLERANCE, f"{cell}: error {result.error:.1e} in {result.where}"


@pytest.mark.parametrize(("name", "layout"), COVERING)
def test_equals_plain_pytorch(name, layout):
    check(row(name, layout, [COVERING[name, layout]]))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_cell(name, layout):
    found = row(name, layout)
    assert len(found) == len(CELLS) == 10
    check(found)


def test_modes_are_at_work(tmp_path):
    """How many of the four ranks update each entry, and how many whole parameters are there between steps."""
    compile_in(tmp_path, "mlp", "dp4", load_module=False)

    def rank(_):
        made, out = compile_in(tmp_path, "mlp", "dp4"), {}
        for mode in ZEROS:
            model, opt = build("mlp", "dp4", made, mode, "adamw")
            out[mode] = sum(p.stop - p.start for p in opt.reducer.pieces), sum(p.numel() for p in model.parameters())
        return out

    n = sum(p.numel() for p in original("mlp").parameters())
    found = run_processes(rank, 4)
    assert {z: sum(r[z][0] for r in found) for z in ZEROS} == {"none": 4 * n, "zero1": n, "groups": 2 * n, "scatter": n, "zero3": n}
    assert {z: sum(r[z][1] for r in found) for z in ZEROS} == {**dict.fromkeys(ZEROS, 4 * n), "zero3": 0}


# -- broken on purpose: what is replaced, by what, and the first cell that must notice


def no_publish(self, *rest):
    return Pending()


def own_part_only(axis, out, t, *rest):
    out.view(axis.size, -1)[axis.rank].copy_(t.clone())
    return Pending()


def own_slice(axis, out, t, *rest):
    out.copy_(t.view(axis.size, -1)[axis.rank])
    return Pending()


def no_scale(self, factor):
    self.sync_shard_grad()


def no_clip(self, max_norm, error_if_nonfinite=False):
    return self.norm()


def last_bucket_lost(real):
    def all_reduce(axis, t, *rest):
        return Pending() if t.numel() < 100 else real(axis, t, *rest)

    return all_reduce


def wrong_range(real):
    def give(self, grads, *rest):
        real(self, grads.roll(1), *rest)

    return give


BREAKS = {
    "gradients are not summed": (reducer, "all_reduce", lambda axis, t, *rest: Pending(), "mlp", "dp2", ("none", "sgd")),
    "gradients of small buckets are not summed": (
        reducer, "all_reduce", last_bucket_lost(reducer.all_reduce), "gpt", "dp2", ("none", "adamw"),
    ),
    "gradients are not summed inside a unit": (reducer, "all_reduce", lambda axis, t, *rest: Pending(), "mlp", "data2", ("none", "adamw")),
    "activations are not summed": (collectives, "_p_to_i", lambda x, axis: x, "mixed", "tp2", ("none", "sgd")),
    "activations are cut, not summed": (collectives, "_p_to_s", collectives._i_to_s, "conv", "tp2", ("none", "adamw")),
    "gradients are not scattered": (
        zero.pending, "reduce_scatter", own_slice, "mlp", "dp2", ("scatter", "sgd"),
    ),
    "gradients land one entry off": (zero.Shard, "give", wrong_range(zero.Shard.give), "mlp", "dp2", ("zero1", "adamw")),
    "parameters are not published": (zero.Shard, "publish", no_publish, "mlp", "dp2", ("zero1", "adamw")),
    "parameters are gathered from this rank only": (zero.pending, "all_gather", own_part_only, "mixed", "dp2", ("zero3", "sgd")),
    "no scaling": (optimizer.ParallelOptimizer, "scale_grads", no_scale, "mlp", "dp2", ("none", "sgd")),
    "no clipping": (optimizer.GradNorm, "clip", no_clip, "mlp", "dp2", ("none", "sgd")),
    "replicas counted twice in the norm": (
        optimizer, "count_copies", lambda held, whole, names, world, device: [1] * len(names), "mlp", "tp2", ("none", "sgd"),
    ),
    "one group of parameters": (optimizer, "_options", lambda name, fn: {}, "mlp", "dp2", ("none", "adamw")),
}  # fmt: skip


OFTEN = ("gradients are not summed", "activations are not summed", "parameters are not published", "no scaling")


@pytest.mark.parametrize("broken", [b if b in OFTEN else pytest.param(b, marks=pytest.mark.slow) for b in BREAKS])
def test_what_is_broken_shows(broken):
    owner, attribute, fake, name, layout, cell = BREAKS[broken]
    with mock.patch.object(owner, attribute, fake):
        result = row(name, layout, [cell])[cell]
    print(broken, result, result.where)
    assert result.error > 10 * TOLERANCE, result


@pytest.mark.slow
def test_lost_micro_batches_show():
    """Only the gradient of the last one is kept."""
    real = torch.Tensor.backward

    def backward(self, *args, **kwargs):
        real(self, *args, **kwargs)
        if not BACKWARDS.append(1) and len(BACKWARDS) % 2:
            for r in REDUCERS:
                r.zero_grad()

    init = reducer.GradReducer.__init__

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        REDUCERS.append(self)

    BACKWARDS, REDUCERS = [], []
    with mock.patch.object(reducer.GradReducer, "__init__", remember), mock.patch.object(torch.Tensor, "backward", backward):
        result = row("mlp", "dp2", [("none", "sgd")])["none", "sgd"]
    assert result.error > 10 * TOLERANCE
