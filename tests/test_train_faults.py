"""What ends a run before its time: losses that are not finite, exceptions on one rank, signals. All ranks end, with the cause.
Must not know how ranks tell each other.
"""

import os
import signal
import time

import pytest
import torch
from torch import nn

import autopar
from autopar.train import Trainer, TrainHook, interrupts
from tests import train_cases as cases
from tests.procs import run_processes


def outcomes(args, n=2, after=lambda trainer: trainer.train_status.finished_train_steps):
    """Of every rank: (what its run raised, finished steps, seconds until then)."""

    def rank_main(rank):
        trainer = Trainer(args)
        start = time.monotonic()
        try:
            trainer.run()
            said = "ended well"
        except BaseException as e:
            said = f"{type(e).__name__}: {e}"
        return said, after(trainer), time.monotonic() - start

    return run_processes(rank_main, n)


# -- what is not finite


def test_nan_loss_on_one_rank(tmp_path):
    """Sample 13 is in micro batch 3 of unit 1, the second of its window; no parameter is changed in that step."""

    class Keep(TrainHook):
        def before_zero_grad(self, trainer):
            self.weights = [p.detach().clone() for p in trainer.model.parameters()]

    def same(trainer):
        kept = next(h for h in trainer.hooks if isinstance(h, Keep)).weights
        return trainer.train_status.finished_train_steps, all(map(torch.equal, kept, trainer.model.parameters()))

    args = cases.shared_args(tmp_path, dataset={"train_args": {"nan": (13,)}}, grad_accumulation_steps=2, hook={"type": Keep})
    for said, (done, unchanged), _ in outcomes(args, after=same):
        assert said.startswith("StepError: step 2: the loss of micro batch 1 is not finite on rank 1"), said
        assert said.endswith("No rank has changed a parameter in this step")
        assert done == 1 and unchanged


def test_nan_in_both_ranks_of_a_unit(tmp_path):
    args = cases.shared_args(tmp_path, dataset={"train_args": {"nan": (2,)}}, compute_config={"plan_ngpus": 2}, pas_policy="tp")
    for said, done, _ in outcomes(args):
        assert "step 2: the loss of micro batch 0 is not finite on ranks 0, 1" in said and done == 1


class Root(nn.Module):
    """The loss is finite where x is 0; the gradient of p is not."""

    def __init__(self):
        super().__init__()
        self.layer, self.p = cases.Layer(8), nn.Parameter(torch.ones(8))

    def forward(self, batch):
        return (self.layer(batch["x"]) - batch["y"]).square().mean() + (batch["x"].square() * self.p).sqrt().mean()


class Zeros(cases.SimpleDataset):
    def __init__(self, zero, **options):
        super().__init__(**options)
        self.x[zero] = 0.0


@pytest.mark.parametrize("part", [False, True])
def test_nan_gradient_of_a_finite_loss(tmp_path, part):
    """Whose gradient it was is found out, though it has been summed into those of all."""
    changes = {}
    if part:
        layer = {"type": cases.Layer, "forward_args_gen_fn": cases.layer_args}
        changes = {"model": {"type": Root, "parallel_modules": [layer]}, "compute_config": {"use_end2end": False}}
    args = cases.shared_args(tmp_path, **{"model": {"type": Root}, "dataset": {"type": Zeros, "train_args": {"zero": 7}}, **changes})
    for said, done, _ in outcomes(args):
        assert "step 2: the gradient norm is nan:" in said and done == 1, said
        assert ("the gradient of p on rank 1" if not part else "rank 1: p") in said


def test_without_the_check_training_goes_on(tmp_path):
    args = cases.shared_args(tmp_path, dataset={"train_args": {"nan": (13,)}}, check_finite=False, max_epochs=1)
    assert [(said, done) for said, done, _ in outcomes(args)] == [("ended well", 10 // 2)] * 2


# -- exceptions on one rank


class FailingHook(TrainHook):
    """Raises on rank 1, in one hook, after 2 finished steps."""

    def __init__(self, where):
        setattr(self, where, self.fail)

    def fail(self, trainer, *args):
        if trainer.rank == 1 and trainer.train_status.finished_train_steps == 2:
            raise ValueError("the hook has no idea")


WHERE = ["on_step_start", "on_train_step_end", "before_sync_grad", "after_gnorm_clip", "on_step_end", "on_val_step_end", "on_val_end"]


@pytest.mark.parametrize("where", WHERE)
def test_exception_in_a_hook(tmp_path, where):
    args = cases.shared_args(
        tmp_path, hook={"type": FailingHook, "args": {"where": where}}, dataset={"val_args": {"size": 8}}, val_every_n_train_steps=2
    )
    (other, _, seconds), (mine, _, _) = outcomes(args)
    assert mine == "ValueError: the hook has no idea"
    assert other.startswith("StepError: rank 1 failed in train_step ") and "ValueError: the hook has no idea" in other
    assert f"in the hook FailingHook.{where}, after 2 finished steps" in other
    assert seconds < 40


def test_exception_in_the_data(tmp_path):
    args = cases.shared_args(tmp_path, dataset={"train_args": {"fail": 13}})
    (other, done, _), (mine, _, _) = outcomes(args)
    assert mine == "ValueError: sample 13 cannot be read"
    assert "rank 1 failed" in other and "sample 13 cannot be read" in other and done <= 3


class BadOnOneRank(cases.SimpleDataset):
    def __init__(self, **options):
        super().__init__(**options)
        if os.environ["RANK"] == "1":
            raise OSError("no such disk")


def test_exception_while_the_run_is_built(tmp_path):
    (other, _, _), (mine, _, _) = outcomes(cases.shared_args(tmp_path, dataset={"type": BadOnOneRank}))
    assert mine == "OSError: no such disk"
    assert other.startswith("LayoutError: rank 1 failed to make the data: OSError: no such disk")


class BadModule(cases.Around):
    def forward(self, batch):
        if torch.distributed.get_rank() == 1 and batch["x"][0, 0] == cases.SimpleDataset().x[5, 0]:
            raise ValueError("a strange sample")
        return super().forward(batch)


def test_exception_in_an_ordinary_model(tmp_path):
    layer = {"type": cases.Layer, "forward_args_gen_fn": cases.layer_args}
    model = {"type": BadModule, "parallel_modules": [layer]}
    (other, done, _), (mine, _, _) = outcomes(cases.shared_args(tmp_path, model=model, compute_config={"use_end2end": False}))
    assert mine == "ValueError: a strange sample"
    assert "rank 1 failed in train_step 2, forward of sample 0: ValueError: a strange sample" in other and done == 1


def test_loggers_are_told_how_it_ended(tmp_path):
    class Log:
        said: list = []  # noqa: RUF012

        def setup(self, run): ...

        def log_metrics(self, metrics, step, *, tag): ...

        def flush(self): ...

        def finalize(self, status):
            self.said.append(status)

    args = cases.shared_args(tmp_path, log=[{"type": Log}], max_train_steps=2)
    cases.train(args)
    with pytest.raises(autopar.StepError):
        cases.train(cases.merged(args, {"dataset": {"train_args": {"nan": (2,)}}}))
    with pytest.raises(SystemExit):
        cases.train(cases.merged(args, {"hook": {"type": Signal, "args": {"number": signal.SIGINT}}, "max_train_steps": 9}))
    assert Log.said == ["finished", "failed", "interrupted"]


# -- signals


class Signal(TrainHook):
    """One rank sends itself a signal in a step, and perhaps once more, `twice` seconds before it goes on; records the steps made."""

    def __init__(self, number, step=3, rank=0, twice=0.0):
        self.number, self.step, self.rank, self.twice = number, step, rank, twice
        self.losses = []

    def on_train_step_start(self, trainer, batches):
        if trainer.train_status.finished_train_steps == self.step - 1 and trainer.rank == self.rank:
            os.kill(os.getpid(), self.number)
            while not trainer.interrupts.requested:  # NB: another thread may get the signal first, and two at a time are one
                time.sleep(0.01)
            if self.twice:
                os.kill(os.getpid(), self.number)
                time.sleep(self.twice)

    def on_step_end(self, trainer, epoch, idx, step_metrics, aggregated_outputs):
        self.losses.append(step_metrics.train_loss)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("save", [True, False])
def test_a_signal_to_one_rank(tmp_path, number, save):
    """All ranks end after the same step, with a checkpoint if any are written, from which the run goes on as if nothing had been."""

    def losses(trainer):
        return next(h for h in trainer.hooks if isinstance(h, (Signal, cases.Recorder))).losses

    args = cases.shared_args(
        tmp_path,
        dataset={"type": cases.Noisy},
        model={"args": {"dropout": 0.2}},
        dataset_sampler={"train_args": {"shuffle": True}},
        max_train_steps=8,
        checkpoint={"no_save": not save, "resume_from": "last" if save else None},
        hook={"type": Signal, "args": {"number": int(number), "rank": 1}},
    )
    interrupted = outcomes(args, after=losses)
    assert [said for said, _, _ in interrupted] == [f"SystemExit: {128 + number}"] * 2
    made = interrupted[0][1]
    assert made == interrupted[1][1] and len(made) == (4 if save else 3)  # one more, so that loaders are saved as they are
    checkpoints = tmp_path / "checkpoints"
    if save:
        assert os.readlink(checkpoints / "last").endswith("0000-0000004") and not (checkpoints / "best").exists()
        recorder = {"type": cases.Recorder, "args": {}}
        resumed = outcomes({**args, "hook": recorder}, after=losses)
        plain = {**args, "hook": recorder, "checkpoint": {"no_save": True}}
        assert made + resumed[0][1] == outcomes(plain, after=losses)[0][1], "bitwise, in the middle of an epoch"
    else:
        assert not checkpoints.exists()


@pytest.mark.parametrize("was", [signal.default_int_handler, signal.SIG_IGN], ids=["default", "ignored"])
@pytest.mark.parametrize("soon", [True, False])
def test_a_second_signal_ends_it_at_once(tmp_path, monkeypatch, soon, was):
    """Unless it comes with the first: under torchrun, Ctrl-C does. In the background of a shell, SIGINT is ignored at first."""
    monkeypatch.setattr(interrupts, "GRACE", 100.0 if soon else 0.0)
    args = cases.shared_args(tmp_path, hook={"type": Signal, "args": {"number": int(signal.SIGINT), "twice": 0.5}})
    before = signal.signal(signal.SIGINT, was)
    try:
        (mine, done, _), (other, _, _) = outcomes(args)
    finally:
        signal.signal(signal.SIGINT, before)
    if soon:
        assert (mine, other, done) == ("SystemExit: 130", "SystemExit: 130", 3)
        return
    assert (mine, done) == ("KeyboardInterrupt: ", 2)
    assert "rank 0 failed" in other and "KeyboardInterrupt" in other


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    cases.train(cases.shared_args(tmp_path, max_train_steps=1))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_of_a_loader(tmp_path, number):
    """Ctrl-C reaches them too, and must not take them from a run that is to make its step and a checkpoint; SIGTERM ends them."""

    class Hook(TrainHook):
        def on_step_start(self, trainer, epoch, idx):
            if idx == 1:
                os.kill(trainer.feeds["train"]._iterator._workers[0].pid, number)
                time.sleep(0.2)

    args = cases.shared_args(
        tmp_path, hook={"type": Hook}, dataloader={"train_args": {"num_workers": 1}}, dataset={"train_args": {"size": 40}}, max_epochs=1
    )
    if number == signal.SIGINT:
        assert cases.train(args)[0].train_status.finished_train_steps == 20
    else:
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            cases.train(args)


# -- nothing left to do


def test_resuming_a_finished_run(tmp_path, caplog):
    args = cases.shared_args(tmp_path, checkpoint={"no_save": False, "resume_from": "last"}, max_train_steps=4)
    _, first = cases.train(args)
    files = sorted((tmp_path / "checkpoints").iterdir())
    when = [f.stat().st_mtime for f in files]
    trainer, again = cases.train(args)
    assert len(first.losses) == 4 and again.losses == [] and trainer.train_status.finished_train_steps == 4
    assert sorted((tmp_path / "checkpoints").iterdir()) == files and [f.stat().st_mtime for f in files] == when
    assert "nothing to train: 4 steps are finished, and that is the limit" in caplog.text
    by_epochs = cases.merged(args, {"max_train_steps": None, "max_epochs": 1})
    assert len(cases.train(by_epochs)[1].losses) == 6 and cases.train(by_epochs)[1].losses == []
