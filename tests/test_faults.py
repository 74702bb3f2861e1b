"""Faults of one rank in train_step, under gloo: every rank ends, soon, with the cause. In process: what ranks must agree on.
Must not know how ranks tell each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch

from autopar.errors import LayoutError, StepError
from autopar.runtime.groups import rank_mesh
from autopar.runtime.inproc import run_ranks
from autopar.runtime.optimizer import build_optimizer
from tests.procs import ProcessesFailed, run_processes
from tests.step_models import compiled, rank_module, sample

SOON = 15.0  # seconds in which all ranks must have ended; their collectives would wait for 60
TWO = [sample(0), sample(1)]
BAD = 1  # the rank that has the fault
SLOWEST: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print("\nfault: seconds until the last rank had ended")
    for what, seconds in SLOWEST.items():
        print(f"  {what}: {seconds:.1f}")


def ends(what: str, mesh: str, fault, settings=None, *, world=4, timeout=60.0, step=None, lives_on=False) -> list:
    """Train a step well, then one with fault(module, rank) -> samples in it. Each rank's error and its seconds; None: killed."""
    made = compiled(mesh)
    with tempfile.TemporaryDirectory() as folder:

        def run(rank: int) -> None:
            module = rank_module(made, rank_mesh(made[1].program.mesh, timeout=timeout))
            optimizer = None
            if settings is not None:
                optimizer = build_optimizer(module, torch.optim.SGD, settings, lr=0.1)
            module.train_step([sample(7)])
            if optimizer:
                optimizer.step()
                optimizer.zero_grad()
            before = [p.detach().clone() for p in module.parameters()]
            start = time.monotonic()
            report = {"error": None}
            try:
                samples = fault(module, rank) or TWO
                (step or (lambda m, o, s: m.train_step(s)))(module, optimizer, samples)
            except BaseException as e:
                same = all(torch.equal(a, b) or bool(a.isnan().any()) for a, b in zip(before, module.parameters(), strict=True))
                notes = "; ".join(getattr(e, "__notes__", []))
                report = {"error": type(e).__name__, "text": str(e), "notes": notes, "same": same}
            report["seconds"] = time.monotonic() - start
            Path(folder, f"{rank}.json").write_text(json.dumps(report))
            time.sleep(4 if lives_on and rank == BAD else 0.2)  # as a script that ends in an orderly way
            os._exit(0)

        start = time.monotonic()
        with contextlib.suppress(ProcessesFailed, FileNotFoundError):  # no results: the reports are read instead
            run_processes(run, world, timeout=60.0, connect=False)
        seconds = time.monotonic() - start
        files = [Path(folder, f"{r}.json") for r in range(world)]
        reports = [json.loads(f.read_text()) if f.exists() else None for f in files]
    SLOWEST[what] = max(r["seconds"] for r in reports if r)
    assert seconds < SOON, f"{what}: all ranks had ended after {seconds:.1f} s"
    return reports


def raises(module, rank):
    raise KeyError("the data is gone")


def in_forward(module, rank):
    if rank == BAD:
        module.norm.register_buffer("running_mean", None)


def in_a_module_hook(module, rank):
    if rank == BAD:
        module.register_forward_pre_hook(lambda m, args: raises(m, rank))


def in_backward(module, rank):
    if rank == BAD:
        module.up.weight.register_hook(lambda g: raises(module, rank))


def in_a_gradient_hook(module, rank):
    if rank == BAD:
        module.down.weight.register_post_accumulate_grad_hook(lambda p: raises(module, rank))


def in_a_reducer_hook(module, rank):
    if rank == BAD:
        module._grad_reducer.register_pre_hook(lambda reducer, grads: raises(module, rank))


RAISING = {
    "raises in forward": ("tp2 x 2", in_forward, None, "forward of sample 0", ""),
    "raises in a module hook": ("tp2 x 2", in_a_module_hook, None, "forward of sample 0", "KeyError: 'the data is gone'"),
    "raises in backward": ("tp2 x 2", in_backward, None, "backward of sample 0", "KeyError: 'the data is gone'"),
    "raises in backward, ranks apart": ("dp2", in_backward, None, "backward of sample 0", "KeyError: 'the data is gone'"),
    "raises in a gradient hook": ("tp2 x 2", in_a_gradient_hook, {}, "backward of sample 0", "KeyError: 'the data is gone'"),
    "raises in a reducer hook": ("dp2", in_a_reducer_hook, {}, "sum of the gradients", "KeyError: 'the data is gone'"),
    "raises in a reducer hook, asynchronous": (
        "tp2 x 2",
        in_a_reducer_hook,
        {"use_async_reducer": True},
        "backward of sample 1",
        "KeyError: 'the data is gone'",
    ),
}


@pytest.mark.procs
@pytest.mark.parametrize("what", RAISING)
def test_one_rank_raises(what):
    """It raises its own error, the others StepError that names rank, place and cause."""
    mesh, fault, settings, place, cause = RAISING[what]
    for rank, report in enumerate(ends(what, mesh, fault, settings, world=2 if mesh == "dp2" else 4)):
        assert report["error"] == ("StepError" if rank != BAD else "KeyError" if cause else report["error"]), report
        if rank == BAD:
            assert f"on rank {BAD}, in train_step 2, {place}; the other ranks end with this error" in report["notes"]
        else:
            assert report["text"].startswith(f"rank {BAD} failed in train_step 2, {place}: {cause}"), report["text"]
            assert "(at " in report["text"]
        assert report["same"], "no rank has changed a parameter"


@pytest.mark.procs
def test_a_rank_that_fails_after_the_last_collective():
    """The others go on to what follows the step, and wait there for it: they too end with the cause."""

    def fault(module, rank):
        if rank == BAD:
            module._grad_reducer.register_post_hook(lambda reducer, grads: raises(module, rank))

    def step(module, optimizer, samples):
        module.train_step(samples)
        optimizer.clip_gnorm(1.0)
        optimizer.step()

    for rank, report in enumerate(ends("raises after the last collective", "dp2", fault, {}, world=2, step=step)):
        assert report["error"] == ("KeyError" if rank == BAD else "StepError"), report
        assert rank == BAD or report["text"].startswith("rank 1 failed in train_step 2, sum of the gradients: KeyError")


@pytest.mark.procs
def test_a_rank_that_fails_and_lives_on():
    """No connection breaks; the others still do not wait for the timeout."""
    for rank, report in enumerate(ends("raises in backward, its process lives on", "tp2 x 2", in_backward, lives_on=True)):
        assert report["error"] == ("KeyError" if rank == BAD else "StepError")
        assert report["seconds"] < 4 and (rank == BAD or report["text"].startswith("rank 1 failed in train_step 2, backward of sample 0"))


@pytest.mark.procs
@pytest.mark.parametrize("mesh,world", [("tp2 x 2", 4), ("dp2", 2)])
def test_one_rank_is_killed(mesh, world):
    def fault(module, rank):
        if rank == BAD:
            module.up.weight.register_hook(lambda g: os.kill(os.getpid(), signal.SIGKILL))

    for rank, report in enumerate(ends(f"killed in backward, {world} ranks", mesh, fault, world=world)):
        assert (report is None) == (rank == BAD)
        if report:
            assert report["error"] == "StepError", report
            assert "train_step 2 ended: no answer from rank 1: killed (out of memory?) or cut off (" in report["text"]


@pytest.mark.procs
def test_the_rank_that_does_not_come():
    """One rank sleeps: after the timeout of the process group the others say where each is."""

    def fault(module, rank):
        if rank == BAD:
            time.sleep(6)

    first, other = ends("does not come (timeout 2 s)", "dp2", fault, world=2, timeout=2.0)
    assert first["error"] == "StepError" and 1.5 < first["seconds"] < 6
    assert "train_step 2 ended: a collective failed (" in first["text"] and "but all ranks live: rank 0 in train_step 2, " in first["text"]
    assert "; rank 1 outside of a step, after train_step 1" in first["text"]
    assert other["text"] == first["text"], "it learns of it when it comes"


@pytest.mark.procs
@pytest.mark.parametrize("settings", [None, {"use_async_reducer": True}], ids=["plain", "async"])
def test_nan_in_a_gradient_of_one_rank(settings):
    def fault(module, rank):
        module.check_finite = True
        if rank == BAD:
            module.up.weight.register_hook(lambda g: g * float("nan"))

    for report in ends(f"NaN in a gradient, {settings}", "tp2 x 2", fault, settings):
        assert report["error"] == "StepError" and report["same"]
        assert report["text"].startswith("NaN or infinite before the gradients are summed: the gradient of up.weight on rank 1.")


@pytest.mark.procs
def test_different_numbers_of_samples():
    for report in ends("different numbers of samples", "tp2 x 2", lambda module, rank: [sample(0)] * (3 if rank == BAD else 2)):
        assert report["error"] == "StepError" and report["seconds"] < 2
        assert report["text"].startswith("ranks were given different numbers of samples: 2 on ranks 0, 2, 3; 3 on rank 1.")


@pytest.mark.procs
def test_all_ranks_fail_alike_and_go_on():
    """A batch that no rank can take: each raises its own error, and the next step works."""
    made = compiled("tp2 x 2")

    def run(rank):
        module = rank_module(made, rank_mesh(made[1].program.mesh))
        out = []
        for samples in ([sample(0)], [{"x": sample(0)["x"]}], [sample(0)]):
            time.sleep(0.2 * rank)
            try:
                out.append(float(module.train_step(samples)[0]["loss"]))
            except Exception as e:
                out.append(type(e).__name__)
        time.sleep(1.5)
        return [*out, float(module.train_step([sample(0)])[0]["loss"])]

    for first, error, again, last in run_processes(run, 4):
        assert error == "GuardError" and first == pytest.approx(again, abs=1e-12) == pytest.approx(last, abs=1e-12)


# ---- in process: what is agreed on --------------------------------------------------------------------------


def texts(mesh: str, call) -> list[str]:
    """The StepError of every rank."""
    made = compiled(mesh)

    def run(axes, rank):
        module = rank_module(made, axes)
        try:
            call(module, rank)
        except StepError as e:
            return str(e)
        return ""

    return run_ranks(made[1].program.mesh, run, units=2 if mesh in ("dp2", "tp2 x 2") else 1)


NANS = {k: v * float("nan") for k, v in sample(0).items()}


@pytest.mark.parametrize(
    ("mesh", "call", "text"),
    [
        ("2x2", lambda m, r: m.train_step([sample(0)] * (1 + r // 2)), "samples: 1 on ranks 0, 1; 2 on ranks 2, 3."),
        ("dp2", lambda m, r: m.train_step([sample(0)] * (5 - r)), "samples: 4 on rank 1; 5 on rank 0."),
        ("tp2", lambda m, r: m.infer_step([sample(0)] * (1 + r)), "samples: 1 on rank 0; 2 on rank 1."),
        ("tp2 x 2", lambda m, r: m.train_step(TWO, [False, r == 3]), "ranks 2, 3 form one scale unit but"),
        ("2x2", lambda m, r: m.train_step(TWO) if r else m.infer_step(TWO), None),
        ("dp2", lambda m, r: m.train_step(TWO if r else []), "rank 0 called train_step with wrong arguments|samples is empty"),
        ("dp2", lambda m, r: m.train_step(TWO, [True] * (3 - r)), "is_dummy_batch must be|rank 0 called train_step with wrong arguments"),
    ],
)
def test_agreement(mesh, call, text):
    if text is None:
        with pytest.raises(LayoutError, match=r"mismatched collectives|deadlock"):
            texts(mesh, call)
        return
    found = texts(mesh, call)
    assert all(any(t in f for t in text.split("|")) for f in found), found


def test_units_may_have_different_dummies():
    assert texts("tp2 x 2", lambda m, r: m.train_step(TWO, [False, r >= 2])) == [""] * 4


def finite(poison, mesh: str = "tp2 x 2", samples=lambda r: TWO, flags=None) -> list[str]:
    def call(module, rank):
        module.check_finite = True
        with torch.no_grad():
            poison(module, rank)
        module.train_step(samples(rank), flags)

    return texts(mesh, call)


def bad_weight(module, rank):
    if rank == 3:
        module.down.weight[0, 0] = torch.inf


def bad_gradients(module, rank):
    if rank < 2:
        p = (module.up.bias, module.down.bias)[rank]
        p.register_hook(lambda g: g * float("nan"))


def nothing(module, rank):
    pass


@pytest.mark.parametrize(
    ("poison", "samples", "text"),
    [
        (bad_weight, lambda r: TWO, "the parameter down.weight itself on rank 3."),
        (nothing, lambda r: [sample(0), NANS if r >= 2 else sample(1)], "the loss of sample 1 on ranks 2, 3."),
        (bad_gradients, lambda r: TWO, "the gradient of up.bias on rank 0; the gradient of down.bias on rank 1."),
        (nothing, lambda r: TWO, ""),
    ],
)
def test_check_finite(poison, samples, text):
    found = finite(poison, samples=samples)
    assert all(text in f if text else not f for f in found), found


def test_nan_in_a_dummy_batch_is_no_fault():
    assert finite(nothing, samples=lambda r: [sample(0), NANS], flags=[False, True]) == [""] * 4
