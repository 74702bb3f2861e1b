"""Hooks: all of them, in order, with their arguments, from every kind of receiver; and events that nobody hears.
Must not know what hooks are used for.
"""

import inspect
from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

import autopar
from autopar.train import AggregatedOutputs, Trainer, TrainHook, TrainStepMetrics, ValMetrics
from autopar.train.args import HookMapConfig
from autopar.train.hooks import HOOKS, HookMap
from tests import train_cases as cases
from tests.procs import run_processes

CALLS: list[str] = []


def record(name, prefix=""):
    def call(self, trainer, *args):
        assert isinstance(trainer, Trainer)
        CALLS.append(prefix + name + (f"({', '.join(map(shown, args))})" if args else ""))

    call.__signature__ = inspect.signature(getattr(TrainHook, name))
    return call


def shown(x):
    """What a person can read of an argument, and a check of its type."""
    if isinstance(x, (TrainStepMetrics, ValMetrics, AggregatedOutputs, dict)):
        return type(x).__name__
    if isinstance(x, list):
        return f"{len(x)} items"
    return "tensor" if isinstance(x, Tensor) else "loss" if isinstance(x, float) else str(x)


def overriding(prefix="", base=TrainHook, **body):
    return type("All", (base,), {**body, **{name: record(name, prefix) for name in HOOKS}})


STEP = """
on_step_start({epoch}, {idx})
before_zero_grad
after_zero_grad
on_train_step_start({n} items)
before_sync_grad
after_sync_grad
on_train_step_end({n} items)
after_aggregate_train_step_outputs(AggregatedOutputs, loss)
before_gnorm_clip
after_gnorm_clip(tensor)
before_optimizer_step
after_optimizer_step
before_log_train_metrics(TrainStepMetrics, AggregatedOutputs)
on_step_end({epoch}, {idx}, TrainStepMetrics, AggregatedOutputs)
"""
VAL_STEP = """
on_val_step_start({n} items)
on_val_step_end({n} items)
after_aggregate_val_step_outputs(AggregatedOutputs, loss)
"""


def step(epoch, idx, n):
    return STEP.format(epoch=epoch, idx=idx, n=n).split("\n")[1:-1]


def validation(*counts):
    steps = [line for n in counts for line in VAL_STEP.format(n=n).split("\n")[1:-1]]
    return ["on_val_start", *steps, "before_log_val_metrics(ValMetrics)", "on_val_end(loss)"]


def args_of(folder, **changes):
    """Epochs of 5 micro batches in windows of 3; a validation set of 4 micro batches."""
    dataset = {"train_args": {"size": 10}, "val_args": {"size": 8}}
    base = cases.shared_args(folder, dataset=dataset, grad_accumulation_steps=3, checkpoint={"no_save": False, "every_n_train_steps": 3})
    return cases.merged(base, changes)


def test_order_and_arguments_with_validation_saving_and_resume(tmp_path):
    CALLS.clear()
    hook = {"type": overriding()}
    cases.train(args_of(tmp_path, hook=hook, max_train_steps=3))
    first = [*CALLS]
    CALLS.clear()
    cases.train(args_of(tmp_path, hook=hook, checkpoint={"resume_from": "last"}))
    print("\n".join(["-- a run of 3 steps, epochs of 2, saving after 3", *first, "-- resumed, to the end of the second epoch", *CALLS]))
    save = ["on_save_checkpoint(dict)"]
    assert first == [
        "after_setup",
        "on_train_start",
        "on_epoch_start(0)",
        *step(0, 0, 3),
        *step(0, 1, 2),
        *validation(3, 1),
        "on_epoch_end(0)",
        "on_epoch_start(1)",
        *step(1, 0, 3),
        *validation(3, 1),
        *save,
        "on_epoch_end(1)",
        "on_train_end",
        "on_finalize",
    ]
    assert [
        "on_load_checkpoint(dict)",
        "after_setup",
        "on_train_start",
        "on_epoch_start(1)",
        *step(1, 1, 2),
        *validation(3, 1),
        *save,
        "on_epoch_end(1)",
        "on_train_end",
        "on_finalize",
    ] == CALLS


@pytest.mark.parametrize(("n", "compute"), [(1, {}), (2, {}), (2, {"use_async_reducer": True}), (2, {"use_zero": 3})])
def test_sync_grad_hooks_see_gradients_before_and_after(tmp_path, n, compute):
    """before: this rank's own, complete ones (unless sums overlap the backward); after: the sums."""
    early = compute.get("use_async_reducer") or compute.get("use_zero") == 3

    class Hook(TrainHook):
        seen: dict = {}  # noqa: RUF012

        def before_sync_grad(self, trainer):
            grad = trainer.model.layers[0].up.bias.grad
            self.seen["before"] = None if grad is None else grad.clone()

        def after_sync_grad(self, trainer):
            (piece,) = [p.param for p in trainer.optimizer.reducer.pieces if p.name == "layers.0.up.bias"][:1] or [None]
            self.seen["after"] = None if piece is None else piece.grad.clone()

    args = cases.shared_args(tmp_path, hook={"type": Hook}, compute_config=compute, max_train_steps=1, grad_accumulation_steps=2)

    def rank_main(rank):
        cases.train(args)
        return Hook.seen

    got = [rank_main(0)] if n == 1 else run_processes(rank_main, n)
    torch.manual_seed(7)
    model = cases.MLP()
    data = cases.SimpleDataset()
    own = []
    for unit in range(n):
        model.zero_grad()
        for k in range(2):
            i = [unit + n * (2 * k + j) for j in range(2)]
            (model({"x": data.x[i], "y": data.y[i]})[0] / (2 * n)).backward()
        own.append(model.layers[0].up.bias.grad.clone())
    whole = sum(own)
    for seen, mine in zip(got, own, strict=True):
        if not early:
            torch.testing.assert_close(seen["before"], mine)
        if not compute.get("use_zero"):
            torch.testing.assert_close(seen["after"], whole)
    if early:
        assert all("before" in seen for seen in got)


class HookedModel(cases.MLP, overriding("model: ")):
    greeting = "hello"

    def after_setup(self, trainer):
        self.times = self.count()  # a method of the class, and an attribute that stays
        CALLS.append(f"model: {self.greeting}, {self.times} parameters of {type(trainer.model).__name__}")

    def on_finalize(self, trainer):
        CALLS.append(f"model: {self.times}")

    def count(self):
        return sum(1 for _ in self.parameters())


class HookedSGD(SGD, overriding("optimizer: ")):
    pass


class HookedStepLR(StepLR, overriding("scheduler: ")):
    pass


@pytest.mark.parametrize("mixed", [False, True])
def test_models_optimizers_and_schedulers_that_are_hooks(tmp_path, mixed):
    CALLS.clear()
    args = cases.shared_args(
        tmp_path,
        model={"type": HookedModel},
        optimizer={"type": HookedSGD, "master_weights": mixed},
        precision="bf16" if mixed else None,
        lr_scheduler={"type": HookedStepLR, "args": {"step_size": 1}},
        hook={"type": overriding("hook: ")},
        max_train_steps=1,
    )
    cases.train(args)
    order = ["model", "optimizer", "scheduler", "hook"]
    assert [c for c in CALLS if c.endswith("on_train_start")] == [f"{who}: on_train_start" for who in order]
    assert CALLS[:4] == ["model: hello, 8 parameters of HookedModel", *(f"{who}: after_setup" for who in order[1:])]
    assert CALLS[-4:] == ["model: 8", *(f"{who}: on_finalize" for who in order[1:])]
    for name in ("before_optimizer_step", "on_epoch_end(0)", "after_gnorm_clip(tensor)"):
        assert [c.partition(": ")[0] for c in CALLS if c.endswith(name)] == order


class HookedAround(cases.Around, TrainHook):
    def on_train_end(self, trainer):
        assert trainer.model is self
        CALLS.append("around")


def test_an_ordinary_model_that_is_a_hook(tmp_path):
    CALLS.clear()
    part = {"type": cases.Layer, "forward_args_gen_fn": cases.layer_args}
    model = {"type": HookedAround, "parallel_modules": [part]}
    cases.train(cases.shared_args(tmp_path, model=model, compute_config={"use_end2end": False}, max_train_steps=1))
    assert CALLS == ["around"]


def plain(trainer, epoch, idx):
    CALLS.append(f"plain {epoch} {idx}")


def with_self(self, trainer, epoch, idx, step_metrics, aggregated_outputs):
    """The signature as the reference document prints it."""
    assert isinstance(self, HookMap)
    CALLS.append(f"with self {epoch} {idx}")


def test_a_map_of_functions(tmp_path):
    CALLS.clear()
    cases.train(cases.shared_args(tmp_path, hook={"on_step_start": plain, "on_step_end": with_self}, max_train_steps=2))
    assert CALLS == ["plain 0 0", "with self 0 0", "plain 0 1", "with self 0 1"]


def test_hooks_change_what_is_logged_and_what_is_trained(tmp_path):
    class Hook(TrainHook):
        def before_log_train_metrics(self, trainer, step_metrics, aggregated_outputs):
            step_metrics.train_loss, step_metrics.extra["tokens"] = 42.0, 3.0

        def before_log_val_metrics(self, trainer, metrics):
            metrics.val_loss = 43.0

        def before_optimizer_step(self, trainer):
            for p in trainer.model.parameters():
                p.grad.zero_()

        def on_step_end(self, trainer, epoch, idx, step_metrics, aggregated_outputs):
            assert step_metrics.train_loss == 42.0

    class Log:
        lines: list = []  # noqa: RUF012

        def setup(self, run):
            assert run["total_train_steps"] == 2

        def log_metrics(self, metrics, step, *, tag):
            self.lines.append((tag, step, metrics.get("train_loss", metrics.get("val_loss")), metrics.get("tokens")))

        def flush(self): ...

        def finalize(self, status):
            assert status == "finished"

    args = cases.shared_args(
        tmp_path, hook={"type": Hook}, log=[{"type": Log}], max_train_steps=2, val_every_n_train_steps=2, dataset={"val_args": {"size": 4}}
    )
    trainer, _ = cases.train(args)
    assert Log.lines == [("train", 1, 42.0, 3.0), ("train", 2, 42.0, 3.0), ("val", 2, 43.0, None)]
    torch.manual_seed(7)
    assert torch.equal(trainer.model.layers[0].up.bias, cases.MLP().layers[0].up.bias), "the hook took all gradients away"


def test_what_hooks_save_they_get_back(tmp_path):
    class Hook(TrainHook):
        def on_save_checkpoint(self, trainer, checkpoint):
            checkpoint["mine"] = {"rank": trainer.rank, "weights": torch.arange(3)}

        def on_load_checkpoint(self, trainer, checkpoint):
            CALLS.append(checkpoint)

    CALLS.clear()
    args = cases.shared_args(tmp_path, hook={"type": Hook}, checkpoint={"no_save": False}, max_train_steps=1)
    cases.train(args)
    cases.train(cases.merged(args, {"checkpoint": {"resume_from": "last"}, "max_train_steps": 2}))
    assert CALLS[0]["mine"]["rank"] == 0 and torch.equal(CALLS[0]["mine"]["weights"], torch.arange(3))


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ({"on_step_end": lambda trainer: None}, r"on_step_end of HookMap takes \(trainer\), but is called with \(trainer, epoch, idx, "),
        ({"type": type("Bad", (TrainHook,), {"on_val_end": lambda self, trainer: None})}, r"on_val_end of Bad takes \(trainer\)"),
    ],
)
def test_wrong_arguments_are_found_before_training(tmp_path, hook, message):
    with pytest.raises(autopar.ConfigError, match=message):
        cases.train(cases.shared_args(tmp_path, hook=hook))


def test_unknown_hook():
    with pytest.raises(autopar.ConfigError, match="unknown hook 'on_epoch_begin'"):
        HookMap({"on_epoch_begin": print})


def test_hooks_that_nobody_overrides_are_not_called(tmp_path):
    class Silent(TrainHook):
        def on_epoch_end(self, trainer, epoch): ...

    trainer, _ = cases.train(cases.shared_args(tmp_path, hook={"type": Silent}, max_train_steps=1))
    assert [e.__name__ for e in trainer.events._receivers] == ["EpochEnd"]


def test_every_hook_can_be_given_as_a_function():
    assert {f.name for f in fields(HookMapConfig)} == set(HOOKS) == {n for n in vars(TrainHook) if not n.startswith("_")}
