"""Events: what happens in a run, each a small record with one place where it is emitted; and Events, which brings them to whoever listens.
Must not know hooks, callbacks or how they spell their names, nor who emits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Event:
    """Fields are what receivers get, in order."""

    __slots__ = ()


def _event(name: str, doc: str, *fields: str) -> type[Event]:
    body = {"__doc__": doc, "__annotations__": dict.fromkeys(fields, Any), "__module__": __name__}
    return dataclass(frozen=True, slots=True, eq=False)(type(name, (Event,), body))


SetUp = _event("SetUp", "Everything is built, and a checkpoint loaded if there is one; nothing has been trained.")
Finalize = _event("Finalize", "The run is over, finished or interrupted.")
TrainStart = _event("TrainStart", "Training begins, or goes on.")
TrainEnd = _event("TrainEnd", "Training has come to its limit, or was interrupted.")
EpochStart = _event("EpochStart", "An epoch begins; after a resume perhaps in its middle.", "epoch")
EpochEnd = _event("EpochEnd", "An epoch has ended, its validation and saving included; or training has, inside of it.", "epoch")
StepStart = _event("StepStart", "A training step begins.", "epoch", "idx")
StepEnd = _event("StepEnd", "Parameters are updated and metrics logged.", "epoch", "idx", "step_metrics", "aggregated_outputs")
TrainStepStart = _event("TrainStepStart", "Before forward and backward of this rank's micro batches (without dummies).", "batches")
TrainStepEnd = _event("TrainStepEnd", "After them, with the detached outputs.", "outputs")
TrainAggregated = _event("TrainAggregated", "The losses of all ranks have been put together.", "aggregated_outputs", "train_loss")
BeforeZeroGrad = _event("BeforeZeroGrad", "")
AfterZeroGrad = _event("AfterZeroGrad", "")
BeforeSyncGrad = _event("BeforeSyncGrad", "The gradients of this rank are about to be summed with those of others.")
AfterSyncGrad = _event("AfterSyncGrad", "They are summed; not scaled or clipped yet.")
BeforeClip = _event("BeforeClip", "Gradients are summed and scaled.")
AfterClip = _event("AfterClip", "With the norm that the gradient had before.", "gnorm")
BeforeOptimizerStep = _event("BeforeOptimizerStep", "")
AfterOptimizerStep = _event("AfterOptimizerStep", "")
BeforeLogTrain = _event("BeforeLogTrain", "step_metrics may be changed.", "step_metrics", "aggregated_outputs")
ValStart = _event("ValStart", "")
ValEnd = _event("ValEnd", "", "val_loss")
ValStepStart = _event("ValStepStart", "", "batches")
ValStepEnd = _event("ValStepEnd", "", "outputs")
ValAggregated = _event("ValAggregated", "The losses of all ranks in one step of validation.", "aggregated_outputs", "val_loss")
BeforeLogVal = _event("BeforeLogVal", "metrics may be changed.", "metrics")
LoadCheckpoint = _event("LoadCheckpoint", "After loading; checkpoint is what SaveCheckpoint's receivers added.", "checkpoint")
SaveCheckpoint = _event("SaveCheckpoint", "Before saving; what is added to the dict is saved with this rank's state.", "checkpoint")
Interrupted = _event("Interrupted", "A signal or an exception ends the run; before a checkpoint is written, if one is.", "cause")

Receiver = Callable[[Any], None]


class Events:
    """Receivers by event, called in the order in which they came. An event that nobody receives is not even made."""

    def __init__(self) -> None:
        self._receivers: dict[type[Event], list[Receiver]] = {}

    def receive(self, event: type[Event], fn: Receiver) -> None:
        self._receivers.setdefault(event, []).append(fn)

    def heard(self, *events: type[Event]) -> bool:
        """Whether anybody receives any of these."""
        return any(e in self._receivers for e in events)

    def emit(self, event: type[Event], *fields: Any) -> None:
        receivers = self._receivers.get(event)
        if receivers:
            made = event(*fields)
            for fn in receivers:
                fn(made)
