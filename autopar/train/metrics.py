"""What a training step achieved: tokens per second, TFLOP/s, MFU, memory, time waiting for data; and the metrics that are logged.
Must not know loops, loggers or how numbers are shown.

TFLOP/s are those of one device, in the flops of flops.py. MFU is their share of the device's datasheet peak; none for unknown devices.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autopar.train.flops import count_tokens, peak_tflops, work_of

MEMORY_S = 1.0  # the peak of memory is asked for this often, at most

__all__ = ["Meter", "StepNumbers", "TrainStepMetrics", "ValMetrics", "count_tokens"]


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """Of one optimizer step. Rates are of all devices together, tflops and mfu of one; None where it is not known."""

    step_s: float
    tokens_per_s: float | None
    samples_per_s: float
    tflops: float | None
    mfu: float | None
    memory_gb: float
    data_wait_s: float


class _Stopwatch:
    """Adds up the seconds spent inside `with`."""

    __slots__ = ("_start", "seconds")

    def __init__(self) -> None:
        self.seconds = self._start = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.seconds += time.perf_counter() - self._start


class Meter:
    """Measures optimizer steps: from the end of one, or from restart(), to the end of the next. Costs microseconds.

    sample: a micro batch, needed only for the flops of a model that is not traced.
    .device_name; .peak: TFLOP/s of the device, or None; .work: the flops.
    """

    def __init__(self, model: nn.Module, *, device: torch.device | str, sample: Any = None):
        self.device = torch.device(device)
        cuda = self.device.type == "cuda"
        self.device_name = torch.cuda.get_device_name(self.device) if cuda else self.device.type
        self.peak = peak_tflops(self.device_name) if cuda else None
        self.devices = dist.get_world_size() if dist.is_initialized() else 1
        self.work = work_of(model, sample)
        self._wait = _Stopwatch()
        self._memory, self._memory_due = 0.0, 0.0
        self.restart()

    def restart(self) -> None:
        """The next step begins now: what was done since the last one (validation, saving) is none of its time."""
        self._wait.seconds = 0.0
        self._start = time.perf_counter()

    def data_wait(self) -> _Stopwatch:
        """`with meter.data_wait():` around next(loader)."""
        return self._wait

    def step(self, *, tokens: float | None, samples: float) -> StepNumbers:
        """A step on so many tokens and samples, those of all scale units together, has ended."""
        now = time.perf_counter()
        seconds, waited = max(now - self._start, 1e-9), self._wait.seconds
        self._start, self._wait.seconds = now, 0.0
        flops = self.work.of(tokens, samples)
        tflops = None if flops is None else flops / seconds / self.devices / 1e12
        mfu = None if tflops is None or self.peak is None else tflops / self.peak
        rate = None if tokens is None else tokens / seconds
        if now >= self._memory_due:  # NB: not in every step; allocators take longer to tell than all else here
            self._memory, self._memory_due = self._memory_gb(), now + MEMORY_S
        return StepNumbers(seconds, rate, samples / seconds, tflops, mfu, self._memory, waited)

    def _memory_gb(self) -> float:
        """The peak so far: of torch's memory on a CUDA device, else of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return (peak if sys.platform == "darwin" else peak * 1024) / 1e9

    def describe(self) -> str:
        """One line on what tflops and mfu are made of."""
        parts = [f"{self.devices} x {self.device_name}"]
        for flops, of in ((self.work.per_token, "token"), (self.work.per_sample, "sample")):
            if flops is not None:
                parts.append(f"{flops / 1e6:,.4g} MFLOP per {of}")
                break
        if self.peak is not None:
            parts.append(f"MFU of {self.peak:g} TFLOP/s, the datasheet's dense half precision")
        return ", ".join(parts)


@dataclass
class TrainStepMetrics:
    """Of one optimizer step. Hooks may change it before it is logged, and add to `extra`."""

    train_loss: float
    gnorm: float | None = None
    lr: float | None = None
    epoch: int | None = None
    step_s: float | None = None
    tokens_per_s: float | None = None
    samples_per_s: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    memory_gb: float | None = None
    data_wait_s: float | None = None
    extra: dict[str, float] = field(default_factory=dict)

    def add(self, numbers: StepNumbers) -> None:
        for name in StepNumbers.__slots__:
            setattr(self, name, getattr(numbers, name))

    def to_dict(self) -> dict[str, float]:
        """What is known, by name."""
        return _known(self)


@dataclass
class ValMetrics:
    """Of one validation run. Hooks may change it before it is logged, and add to `extra`."""

    val_loss: float
    extra: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, float]:
        return _known(self)


def _known(metrics: TrainStepMetrics | ValMetrics) -> dict[str, float]:
    known = {name: value for name, value in vars(metrics).items() if value is not None}
    return known | known.pop("extra")
