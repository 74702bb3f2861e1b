"""TrainHook, a class with every hook of a run, and HookMap, the same from single functions; and how events reach them.
Must not know when events happen (loop.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from autopar.errors import ConfigError, suggest
from autopar.train import events
from autopar.train.events import Event, Events

if TYPE_CHECKING:
    from autopar.train.gradients import AggregatedOutputs
    from autopar.train.metrics import TrainStepMetrics, ValMetrics
    from autopar.train.trainer import Trainer


class TrainHook:
    """Override what you need; the rest costs nothing. Every rank calls every hook.

    A model, optimizer or scheduler that is a TrainHook is called too: first the model, then the optimizer, the scheduler, and the hook
    of the configuration. An exception in a hook ends the run on all ranks.
    """

    def after_setup(self, trainer: Trainer) -> None:
        """All is built and loaded; not in run_mode 'compile'."""

    def on_finalize(self, trainer: Trainer) -> None:
        """The run is over."""

    def on_train_start(self, trainer: Trainer) -> None: ...

    def on_train_end(self, trainer: Trainer) -> None: ...

    def on_val_start(self, trainer: Trainer) -> None: ...

    def on_val_end(self, trainer: Trainer, val_loss: float) -> None: ...

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None: ...

    def on_epoch_end(self, trainer: Trainer, epoch: int) -> None: ...

    def on_train_step_start(self, trainer: Trainer, batches: list[Any]) -> None:
        """batches: this rank's micro batches of the step, on its device; dummies left out."""

    def on_train_step_end(self, trainer: Trainer, outputs: list[Any]) -> None: ...

    def on_val_step_start(self, trainer: Trainer, batches: list[Any]) -> None: ...

    def on_val_step_end(self, trainer: Trainer, outputs: list[Any]) -> None: ...

    def on_step_start(self, trainer: Trainer, epoch: int, idx: int) -> None:
        """idx: which optimizer step of the epoch."""

    def on_step_end(
        self, trainer: Trainer, epoch: int, idx: int, step_metrics: TrainStepMetrics, aggregated_outputs: AggregatedOutputs
    ) -> None: ...

    def after_aggregate_train_step_outputs(self, trainer: Trainer, aggregated_outputs: AggregatedOutputs, train_loss: float) -> None: ...

    def after_aggregate_val_step_outputs(self, trainer: Trainer, aggregated_outputs: AggregatedOutputs, val_loss: float) -> None: ...

    def before_zero_grad(self, trainer: Trainer) -> None: ...

    def after_zero_grad(self, trainer: Trainer) -> None: ...

    def before_sync_grad(self, trainer: Trainer) -> None:
        """This rank's gradients are complete. With use_async_reducer or use_zero=3 sums begin in the last backward: called before it."""

    def after_sync_grad(self, trainer: Trainer) -> None: ...

    def before_gnorm_clip(self, trainer: Trainer) -> None: ...

    def after_gnorm_clip(self, trainer: Trainer, gnorm: torch.Tensor) -> None: ...

    def before_optimizer_step(self, trainer: Trainer) -> None: ...

    def after_optimizer_step(self, trainer: Trainer) -> None: ...

    def before_log_train_metrics(self, trainer: Trainer, step_metrics: TrainStepMetrics, aggregated_outputs: AggregatedOutputs) -> None: ...

    def before_log_val_metrics(self, trainer: Trainer, metrics: ValMetrics) -> None: ...

    def on_load_checkpoint(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None: ...

    def on_save_checkpoint(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None: ...


HOOKS: dict[str, type[Event]] = {
    "after_setup": events.SetUp,
    "on_finalize": events.Finalize,
    "on_train_start": events.TrainStart,
    "on_train_end": events.TrainEnd,
    "on_val_start": events.ValStart,
    "on_val_end": events.ValEnd,
    "on_epoch_start": events.EpochStart,
    "on_epoch_end": events.EpochEnd,
    "on_train_step_start": events.TrainStepStart,
    "on_train_step_end": events.TrainStepEnd,
    "on_val_step_start": events.ValStepStart,
    "on_val_step_end": events.ValStepEnd,
    "on_step_start": events.StepStart,
    "on_step_end": events.StepEnd,
    "after_aggregate_train_step_outputs": events.TrainAggregated,
    "after_aggregate_val_step_outputs": events.ValAggregated,
    "before_zero_grad": events.BeforeZeroGrad,
    "after_zero_grad": events.AfterZeroGrad,
    "before_sync_grad": events.BeforeSyncGrad,
    "after_sync_grad": events.AfterSyncGrad,
    "before_gnorm_clip": events.BeforeClip,
    "after_gnorm_clip": events.AfterClip,
    "before_optimizer_step": events.BeforeOptimizerStep,
    "after_optimizer_step": events.AfterOptimizerStep,
    "before_log_train_metrics": events.BeforeLogTrain,
    "before_log_val_metrics": events.BeforeLogVal,
    "on_load_checkpoint": events.LoadCheckpoint,
    "on_save_checkpoint": events.SaveCheckpoint,
}


class HookMap(TrainHook):
    """A hook from functions by name. A function whose first parameter is called `self` gets the map there."""

    def __init__(self, functions: Mapping[str, Callable[..., None] | None]):
        for name, fn in functions.items():
            if name not in HOOKS:
                raise ConfigError(f"unknown hook {name!r}: {suggest(name, HOOKS)}")
            if fn is not None:
                setattr(self, name, fn.__get__(self) if next(iter(_parameters(fn)), None) == "self" else fn)


class ModelHook:
    """The hooks of a model that was compiled: `self` in them is this. It has the methods of the original class, the parallel module's
    parameters and all else of it; attributes that the original's __init__ set are not here, but what hooks set stays.
    """

    def __init__(self, original: type, module: nn.Module):
        self._original, self._module = original, module

    def __getattr__(self, name: str) -> Any:
        if name not in HOOKS and hasattr(self._module, name):
            return getattr(self._module, name)
        found = getattr(self._original, name)
        return found.__get__(self) if inspect.isfunction(found) else found


def connect(emitter: Events, trainer: Trainer, receivers: Sequence[Any]) -> None:
    """Let the hooks that these receivers override hear the events. Raises ConfigError for one that takes other arguments."""
    for receiver in receivers:
        for name, event in HOOKS.items():
            method = getattr(receiver, name)
            if getattr(method, "__func__", method) is not getattr(TrainHook, name):
                _check_call(receiver, name, method)
                emitter.receive(event, _adapter(trainer, method, event, f"{type(receiver).__name__}.{name}"))


def _adapter(trainer: Trainer, method: Callable[..., None], event: type[Event], where: str) -> Callable[[Event], None]:
    fields = tuple(event.__dataclass_fields__)

    def call(e: Event) -> None:
        try:
            method(trainer, *(getattr(e, f) for f in fields))
        except BaseException as error:
            error.add_note(f"in the hook {where}, after {trainer.train_status.finished_train_steps} finished steps")
            raise

    return call


def _check_call(receiver: Any, name: str, method: Callable[..., None]) -> None:
    wanted = ["trainer", *HOOKS[name].__dataclass_fields__]
    try:
        inspect.signature(method).bind(*wanted)
    except ValueError:
        return
    except TypeError as e:
        takes = ", ".join(_parameters(method))
        raise ConfigError(
            f"the hook {name} of {type(receiver).__name__} takes ({takes}), but is called with ({', '.join(wanted)}): {e}"
        ) from e


def _parameters(fn: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(fn).parameters)
    except (ValueError, TypeError):
        return []
