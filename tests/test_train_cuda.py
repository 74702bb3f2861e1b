"""The trainer on a CUDA device: against plain PyTorch there, resumed, interrupted; two ranks that share one device. Skipped without one.
Must not know what the device is.
"""

import os

import pytest
import torch

from tests import train_cases as cases
from tests.procs import run_processes

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a process that asked the driver itself cannot be forked
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
STEPS = 8


def gpt_args(folder, **changes):
    base = cases.shared_args(
        folder,
        model={"type": cases.TinyGPT},
        optimizer={"type": "torch.optim.AdamW", "args": {"lr": 0.01}, "clip_gnorm": 1.5},
        dataset={"type": cases.ByteDataset, "train_args": {"size": 24}, "val_args": {"size": 8, "seed": 1}},
        dataloader={"train_args": {"pin_memory": True, "num_workers": 1}},
        grad_accumulation_steps=3,
        max_epochs=None,
        max_train_steps=STEPS,
    )
    return cases.merged(base, changes)


def plain(units=1, precision=None):
    torch.manual_seed(7)
    model = cases.TinyGPT().to("cuda", torch.bfloat16 if precision else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    class OnDevice(cases.ByteDataset):
        def __getitem__(self, i):
            return {k: v.cuda() for k, v in super().__getitem__(i).items()}

    return cases.train_plain(model, optimizer, OnDevice(24), steps=STEPS, units=units, accumulation=3, clip=1.5)


def plain_elsewhere(**kwargs):
    """In a process of its own: this one is to be forked."""
    return run_processes(lambda rank: plain(**kwargs), 1, 240, connect=False)[0]


def seen_by(args):
    trainer, seen = cases.train(args)
    assert trainer.device.type == "cuda" and {p.device.type for p in trainer.model.parameters()} == {"cuda"}
    return seen.losses, seen.norms, seen.val


def test_two_ranks_on_one_device(tmp_path):
    """NB: first of all, before this process has used CUDA and cannot be forked. Gloo: CUDA tensors go through the host."""
    if torch.cuda.is_initialized():
        pytest.skip("this process has used CUDA")
    zero = {"runtime_ngpus": 2, "use_zero": True}
    configs = {
        "tp": {"plan_ngpus": 2},
        "zero": zero,
        "scattered": zero | {"zero_use_reduce_scatter": True, "use_async_reducer": True},
        "zero3": zero | {"use_zero": 3},
    }
    for name, config in configs.items():
        args = gpt_args(tmp_path / name, compute_config=config, pas_policy="tp" if name == "tp" else "dp")
        losses, norms = plain_elsewhere(units=1 if name == "tp" else 2)
        for mine in run_processes(lambda rank, a=args: seen_by(a), 2, 240):
            assert mine[0] == pytest.approx(losses, abs=1e-4), name
            assert mine[1] == pytest.approx(norms, rel=1e-3), name


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_one_rank(tmp_path, precision):
    losses, norms, val = seen_by(gpt_args(tmp_path, precision=precision))
    want, want_norms = plain(precision=precision)
    tol = 2e-2 if precision else 1e-4
    assert losses == pytest.approx(want, abs=tol) and norms == pytest.approx(want_norms, rel=5 * tol)
    assert list(val) == [4, 8]


def test_resumed_bitwise_and_numbers_shown(tmp_path):
    profile = {"every_n_train_steps": 2, "folder": str(tmp_path / "profile"), "memory_snapshot": True}
    args = cases.shared_args(  # NB: products of matrices, which are deterministic; attention's backward is not
        tmp_path,
        model={"args": {"dropout": 0.2}},
        checkpoint={"no_save": False, "resume_from": "last", "async_save": True},
        profile=profile,
        max_epochs=None,
        max_train_steps=STEPS,
    )
    whole = seen_by(cases.merged(args, {"checkpoint": {"no_save": True, "resume_from": None}}))[0]
    begun = seen_by(cases.merged(args, {"max_train_steps": 3}))[0]
    assert begun + seen_by(args)[0] == whole
    trainer, _ = cases.train(cases.merged(args, {"max_train_steps": STEPS + 2}))
    metrics = trainer.loop._metrics
    assert metrics.samples_per_s > 0 and metrics.tflops > 0 and metrics.memory_gb > 0
    kinds = {f.suffix for f in (tmp_path / "profile").rglob("*") if f.is_file()}
    assert kinds == {".json", ".pickle"}
