"""The core under another front-end: its own training_step, torch's optimizer and loaders, no configuration and no compiler.
Must not know TrainerArgs.
"""

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

import autopar
from autopar.train.core import Core
from autopar.train.data import Window
from autopar.train.gradients import Gradients
from autopar.train.phases import Phases
from autopar.train.spec import CheckpointSpec, RunSpec
from autopar.train.trainer import Trainer
from tests import train_cases as cases
from tests.procs import run_processes


class TorchGradients(Gradients):
    """Of replicas: summed by torch.distributed, clipped and stepped with torch's own."""

    def clip(self):
        params = self.optimizer.param_groups[0]["params"]
        for p in params:
            dist.all_reduce(p.grad)
        return torch.nn.utils.clip_grad_norm_(params, self.max_norm)


class TrainingSteps:
    """Passes of a front-end whose users write training_step(batch, batch_idx) and call backward in it."""

    def __init__(self, trainer):
        self.trainer, self.idx = trainer, 0

    def train(self, window: Window, scale):
        outputs = []
        for batch in window.data:
            self.trainer.scale = scale
            outputs.append(self.trainer.training_step(batch, self.idx))
            self.idx += 1
        return outputs

    def infer(self, batches):
        with torch.no_grad():
            return [self.trainer.validation_step(b, i) for i, b in enumerate(batches)]


class Mine(Core):
    def configure_environment(self):
        torch.manual_seed(7)

    def configure_dataloaders(self):
        made = {}
        for split, size in (("train", 22), ("val", 12)):
            data = cases.SimpleDataset(size=size, seed=split == "val")
            made[split] = DataLoader(data, 2, sampler=DistributedSampler(data, shuffle=split == "train"))
        return made

    def configure_model(self, sample):
        return cases.MLP()

    def configure_optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def configure_hooks(self):
        return [cases.Recorder()]

    def configure_passes(self):
        return TrainingSteps(self)

    def configure_gradients(self):
        return TorchGradients(self.optimizer, self.events, reduction="mean", max_norm=1.5, check_finite=True, early=True)

    def training_step(self, batch, batch_idx):
        loss, _ = self.model(batch)
        self.backward(loss)
        return {"loss": loss.detach()}

    def validation_step(self, batch, batch_idx):
        return {"val_loss": self.model(batch)[0]}

    def backward(self, loss):
        (loss if self.scale is None else self.scale(loss)).backward()


@pytest.mark.parametrize("n", [1, 2])
def test_a_front_end_of_another_kind(tmp_path, n):
    """6 micro batches of a rank (11 of one process) in windows of 3."""
    spec = RunSpec(
        micro_batch_size=2, grad_accumulation_steps=3, max_epochs=3, checkpoint=CheckpointSpec(save_dir=str(tmp_path / "c"), no_save=n > 1)
    )

    def rank_main(rank):
        trainer = Mine(spec)
        added = []
        trainer.phases.add("metrics", "second", lambda: added.append("second"), after=("first",))
        trainer.phases.add("metrics", "first", lambda: added.append("first"))
        trainer.run()
        seen = cases.Recorder.last
        return seen.losses, seen.norms, seen.val, added

    got = [rank_main(0)] if n == 1 else run_processes(rank_main, n)
    torch.manual_seed(7)
    model = cases.MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = 3 * (4 if n == 1 else 2)
    data = cases.SimpleDataset(size=22)
    losses, norms = cases.train_plain(model, optimizer, data, steps=steps, units=n, accumulation=3, shuffle=True, clip=1.5)
    val = cases.SimpleDataset(size=12, seed=1)
    for mine in got:
        assert mine[0] == pytest.approx(losses, abs=1e-5) and mine[1] == pytest.approx(norms, abs=1e-5)
        assert mine[2][steps] == pytest.approx(model({"x": val.x, "y": val.y})[0].item(), abs=1e-5)
        assert mine[3] == ["first", "second"]
    assert (tmp_path / "c" / "last").exists() == (n == 1)


def test_the_trainer_is_a_front_end_too(tmp_path):
    """Overriding one part of the YAML trainer."""

    class Other(Trainer):
        def configure_lr_scheduler(self, optimizer):
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0)

    args = cases.shared_args(tmp_path, max_train_steps=1, hook={"type": cases.Recorder})
    trainer = Other(args)
    trainer.fit()
    assert cases.Recorder.last.lrs == [0.0] and trainer.train_args.seed == 7


@pytest.mark.parametrize(
    ("add", "message"),
    [
        ([("compile", "x", ())], "unknown phase 'compile'.*parallelise"),
        ([("resume", "x", ("y",))], "'x' is to come after 'y', which phase 'resume' has not"),
        ([("resume", "x", ("y",)), ("resume", "y", ("x",))], "wait for each other: x -> y -> x|wait for each other: y -> x -> y"),
    ],
)
def test_wrong_parts_of_phases(add, message):
    phases = Phases()
    with pytest.raises(autopar.ConfigError, match=message):
        for phase, what, after in add:
            phases.add(phase, what, lambda: None, after=after)
        phases.run()


def test_phases_run_in_one_order_and_once():
    phases, done = Phases(), []
    for phase in ("fit", "launch", "configure"):
        phases.add(phase, phase, lambda phase=phase: done.append(phase))
    phases.add("configure", "before", lambda: done.append("before"))
    phases.run(last="configure")
    assert done == ["launch", "configure", "before"]
    phases.run()
    assert done == ["launch", "configure", "before", "fit"]


def test_compile_mode_calls_no_hook(tmp_path):
    """And builds no optimizer, reads no checkpoint, trains nothing."""
    args = cases.mlp_args(tmp_path, run_mode="compile", hook={"on_train_start": fail, "after_setup": fail, "on_finalize": fail})
    trainer = Trainer(args)
    trainer.run()
    assert trainer.model is None and trainer.optimizer is None and list((tmp_path / "gen").rglob("rank0.py"))


def fail(trainer):
    raise AssertionError("called")
