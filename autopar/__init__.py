"""autopar: from a PyTorch model for one device to readable parallel PyTorch code for every rank.
The public names; each is imported at first use, so that `import autopar` costs next to nothing over torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# NB: a public function may not have the name of a module or package here (autopar.trace is a package).
_WHERE = {
    "parallelize": "autopar.driver",
    "compile_module": "autopar.driver",
    "compile_to": "autopar.driver",
    "ComputeConfig": "autopar.config",
    "ReuseType": "autopar.config",
    "BroadcastStrategy": "autopar.config",
    "Graph": "autopar.ir.graph",
    "Mesh": "autopar.ir.mesh",
    "Plan": "autopar.pas.plan",
    "plan_from": "autopar.pas.build",
    "follow": "autopar.pas.follow",
    "build_optimizer": "autopar.runtime.optimizer",
    "mixed_precision": "autopar.runtime.mixed",
    "verify": "autopar.verification",
    "register_op": "autopar.rules",
    "verify_op": "autopar.rules",
    "save_checkpoint": "autopar.runtime.state",
    "load_checkpoint": "autopar.runtime.state",
    "merge_state_dicts": "autopar.runtime.state",
    "load_merged_state_dict": "autopar.runtime.state",
    "sharded_state_dict": "autopar.runtime.state",
    "load_sharded_state_dict": "autopar.runtime.state",
    "deduped_state_dict": "autopar.runtime.state",
    "load_deduped_state_dict": "autopar.runtime.state",
    "broadcast_weights": "autopar.runtime.state",
    "save_weights": "autopar.runtime.state",
    "Trainer": "autopar.train",
    "TrainerArgs": "autopar.train",
    "CheckpointError": "autopar.errors",
    "AutoparError": "autopar.errors",
    "ConfigError": "autopar.errors",
    "TraceError": "autopar.errors",
    "RuleError": "autopar.errors",
    "PlanError": "autopar.errors",
    "CheckError": "autopar.errors",
    "VerifyError": "autopar.errors",
    "SavedirError": "autopar.errors",
    "GuardError": "autopar.errors",
    "LayoutError": "autopar.errors",
    "StepError": "autopar.errors",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'autopar' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
