"""20 steps against 7, a restart, and 13: bitwise on the same layout for each save type; then on other layouts and in one process.
A hand-written loop around the Checkpointer first, then the trainer.
"""

from __future__ import annotations

import copy
import random
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from state_models import batch, groups, lm

import autopar
from autopar.config import ComputeConfig
from autopar.driver import compile_to
from autopar.errors import CheckpointError
from autopar.runtime import launch
from autopar.runtime.optimizer import build_optimizer
from autopar.train.checkpoint import Checkpointer, merge_checkpoint
from autopar.train.spec import CheckpointSpec
from tests.procs import run_processes
from tests.train_cases import NAME, merged, mlp_args

FIRST, STEPS = 7, 20
OPTIONS = {"lr": 0.01, "eps": 1e-3}  # eps: the bias of keys has a gradient of zero but for rounding, which Adam would blow up
EXACT = ("dcp", "dcp async", "sharded", "deduped async")
KINDS = (*EXACT, "deduped", "merged", "merged async")


def spec(folder, kind="dcp", **settings):
    save_type, _, later = kind.partition(" ")
    return CheckpointSpec(save_dir=str(folder / kind), save_type=save_type, async_save=bool(later), **settings)


class Run:
    """One rank of a run: tensor parallel twice, or what `plan` and `zero` say; the original module without them."""

    def __init__(self, code, config=None):
        if code is None:
            torch.manual_seed(99)
            self.module, self.units, self.unit = lm(), 1, 0
            named = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
            sets = [[p for n, p in named.items() if (groups(n) or {}) == g] for g in ({}, {"weight_decay": 0.3})]
            self.optimizer = torch.optim.AdamW([{"params": sets[0]}, {"params": sets[1], "weight_decay": 0.3}], **OPTIONS)
        else:
            self.units = config.runtime_ngpus // config.plan_ngpus
            self.module = launch.load(code, units=self.units)
            self.unit = self.module.mesh.unit
            self.optimizer = build_optimizer(self.module, torch.optim.AdamW, config, param_group_fn=groups, **OPTIONS)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, 0.5)

    def train(self, steps):
        for step in steps:
            self.optimizer.zero_grad()
            # NB: the data of two units, whichever layout reads it
            mine = [batch(2 * step + u) for u in range(2) if u % self.units == self.unit]
            reducer = getattr(self.optimizer, "reducer", None)
            with reducer.accumulate() if reducer is not None else nullcontext():
                for b in mine[:-1]:
                    (self.module(**b)["loss"] / 2).backward()
            (self.module(**mine[-1])["loss"] / 2).backward()
            self.optimizer.step()
            self.schedule.step()
        self.optimizer.zero_grad()

    def save(self, checkpointer, step=FIRST):
        rank = self.module.mesh.rank if hasattr(self.module, "mesh") else 0
        return checkpointer.save(
            module=self.module, optimizer=self.optimizer, status={"finished_train_steps": step}, lr_scheduler=self.schedule.state_dict(),
            dataloader={"unit": self.unit}, custom={"mine": rank}, step=step, epoch=0, val_loss=1.0, args={},
        )  # fmt: skip

    def load(self, checkpointer, path):
        loaded = checkpointer.load(path, module=self.module, optimizer=self.optimizer)
        assert loaded.status == {"finished_train_steps": FIRST}
        self.schedule.load_state_dict(loaded.lr_scheduler)
        loaded.restore_rng()
        return loaded

    def state(self):
        return copy.deepcopy(autopar.sharded_state_dict(self.module, self.optimizer))


def draw():
    return [torch.rand(2).tolist(), random.random(), float(np.random.rand())]


def first(codes, config, folder, rank, world):
    """Save after FIRST steps in every save type, and train on. For each model the state at the end and random draws after the save."""
    out = {}
    for name, code in codes.items():
        run = Run(code, config)
        random.seed(3 + rank)
        np.random.seed(4 + rank)
        run.train(range(FIRST))
        savers = [Checkpointer(spec(folder / name, kind), rank=rank, world_size=world) for kind in KINDS]
        for saver in savers:
            assert run.save(saver).path
        drawn = draw()
        run.train(range(FIRST, STEPS))  # while some are still being written
        for saver in savers:
            saver.wait()
        out[name] = run.state(), drawn
    return out


def again(codes, config, folder, rank, world):
    """Resume from every save type that keeps random states with the model that draws, from the others with the one that does not."""
    out = {}
    for name, kinds in (("drawing", EXACT), ("still", KINDS)):
        for kind in kinds:
            run = Run(codes[name], config)
            saver = Checkpointer(spec(folder / name, kind), rank=rank, world_size=world)
            loaded = run.load(saver, saver.find("last"))
            assert loaded.same_layout == ("merged" not in kind) and loaded.dataloader == {"unit": run.unit}
            assert loaded.custom == ({"mine": rank} if loaded.same_layout else {"mine": [*range(world)]})
            drawn = draw()
            run.train(range(FIRST, STEPS))
            out[name, kind] = run.state(), drawn
    return out


CONFIG = ComputeConfig(plan_ngpus=2, runtime_ngpus=4, use_zero=1, zero_use_reduce_scatter=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    torch.manual_seed(0)
    still = lm()
    drawing = copy.deepcopy(still).train()
    plan = ComputeConfig(plan_ngpus=2)
    codes = {n: compile_to(m, batch(0), "tp", plan, gen_savedir=root / n) for n, m in (("still", still), ("drawing", drawing))}
    ends = run_processes(lambda rank: first(codes, CONFIG, root, rank, 4), 4, 120)
    return root, codes, ends


@pytest.mark.procs
def test_the_same_layout_goes_on_bitwise(saved):
    root, codes, ends = saved
    got = run_processes(lambda rank: again(codes, CONFIG, root, rank, 4), 4, 120)
    for rank in range(4):
        for (name, kind), (state, drawn) in got[rank].items():
            want, want_drawn = ends[rank][name]
            assert_same(state, want, kind)
            assert (drawn == want_drawn) == ("merged" not in kind), kind
    assert not torch.equal(ends[0]["still"][0]["model"]["embed.weight"], ends[0]["drawing"][0]["model"]["embed.weight"])


def assert_same(got, want, what):
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want), what
    elif isinstance(want, dict):
        assert got.keys() == want.keys(), what
        for key in want:
            assert_same(got[key], want[key], f"{what}: {key}")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), what
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same(a, b, f"{what}: {i}")
    else:
        assert got == want, what


OTHERS = {
    "one process": (None, 1, None),
    "tp2": ("still", 2, ComputeConfig(plan_ngpus=2)),
    "zero3": ("still", 4, ComputeConfig(plan_ngpus=2, runtime_ngpus=4, use_zero=3)),
    "dp2": ("whole", 2, ComputeConfig(plan_ngpus=1, runtime_ngpus=2, use_zero=1)),
}


def elsewhere(code, config, root, rank, world, paths):
    out = []
    for path in paths:
        run = Run(code, config)
        saver = Checkpointer(spec(root / "other"), rank=rank, world_size=world)
        loaded = run.load(saver, path)
        exact = world == 4 and path.parent.name == "dcp"  # of ZeRO-3 in the same units: the layout is the same for all but tensors
        assert loaded.custom == ({"mine": rank} if exact else {"mine": [0, 1, 2, 3]})
        assert loaded.dataloader == ({"unit": run.unit} if run.units == 2 else None), "of another number of units no loader's state fits"
        run.train(range(FIRST, STEPS))
        out.append(run.state())
    return out


@pytest.mark.procs
@pytest.mark.parametrize("name", OTHERS)
def test_another_layout_goes_on(saved, name):
    root, codes, ends = saved
    which, world, config = OTHERS[name]
    if which == "whole":
        torch.manual_seed(0)
        codes = {**codes, which: compile_to(lm(), batch(0), "dp", ComputeConfig(), gen_savedir=root / which)}
    paths = [root / "still" / kind / "0000-0000007" for kind in ("dcp", "merged")]
    for kind in ("sharded", "deduped", "dcp"):
        merge_checkpoint(root / "still" / kind / "last", paths[0].parents[1] / f"{kind}.pt")
        paths.append(paths[0].parents[1] / f"{kind}.pt")
    run = lambda rank: elsewhere(codes.get(which), config, root, rank, world, paths)  # noqa: E731
    got = run_processes(run, world, 120) if world > 1 else [run(0)]
    want, want_optim = autopar.merge_state_dicts([e["still"][0] for e in ends])
    for i, path in enumerate(paths):
        model, optim = autopar.merge_state_dicts([r[i] for r in got])
        for key, t in want.items():
            torch.testing.assert_close(model[key], t, rtol=1e-4, atol=5e-6, msg=lambda m, key=key, path=path: f"{path.name}, {key}: {m}")
        assert [g["lr"] for g in optim["param_groups"]] == [g["lr"] for g in want_optim["param_groups"]]
        assert [g["weight_decay"] for g in optim["param_groups"]] == [0.01, 0.3]


def refused(code, config, root, rank, world):
    run = Run(code, config)
    out = []
    for kind in ("sharded", "deduped"):
        try:
            Checkpointer(spec(root / "still", kind), rank=rank, world_size=world).load(
                root / "still" / kind / "0000-0000007", module=run.module, optimizer=run.optimizer
            )
        except CheckpointError as e:
            out.append(str(e))
    return out


@pytest.mark.procs
def test_sharded_ones_are_of_one_layout(saved):
    """Another number of ranks, and the same with other ZeRO settings: what the error says."""
    root, codes, _ = saved
    other = ComputeConfig(plan_ngpus=2)
    for kind, text in zip(("sharded", "deduped"), run_processes(lambda r: refused(codes["still"], other, root, r, 2), 2)[0], strict=True):
        assert f"is a {kind} checkpoint of 4 ranks in scale units of 2; here are 2 in units of 2. Merge it and resume from the file" in text
        assert f"`autopar checkpoint merge {root}/still/{kind}/0000-0000007 {root}/still/{kind}/0000-0000007-merged.pt`" in text
    whole = ComputeConfig(plan_ngpus=2, runtime_ngpus=4)
    for sharded, deduped in run_processes(lambda r: refused(codes["still"], whole, root, r, 4), 4):
        assert "/sharded/0000-0000007 is of another layout: " in sharded and "was sharded in another way (ZeRO settings)" in sharded
        assert "/deduped/0000-0000007 is of another layout: " in deduped and "(optimizer state) as this rank holds it" in deduped
        assert "autopar checkpoint merge" in sharded and "autopar checkpoint merge" in deduped
    data = compile_to(lm(), batch(0), "data", ComputeConfig(plan_ngpus=2), gen_savedir=root / "data")
    for texts in run_processes(lambda r: refused(data, whole, root, r, 4), 4):
        for text in texts:
            assert "is of another layout: the state dict is of another plan: this rank holds another part of " in text
            assert "autopar checkpoint merge" in text


# -- through the trainer


def trained(args):
    """Losses by step, and the state at the end, of a run of the trainer."""
    from tests.train_cases import Recorder, train

    trainer, recorder = train(args)
    state = autopar.sharded_state_dict(trainer.model, trainer.optimizer)
    assert isinstance(recorder, Recorder)
    return recorder.losses, copy.deepcopy(state)


def settings(folder, kind, draws, **changes):
    save_type, _, later = kind.partition(" ")
    base = mlp_args(
        folder / kind,
        gen_savedir=str(folder / f"gen{draws}"),
        compute_config={"plan_ngpus": 1, "runtime_ngpus": 2, "use_end2end": True, "use_zero": True},
        model={"type": f"{NAME}.MLP", "args": {"dim": 8, "dropout": 0.2 if draws else 0.0}},
        optimizer={"type": "torch.optim.AdamW", "args": {"lr": 0.02}, "clip_gnorm": 0.5},
        lr_scheduler={"type": "torch.optim.lr_scheduler.StepLR", "args": {"step_size": 6, "gamma": 0.5}, "interval": "step"},
        dataset={"type": f"{NAME}.{'Noisy' if draws else 'SimpleDataset'}", "train_args": {"size": 44}},
        dataset_sampler={"train_args": {"shuffle": True}},
        checkpoint={"save_type": save_type if kind in KINDS else "dcp", "async_save": bool(later)},
        max_epochs=None,
        max_train_steps=STEPS,
    )
    base["checkpoint"]["no_save"] = kind == "whole"
    return merged(base, changes)


def in_pieces(folder, rank):
    """For each save type the run that was interrupted, beside the one that was not. An epoch has 11 steps."""
    out = {}
    wholes = {draws: trained(settings(folder, "whole", draws)) for draws in (True, False)}
    for kind in ("dcp", "dcp async", "sharded", "deduped", "merged"):
        draws = kind != "merged"
        trained(settings(folder, kind, draws, max_train_steps=FIRST))
        losses, state = trained(settings(folder, kind, draws, seed=99, checkpoint={"resume_from": "last"}))
        out[kind] = (losses, state), wholes[draws]
    return out


@pytest.mark.procs
def test_the_trainer_goes_on_bitwise(tmp_path):
    for got in run_processes(lambda rank: in_pieces(tmp_path, rank), 2, 200):
        for kind, ((losses, state), (want, want_state)) in got.items():
            assert len(losses) == STEPS - FIRST and losses == want[FIRST:], kind
            assert_same(state, want_state, kind)


def one_process(folder: Path):
    changes = {
        "gen_savedir": str(folder / "gen one"),
        "compute_config": {"runtime_ngpus": 1, "use_zero": False},
        "grad_accumulation_steps": 2,
    }
    paths = [f"{folder}/dcp/checkpoints/last", f"{folder}/merged/checkpoints/last", f"{folder}/sharded.pt"]
    return {p: trained(settings(folder, "one", False, **changes, checkpoint={"resume_from": p})) for p in paths}


@pytest.mark.procs
def test_the_trainer_goes_on_in_one_process(tmp_path):
    def two(rank):
        whole = trained(settings(tmp_path, "whole", False))
        for kind in ("dcp", "merged", "sharded"):
            trained(settings(tmp_path, kind, False, max_train_steps=FIRST))
        return whole

    ends = run_processes(two, 2, 200)
    merge_checkpoint(sorted((tmp_path / "sharded" / "checkpoints" / "last").glob("rank*.pt")), tmp_path / "sharded.pt")
    want, _ = autopar.merge_state_dicts([e[1] for e in ends])
    ((got),) = run_processes(lambda rank: one_process(tmp_path), 1, 200)
    for path, (losses, state) in got.items():
        torch.testing.assert_close(losses, ends[0][0][FIRST:], rtol=1e-5, atol=1e-6, msg=lambda m, p=path: f"{p}: {m}")
        model, _ = autopar.merge_state_dicts([state])
        for key, t in want.items():
            torch.testing.assert_close(model[key], t, rtol=1e-4, atol=1e-5)
