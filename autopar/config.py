"""ComputeConfig and the enums of the public API, with their checks.
Must not import torch.distributed or any stage of the compiler.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any

from autopar.errors import ConfigError, suggest

TRACE_STRATEGIES = ("auto", "meta", "cpu", "cuda", "cuda_run_cpu_offload", "reuse_cache")
GUARDS = ("error", "warn", "off")
ZERO = (0, 1, 3)


class ReuseType(Enum):
    """What to do with code that was generated before (design section 9)."""

    MATCH = "match"
    OVERRIDE = "override"
    MOO = "moo"
    GRAPH = "graph"

    @classmethod
    def of(cls, value: ReuseType | str) -> ReuseType:
        """Accepts the member or its name. Raises ConfigError naming the nearest valid one."""
        return _member(cls, value, "reuse")


class BroadcastStrategy(Enum):
    """What is sent to nodes that do not share rank 0's disk (docs/nodes.md)."""

    NONE = "none"
    ALL = "all"
    NO_WEIGHTS = "no_weights"
    CODE = "code"

    @classmethod
    def of(cls, value: BroadcastStrategy | str) -> BroadcastStrategy:
        """Accepts the member or its name. Raises ConfigError naming the nearest valid one."""
        return _member(cls, value, "broadcast_strategy")


@dataclass(frozen=True)
class ComputeConfig:
    """How a module is traced, split and run. Every field is described in docs/parallelize.md.

    plan_ngpus: devices in one scale unit; the model is split inside it.
    runtime_ngpus: devices in all; a multiple of plan_ngpus. 0 means all processes that torchrun started, and plan_ngpus elsewhere.
    constant_folding: bake sizes in; another input shape is then refused at run time.
    trace_strategy: what executes the ops while tracing (docs/tracing.md).
    guards: what happens when an input takes another path than the traced one: 'error', 'warn' or 'off'.
    use_zero: False, True or 1 (optimizer state sharded over the replicas of a parameter), or 3 (parameters too).
    zero_ngroups: the replicas form this many groups, and the state is sharded inside each.
    zero_use_reduce_scatter: gradients reach only the rank that updates them, by reduce-scatter instead of all-reduce.
    use_async_reducer: gradients are summed while the backward still runs.
    reducer_bucket_cap_mb: size of the buckets that gradients travel in; 0 is the default of 25.
    inference_only: parameters take no gradients and forward keeps no history.
    use_end2end: forward takes one sample and returns the loss first; train with train_step.
    pas_config: settings of the policy; keys that begin with '_' are free for the user and part of the code fingerprint.
    user_config: anything that decides what the model computes; part of the graph fingerprint.

    Raises ConfigError for numbers or names out of range.
    """

    plan_ngpus: int = 1
    runtime_ngpus: int = 0

    constant_folding: bool = False
    trace_strategy: str = "auto"
    guards: str = "error"

    use_zero: bool | int = False
    zero_ngroups: int = 1
    zero_use_reduce_scatter: bool = False
    use_async_reducer: bool = False
    reducer_bucket_cap_mb: float = 0.0

    inference_only: bool = False
    use_end2end: bool = False

    pas_config: dict[str, Any] = field(default_factory=dict)
    user_config: dict[str, Any] = field(default_factory=dict)

    def __new__(cls, *args: Any, **settings: Any) -> ComputeConfig:
        """Raises ConfigError for an unknown key, naming the nearest valid one."""
        names = [f.name for f in fields(cls)]
        for key in settings:
            if key not in names:
                raise ConfigError(f"unknown ComputeConfig key {key!r}: {suggest(key, names)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not _whole(self.plan_ngpus) or self.plan_ngpus < 1:
            raise ConfigError(f"plan_ngpus is {self.plan_ngpus!r}; it must be a whole number of at least 1")
        if not _whole(self.runtime_ngpus) or self.runtime_ngpus < 0:
            raise ConfigError(
                f"runtime_ngpus is {self.runtime_ngpus!r}; it must be a multiple of plan_ngpus {self.plan_ngpus}, or 0 for all processes"
            )
        numbers = f"runtime_ngpus {self.runtime_ngpus}"
        if not self.runtime_ngpus:
            object.__setattr__(self, "runtime_ngpus", _world_size() or self.plan_ngpus)
            numbers = f"the number of processes, {self.runtime_ngpus},"
        if self.runtime_ngpus % self.plan_ngpus:
            near = max(1, round(self.runtime_ngpus / self.plan_ngpus)) * self.plan_ngpus
            raise ConfigError(f"{numbers} is not a multiple of plan_ngpus {self.plan_ngpus}; use for example {near}")
        self._check_zero()
        for name in ("constant_folding", "inference_only", "use_end2end"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r:.60}; it must be True or False")
        if self.trace_strategy not in TRACE_STRATEGIES:
            raise ConfigError(f"unknown trace_strategy {self.trace_strategy!r}: {suggest(self.trace_strategy, TRACE_STRATEGIES)}")
        if self.guards not in GUARDS:
            raise ConfigError(f"unknown guards {self.guards!r}: {suggest(self.guards, GUARDS)}")
        for name in ("pas_config", "user_config"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"{name} is {getattr(self, name)!r:.60}; it must be a dict")

    def _check_zero(self) -> None:
        if not isinstance(self.use_zero, int) or int(self.use_zero) not in ZERO:
            raise ConfigError(f"use_zero is {self.use_zero!r:.60}; it must be False, True (or 1) or 3")
        if not _whole(self.zero_ngroups) or self.zero_ngroups < 1:
            raise ConfigError(f"zero_ngroups is {self.zero_ngroups!r:.60}; it must be a whole number of at least 1")
        for name in ("zero_use_reduce_scatter", "use_async_reducer"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r:.60}; it must be True or False")
        replicas = self.units if self.units > 1 else self.plan_ngpus
        if self.use_zero and replicas % self.zero_ngroups:
            of = f"{self.units} scale units" if self.units > 1 else f"{self.plan_ngpus} devices of the scale unit"
            raise ConfigError(f"zero_ngroups is {self.zero_ngroups}, which does not divide the {of}; the groups have to be of equal size")
        cap = self.reducer_bucket_cap_mb
        if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not 0 <= cap < float("inf"):
            raise ConfigError(f"reducer_bucket_cap_mb is {cap!r:.60}; it must be a number of megabytes, or 0 for the default")
        if self.inference_only and self.use_zero:
            raise ConfigError("inference_only and use_zero exclude each other: without an optimizer there is no state to shard")

    @property
    def units(self) -> int:
        """Number of scale units (data-parallel replicas)."""
        return self.runtime_ngpus // self.plan_ngpus

    @classmethod
    def of(cls, data: ComputeConfig | Mapping[str, Any] | None) -> ComputeConfig:
        """From a mapping of settings; None is all defaults. Raises ConfigError for an unknown key, naming the nearest valid one."""
        if isinstance(data, cls):
            return data
        if data is not None and not isinstance(data, Mapping):
            raise ConfigError(f"compute_config is {data!r:.60}; it must be a ComputeConfig or a dict of its settings")
        return cls(**{str(k): v for k, v in (data or {}).items()})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _member(cls: type[Enum], value: Any, what: str) -> Any:
    if isinstance(value, cls):
        return value
    try:
        return cls(str(value).lower())
    except ValueError:
        raise ConfigError(f"unknown {what} {value!r}: {suggest(value, [m.value for m in cls])}") from None


def _world_size() -> int:
    """How many processes torchrun (or anything that sets its variables) has started; 0 outside of it."""
    size = os.environ.get("WORLD_SIZE", "") if "RANK" in os.environ else ""
    return int(size) if size.isdigit() else 0


def _whole(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool)
