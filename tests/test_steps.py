"""train_step and infer_step against plain PyTorch that accumulates by hand: plans, units, dummy batches, scaled losses, random numbers.
Must not know how generated code looks.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autopar
from autopar.driver import compile_module
from autopar.errors import ConfigError, StepError
from autopar.runtime.axis import record
from autopar.runtime.groups import rank_mesh
from autopar.runtime.inproc import run_ranks
from autopar.runtime.module import ParallelModule
from autopar.runtime.optimizer import build_optimizer
from autopar.verification import shard
from tests.procs import run_processes
from tests.step_models import MESHES, Net, Wide, compiled, original, policy, rank_module, sample

NAN = {k: v * float("nan") for k, v in sample(0).items()}


def batches(unit: int, n: int, step: int = 0) -> list:
    return [sample(100 * step + 10 * unit + i) for i in range(n)]


def plain(module: nn.Module, samples: list, scale=lambda loss: loss) -> tuple[list, dict, dict]:
    """(outputs, gradients, buffers) of accumulation by hand."""
    module = copy.deepcopy(module)
    outputs = []
    for s in samples:
        out = module(s)
        scale(out["loss"]).backward()
        outputs.append({k: v.detach() for k, v in out.items()})
    return outputs, {n: p.grad for n, p in module.named_parameters()}, dict(module.named_buffers())


def close(a: torch.Tensor, b: torch.Tensor, limit: float = 1e-12) -> bool:
    return a.shape == b.shape and bool((a.double() - b.double()).abs().max() <= limit * max(1.0, b.double().abs().max()))


def check_rank(made, rank: int, outputs: list, module: ParallelModule, expected: list, grads: dict, buffers: dict) -> None:
    program = made[1].program
    for got, want in zip(outputs, expected, strict=True):
        assert all(close(got[k], want[k]) and not got[k].requires_grad for k in want)
    device = rank % program.mesh.size
    for what, wants in (("parameter", grads), ("buffer", buffers)):
        for name, want in wants.items():
            got = module.get_parameter(name).grad if what == "parameter" else module.get_buffer(name)
            assert close(got, shard(want, program.placement(name), program.mesh, device)), f"{what} {name} on rank {rank}"


# flags of each unit; what is real comes first in the hand-written loop, whatever its place
DUMMIES = {
    "none": ([0, 0, 0], [0, 0, 0]),
    "last": ([0, 0, 0], [0, 0, 1]),
    "first": ([1, 0, 0], [0, 0, 0]),
    "most": ([1, 0, 1], [1, 1, 0]),
    "a whole unit": ([0, 0, 0], [1, 1, 1]),
}


@pytest.mark.parametrize("dummies", DUMMIES)
@pytest.mark.parametrize("mesh", MESHES)
def test_accumulation(mesh, dummies):
    """A dummy batch is full of NaN."""
    made = compiled(mesh)
    units = MESHES[mesh][1]
    flags = DUMMIES[dummies]

    def scale(loss):
        return loss / 7

    per_unit, total = [], {}
    for u in range(units):
        real = [s for s, f in zip(batches(u, 3), flags[u], strict=True) if not f]
        outputs, grads, buffers = plain(made[0], real, scale)
        per_unit.append((outputs, buffers))
        for n, g in grads.items():
            total[n] = total.get(n, 0) + (0 if g is None else g)

    def run(axes, rank):
        module = rank_module(made, axes)
        mine = [NAN if f else s for s, f in zip(batches(axes.unit, 3), flags[axes.unit], strict=True)]
        outputs = module.train_step(mine, [bool(f) for f in flags[axes.unit]], scale)
        assert len(outputs) == 3
        real = [o for o, f in zip(outputs, flags[axes.unit], strict=True) if not f]
        check_rank(made, rank, real, module, per_unit[axes.unit][0], total, per_unit[axes.unit][1])

    run_ranks(made[1].program.mesh, run, units=units)


def train_by_hand(module: nn.Module, units: int, steps: int, n: int, dummy_last: bool) -> list[torch.Tensor]:
    module = copy.deepcopy(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        kept = {k: b.clone() for k, b in module.named_buffers()}
        optimizer.zero_grad()
        for u in range(units):
            for b, v in kept.items():  # each unit has buffers of its own; those of the last one do not reach a gradient
                module.get_buffer(b).copy_(v)
            for s in batches(u, n - (dummy_last and u == units - 1), step):
                (module(s)["loss"] / units).backward()
        optimizer.step()
    return [p.detach() for p in module.parameters()]


@pytest.mark.procs
@pytest.mark.parametrize(
    "settings", [{}, {"use_async_reducer": True, "reducer_bucket_cap_mb": 1e-4}, {"use_zero": 1}, {"use_zero": 3}], ids=str
)
@pytest.mark.parametrize("mesh", ["dp2", "tp2 x 2"])
def test_with_an_optimizer(mesh, settings):
    """Under gloo: the reducer of the optimizer sums once per step; the last batch of the last unit is a dummy."""
    made = compiled(mesh)
    _, units = MESHES[mesh]

    def run(rank):
        axes = rank_mesh(made[1].program.mesh)
        module = rank_module(made, axes)
        optimizer = build_optimizer(module, torch.optim.SGD, settings, lr=0.1, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            last = axes.unit == units - 1
            mine = batches(axes.unit, 3 - last, step) + [NAN] * last
            with record() as log:
                module.train_step(mine, [False, False, last], lambda loss: loss / units)
            bytes_ = sum(r.payload for r in log if r.name == "all_reduce" and r.axis.startswith("units") and r.dtype == torch.float64)
            optimizer.step()
        return [(p.name, p.start, p.stop, p.param.detach().clone()) for p in optimizer.reducer.pieces], bytes_

    ranks = run_processes(run, MESHES[mesh][0] * units)
    names = [n for n, _ in made[0].named_parameters()]
    want = dict(zip(names, train_by_hand(made[0], units, 3, 3, True), strict=True))
    for rank, (got, bytes_) in enumerate(ranks):
        device = rank % made[1].program.mesh.size
        assert got
        for n, start, stop, p in got:
            w = shard(want[n], made[1].program.placement(n), made[1].program.mesh, device).flatten()[start:stop]
            assert close(p.flatten(), w), (rank, n)
        held = sum(w.numel() + 1 for w in want.values()) * 8
        assert not bytes_ or bytes_ <= held + 64, "each gradient is summed once"


def test_gradients_of_before_are_forgotten():
    made = compiled("tp2 x 2")

    def run(axes, rank):
        module = rank_module(made, axes)
        module.train_step([sample(5)])
        module.train_step([sample(0)])
        again = rank_module(made, axes)
        again.train_step([sample(0)])
        return all(torch.equal(a.grad, b.grad) for a, b in zip(module.parameters(), again.parameters(), strict=True))

    assert all(run_ranks(made[1].program.mesh, run, units=2))


def test_one_collective_more_per_step():
    made = compiled("tp2 x 2")

    def run(axes, rank):
        module = rank_module(made, axes)
        logs = []
        for step in (lambda: module.train_step([sample(0)]), lambda: module.infer_step([sample(0)]), lambda: module.infer_step([])):
            with record() as log:
                step()
            logs.append([r for r in log if r.dtype == torch.int64])
        return [(len(log), log[0].payload, log[0].size) for log in logs]

    assert run_ranks(made[1].program.mesh, run, units=2) == [[(1, 32, 4), (1, 32, 2), (1, 32, 2)]] * 4


@pytest.mark.procs
def test_one_reduction_per_parameter_at_any_accumulation():
    """However many micro batches there are and however gradients travel, every gradient is reduced once per step."""
    made = compiled("dp2")
    count = sum(p.numel() for p in made[0].parameters()) * 8
    ways = {
        "all_reduce": [{}, {"use_async_reducer": True, "reducer_bucket_cap_mb": 1e-4}, {"use_zero": 1}],
        "reduce_scatter": [{"use_zero": 1, "zero_use_reduce_scatter": True}, {"use_zero": 3}],
    }

    def run(rank):
        out = []
        for how, settings in ((k, s) for k, many in ways.items() for s in many):
            module = rank_module(made, rank_mesh(made[1].program.mesh))
            optimizer = build_optimizer(module, torch.optim.SGD, settings, lr=0.1)
            for n in (1, 2, 5):
                with record() as log:
                    module.train_step([sample(0)] * n)
                    optimizer.clip_gnorm(1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                sums = [r for r in log if r.name in ("all_reduce", "reduce_scatter") and len(r.shape) == 1 and r.dtype == torch.float64]
                assert {r.name for r in sums} == {how}, settings
                out.append((str(settings), sum(r.payload for r in sums), len(sums)))
        return out

    for rows in run_processes(run, 2):
        assert len(set(rows)) == len(rows) // 3, "the same at any accumulation"
        for settings, payload, _ in rows:
            more = 8 * len(list(made[0].parameters())) + 64  # a count per parameter, padding
            assert count <= payload <= count + more, settings


def test_infer_step():
    """In the module's mode, without gradients; units may have different numbers of samples."""
    made = compiled("tp2 x 2")
    reference = copy.deepcopy(made[0]).eval()

    def run(axes, rank):
        module = rank_module(made, axes).eval()
        n = 1 + 2 * axes.unit
        out = module.infer_step(batches(axes.unit, n))
        assert all(close(o["logits"], reference(s)["logits"].detach()) for o, s in zip(out, batches(axes.unit, n), strict=True))
        assert all(p.grad is None for p in module.parameters()) and not out[0]["loss"].requires_grad
        return len(out)

    assert run_ranks(made[1].program.mesh, run, units=2) == [1, 1, 3, 3]


# ---- random numbers -----------------------------------------------------------------------------------------


def losses_of(made, axes, samples, flags=None, seed=11, module=None):
    module = module or rank_module(made, axes)
    torch.manual_seed(seed)
    return [float(x) for x in module.train_step([s["x"] for s in samples], flags)]


@pytest.mark.parametrize("mesh", MESHES)
def test_same_seed_same_draws_as_one_process(mesh):
    """Dropout that is not split: unit 0 draws what the original does. Another unit, given the same batches, draws other numbers."""
    made = compiled(mesh, Wide)
    samples = [sample(i) for i in range(3)]
    reference = copy.deepcopy(made[0])
    torch.manual_seed(11)
    want = [reference(s["x"]).item() for s in samples]
    torch.manual_seed(12)
    assert float(reference(sample(0)["x"])) != want[0], "the seed decides"

    def run(axes, rank):
        first = losses_of(made, axes, samples)
        return axes.unit, first, first == losses_of(made, axes, samples)

    ranks = run_ranks(made[1].program.mesh, run, units=MESHES[mesh][1])
    assert all(same for _, _, same in ranks), "the same seed, the same draws in every unit"
    by_unit = [[first for unit, first, _ in ranks if unit == u] for u in range(MESHES[mesh][1])]
    for u, found in enumerate(by_unit):
        assert all(f == pytest.approx(found[0], abs=1e-12) for f in found), "ranks of a unit agree"
        if u == 0:
            assert found[0] == pytest.approx(want, abs=1e-12)
        else:
            assert all(abs(a - b) > 1e-6 for a, b in zip(found[0], by_unit[0][0], strict=True)), "units draw different numbers"
            assert len(set(found[0])) == len(samples)


@pytest.mark.procs
def test_draws_under_gloo():
    made = compiled("tp2 x 2", Wide)
    samples = [sample(i) for i in range(2)]
    here = run_ranks(made[1].program.mesh, lambda axes, rank: losses_of(made, axes, samples), units=2)
    there = run_processes(lambda rank: losses_of(made, rank_mesh(made[1].program.mesh), samples), 4)
    assert all(a == pytest.approx(b, abs=1e-12) for a, b in zip(here, there, strict=True)) and abs(here[0][0] - here[2][0]) > 1e-6


def test_a_dummy_batch_draws_nothing():
    made = compiled("dp2", Wide)

    def run(axes, rank):
        short = losses_of(made, axes, [sample(0), sample(1)])
        after = torch.rand(1).item()
        long = losses_of(made, axes, [sample(0), NAN, sample(1)], [False, True, False])
        return short == [long[0], long[2]] and after == torch.rand(1).item()

    assert run_ranks(made[1].program.mesh, run, units=2) == [True, True]


def test_without_draws_the_generators_of_all_units_stay_together():
    made = compiled("dp2", Wide)

    def run(axes, rank):
        torch.manual_seed(3)
        rank_module(made, axes).eval().infer_step([sample(0)["x"]])
        return torch.rand(1).item()

    torch.manual_seed(3)
    assert run_ranks(made[1].program.mesh, run, units=2) == [torch.rand(1).item()] * 2


def test_units_draw_differently_in_a_plain_call():
    """Not only in train_step: a module that is called draws per unit too."""
    module = original(Wide)
    config = autopar.ComputeConfig(plan_ngpus=1, runtime_ngpus=2)
    made = (module, compile_module(module, {"x": sample(0)["x"]}, policy, config), config)
    a, b = run_ranks(made[1].program.mesh, lambda axes, rank: float(rank_module(made, axes)(sample(0)["x"])), units=2, seed=4)
    torch.manual_seed(4)
    assert a == float(module(sample(0)["x"])) != b


# ---- errors -------------------------------------------------------------------------------------------------


def raised(fn) -> str:
    with pytest.raises(StepError) as e:
        fn()
    return str(e.value)


def test_used_wrongly():
    made = compiled("one")
    module = rank_module(made, rank_mesh(()))
    one, x = [sample(0)], sample(0)
    for call in (lambda: module(x), lambda: module.forward(x), lambda: nn.Sequential(module)(x)):
        assert "compiled with use_end2end=True: call train_step(samples) to train and infer_step(samples)" in raised(call)
    with torch.no_grad():
        assert "train_step was called under torch.no_grad()" in raised(lambda: module.train_step(one))
    assert "samples must be a list, one per micro batch; it is a dict" in raised(lambda: module.train_step(x))
    assert "samples is empty" in raised(lambda: module.train_step([]))
    assert "as many flags as there are samples, 1; it has 2 entries" in raised(lambda: module.train_step(one, [True, False]))
    assert "scale_fn returned 1.0" in raised(lambda: module.train_step(one, None, lambda loss: 1.0))
    assert "scale_fn returned a tensor of shape () without a gradient" in raised(
        lambda: module.train_step(one, scale_fn=lambda loss: loss.detach())
    )
    module.end2end = False
    assert "train_step needs a module compiled with ComputeConfig(use_end2end=True)" in raised(lambda: module.train_step(one))
    assert module.infer_step.__doc__ and "infer_step needs" in raised(lambda: module.infer_step(one))
    module(x)


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.fc, self.what = nn.Linear(4, 4), what

    def forward(self, x):
        y = self.fc(x)
        return {
            "vector": lambda: y.sum(-1),
            "tuple": lambda: (y, y.mean()),
            "keepdim": lambda: y.mean().reshape(1),
            "dict": lambda: {"logits": y, "loss": y.mean()},
            "int": lambda: (x.sum() > 0, y.mean()),
            "detached": lambda: y.mean().detach(),
            "nothing": lambda: None,
            "number": lambda: (3.0, y.mean()),
            "nested": lambda: ((y.mean(),), y),
        }[self.what]()


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("vector", r"returns is a tensor of shape \(2,\) \(.*test_steps.py:\d+: .*y.sum"),
        ("tuple", r"is a tensor of shape \(2, 4\)"),
        ("keepdim", r"is a tensor of shape \(1,\)"),
        ("dict", r"is a tensor of shape \(2, 4\)"),
        ("int", r"is a tensor of bool"),
        ("detached", r"carries no gradient"),
        ("nothing", r"returns first is nothing"),
        ("number", r"returns first is 3.0"),
        ("nested", r"returns first is a container"),
    ],
)
def test_no_scalar_loss_first(what, text):
    with pytest.raises(ConfigError, match=text) as e:
        compile_module(Returns(what), {"x": torch.randn(2, 4)}, "dp", autopar.ComputeConfig(use_end2end=True))
    assert "use_end2end" in str(e.value)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, y=None, flag=False):
        return (self.fc(x) - (0 if y is None else y)).mean()


class Required(Two):
    def forward(self, x, y):
        return super().forward(x, y)


class Keyword(Two):
    def forward(self, *, x):
        return super().forward(x)


@pytest.mark.parametrize(
    ("cls", "args", "text"),
    [
        (Required, ("x", "y"), "argument 'y' of the forward of .*Required has no default"),
        (Two, ("x", "y"), "dummy_forward_args gives 'y'"),
        (Keyword, ("x",), "begins with 'x', which is not positional"),
        (Two, ("x",), None),
    ],
)
def test_one_sample_in(cls, args, text):
    config = autopar.ComputeConfig(use_end2end=True)
    given = {a: torch.randn(2, 4) for a in args}
    if text is None:
        assert "    end2end = True\n" in compile_module(cls(), given, "dp", config).texts["model.py"]
    else:
        with pytest.raises(ConfigError, match=text):
            compile_module(cls(), given, "dp", config)


def test_no_scalar_at_run_time():
    """Code that was written or changed by hand."""

    class Vector(ParallelModule):
        end2end = True

        def __init__(self, mesh):
            super().__init__(mesh)
            self.declare("w", (4,), torch.float64)

        def forward(self, x):
            return F.relu(self.w * x), None

    module = Vector(rank_mesh(())).load(lambda n, s: torch.ones(4, dtype=torch.float64))
    text = raised(lambda: module.train_step([torch.ones(4, dtype=torch.float64)]))
    assert text.startswith("the first value that Vector returns must be the loss, one floating-point number; it is a tensor of shape (4,)")


def test_verify_and_inference_only():
    config = autopar.ComputeConfig(plan_ngpus=2, use_end2end=True)
    assert autopar.verify(original(Net), {"batch": sample(0)}, "tp", config).ok
    quiet = autopar.ComputeConfig(use_end2end=True, inference_only=True)
    module = original(Wide).eval()
    made = (module, compile_module(module, {"x": sample(0)["x"]}, "dp", quiet), quiet)
    local = rank_module(made, rank_mesh(())).eval()
    assert torch.equal(local.infer_step([sample(0)["x"]])[0], module(sample(0)["x"]).detach())
    local.compute_config = quiet
    assert "inference_only=True and cannot be trained" in raised(lambda: local.train_step([sample(0)["x"]]))
