"""The trainer: a run described by TrainerArgs, trained by one loop. Names are imported at first use.
Must not import torch here.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Trainer": "autopar.train.trainer",
    "TrainerArgs": "autopar.train.args",
    "TrainHook": "autopar.train.hooks",
    "AggregatedOutputs": "autopar.train.gradients",
    "TrainStatus": "autopar.train.state",
    "RunSpec": "autopar.train.spec",
    "TrainStepMetrics": "autopar.train.metrics",
    "ValMetrics": "autopar.train.metrics",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'autopar.train' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
