"""A step's gradients: forward and backward of a window, the sum over ranks, the mean, the norm, clipping, and the check that all is finite.
Must not know epochs, data or logging. Gradients are of the model that optimizer was built for; the parts that run forward are Passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autopar.errors import AutoparError, ConfigError, StepError
from autopar.runtime import faults, step
from autopar.runtime.mesh import RankMesh
from autopar.runtime.module import ParallelModule
from autopar.runtime.optimizer import ParallelOptimizer
from autopar.runtime.random import unit_stream
from autopar.runtime.step import detached, first_value, leaving_no_trace
from autopar.train import events
from autopar.train.data import Window
from autopar.train.events import Events

ScaleFn = Callable[[Tensor], Tensor]


@dataclass
class AggregatedOutputs:
    """What all ranks of a sync group have put out in a step, put together."""

    # the sum of losses
    loss_sum: float | None = None
    # number of micro batches
    num_batches: int | None = None
    # number of tokens (needed where grad_reduction is 'per-token-mean')
    num_tokens: int | None = None
    # anything else, for hooks
    aggregated_outputs: Any = None


class Passes(Protocol):
    """How micro batches go through a model: the step that a compiled module has, or forward and backward of an ordinary one.

    Windows have as many batches on all ranks, and on ranks of a scale unit as many dummies; the loop has seen to it.
    """

    def train(self, window: Window, scale: ScaleFn | None) -> list[Any]:
        """Forward and backward of every batch, dummies leaving nothing behind, and the sum over ranks; detached outputs, loss first."""

    def infer(self, batches: list[Any]) -> list[Any]:
        """Outputs without gradients. All ranks give as many batches."""


class CompiledPasses:
    """Of a module compiled with use_end2end. Sums happen inside train_step, so whoever listens is told from there."""

    def __init__(self, model: ParallelModule, optimizer: ParallelOptimizer | None, emitter: Events):
        self.model = model
        self._tell = None
        if optimizer is not None and emitter.heard(events.BeforeSyncGrad, events.AfterSyncGrad):
            self._tell = _Telling(optimizer, emitter)

    def train(self, window: Window, scale: ScaleFn | None) -> list[Any]:
        if self._tell is not None:
            scale = self._tell.around(scale, len(window.batches))
        return step.train_step(self.model, window.batches, window.dummies, scale, agreed=True)

    def infer(self, batches: list[Any]) -> list[Any]:
        return self.model.infer_step(batches)


class _Telling:
    """Emits BeforeSyncGrad and AfterSyncGrad around the reducer's work, wherever a step calls it."""

    def __init__(self, optimizer: ParallelOptimizer, emitter: Events):
        self._reducer, self._emit, self._told = optimizer.reducer, emitter.emit, False
        self._reduce = optimizer.reducer.reduce
        optimizer.reducer.reduce = self  # type: ignore[method-assign]

    def around(self, scale: ScaleFn | None, n: int) -> ScaleFn:
        """NB: where buckets leave during the last backward, the last moment before is when that begins."""
        left = n

        def call(loss: Tensor) -> Tensor:
            nonlocal left
            left -= 1
            if left == 0 and self._reducer._early:
                self._before()
            return loss if scale is None else scale(loss)

        return call

    def _before(self) -> None:
        self._told = True
        self._emit(events.BeforeSyncGrad)

    def __call__(self) -> None:
        if not self._told:
            self._before()
        self._told = False
        self._reduce()
        self._emit(events.AfterSyncGrad)


class ModulePasses:
    """Of an ordinary module, with parallel modules inside or not. forward: sample -> output, its first value the loss."""

    def __init__(self, model: nn.Module, optimizer: Any, mesh: RankMesh, emitter: Events, forward: Callable[[Any], Any] | None = None):
        self.model, self.optimizer, self.mesh, self.emitter = model, optimizer, mesh, emitter
        self.forward = forward or model

    def train(self, window: Window, scale: ScaleFn | None) -> list[Any]:
        outputs = []
        reducer = getattr(self.optimizer, "reducer", None)
        with faults.together(self.mesh, "train_step") as turn:
            dummies = turn.agree(window.batches, window.dummies, agreed=True)
            for i, (batch, dummy) in enumerate(zip(window.batches, dummies, strict=True)):
                last = i + 1 == len(dummies)
                if last and getattr(reducer, "_early", False):
                    self.emitter.emit(events.BeforeSyncGrad)
                hold = reducer is not None and not last
                with reducer.accumulate() if hold else nullcontext(), leaving_no_trace(self.model) if dummy else nullcontext():
                    turn.doing(f"forward of sample {i}")
                    with unit_stream(self.mesh):
                        output = self.forward(batch)
                    loss = loss_of(output, self.model)
                    turn.doing(f"backward of sample {i}")
                    (loss if scale is None else scale(loss)).backward()
                outputs.append(detached(output))
            turn.doing("sum of the gradients")
            if not getattr(reducer, "_early", False):
                self.emitter.emit(events.BeforeSyncGrad)
            self.optimizer.sync_shard_grad()
        self.emitter.emit(events.AfterSyncGrad)
        return outputs

    def infer(self, batches: list[Any]) -> list[Any]:
        with torch.no_grad():
            return [self.forward(batch) for batch in batches]


def loss_of(output: Any, model: nn.Module) -> Tensor:
    loss = first_value(output)
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        what = f"a tensor of shape {tuple(loss.shape)} {loss.dtype}" if isinstance(loss, Tensor) else f"{loss!r:.60}"
        raise StepError(f"the first value that {type(model).__name__} returns must be the loss, one floating-point number; it is {what}")
    return loss


def losses_of(outputs: Sequence[Any]) -> list[float]:
    """The losses as numbers; one wait for the device for all."""
    losses = [first_value(o) for o in outputs]
    if len(losses) == 1:
        return [losses[0].item()]
    return torch.stack(losses).tolist() if losses else []


class Gradients:
    """What is done to summed gradients until the parameters are updated.

    reduction: 'mean' over the micro batches of all units, 'sum', or 'per-token-mean'. max_norm None: measured, not clipped.
    """

    def __init__(
        self,
        optimizer: ParallelOptimizer,
        emitter: Events,
        *,
        reduction: str,
        max_norm: float | None,
        check_finite: bool,
        early: bool,
    ):
        self.optimizer, self._emit, self.max_norm, self.check_finite = optimizer, emitter.emit, max_norm, check_finite
        self.reduction, self.early = reduction, early and reduction == "mean"

    def zero(self) -> None:
        self._emit(events.BeforeZeroGrad)
        self.optimizer.zero_grad()
        self._emit(events.AfterZeroGrad)

    def scale_before(self, batches: int) -> ScaleFn | None:
        """What losses are multiplied by, where that makes the mean: it is cheaper than gradients, and half precision overflows later."""
        if not self.early or batches == 1:
            return None
        factor = 1.0 / batches
        return lambda loss: loss * factor

    def scale_after(self, aggregated: AggregatedOutputs) -> None:
        if self.reduction == "sum" or self.early:
            return
        what, n = ("num_batches", aggregated.num_batches) if self.reduction == "mean" else ("num_tokens", aggregated.num_tokens)
        if not n:
            raise ConfigError(f"grad_reduction is {self.reduction!r}, but aggregate_outputs_fn returned {what}={n!r}; it has to count them")
        if n != 1:
            self.optimizer.scale_grads(1.0 / n)

    def clip(self) -> Tensor:
        self._emit(events.BeforeClip)
        norm = self.optimizer.clip_gnorm(self.max_norm)
        self._emit(events.AfterClip, norm)
        return norm

    def step(self) -> None:
        self._emit(events.BeforeOptimizerStep)
        self.optimizer.step()
        self._emit(events.AfterOptimizerStep)

    def explain(self, norm: float, passes: Passes, window: Window, number: int) -> StepError:
        """The error for a norm that is not finite where all losses are. NB: on all ranks; the step is made again to find whose it was."""
        model, said = getattr(passes, "model", None), ""
        if isinstance(model, ParallelModule) and model.end2end:
            model.check_finite = True
            try:
                self.optimizer.zero_grad()
                passes.train(window, None)
            except StepError as e:
                said = str(e).partition(": ")[2].partition(". No rank")[0]
        else:
            try:
                self.optimizer.clip_gnorm(None, error_if_nonfinite=True)
            except AutoparError as e:
                said = str(e).partition(": ")[2]
        said = said or "when the step was made again all was finite; sums of gradients that nearly overflow, or random numbers"
        return everywhere(f"step {number}: the gradient norm is {norm}: {said}. No rank has changed a parameter in this step")


def everywhere(text: str) -> StepError:
    """An error that all ranks raise alike, so that nobody has to be told."""
    error = StepError(text)
    error.everywhere = True
    return error


def not_finite(losses: Sequence[float]) -> int:
    """One more than the index of the first loss that is not finite, or 0."""
    return next((i + 1 for i, loss in enumerate(losses) if not math.isfinite(loss)), 0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()
