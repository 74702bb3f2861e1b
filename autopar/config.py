"""ComputeConfig and the enums of the public API, with their checks.
Must not import torch.distributed or any stage of the compiler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any

from autopar.errors import ConfigError, suggest

TRACE_STRATEGIES = ("auto", "meta", "cpu", "cuda", "cuda_run_cpu_offload", "reuse_cache")
GUARDS = ("error", "warn", "off")


class ReuseType(Enum):
    """What to do with code that was generated before (design section 9)."""

    MATCH = "match"
    OVERRIDE = "override"
    MOO = "moo"
    GRAPH = "graph"

    @classmethod
    def of(cls, value: ReuseType | str) -> ReuseType:
        """Accepts the member or its name. Raises ConfigError naming the nearest valid one."""
        if isinstance(value, cls):
            return value
        try:
            return cls(str(value).lower())
        except ValueError:
            raise ConfigError(f"unknown reuse {value!r}: {suggest(value, [m.value for m in cls])}") from None


@dataclass(frozen=True)
class ComputeConfig:
    """How a module is traced, split and run.

    plan_ngpus: devices in one scale unit; the model is split inside it.
    runtime_ngpus: devices in all; a multiple of plan_ngpus. 0 means plan_ngpus: one unit.
    constant_folding: bake sizes in; another input shape is then refused at run time.
    trace_strategy: what executes the ops while tracing (docs/tracing.md).
    guards: what happens when an input takes another path than the traced one: 'error', 'warn' or 'off'.
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
                f"runtime_ngpus is {self.runtime_ngpus!r}; it must be a multiple of plan_ngpus {self.plan_ngpus}, or 0 for one unit"
            )
        if not self.runtime_ngpus:
            object.__setattr__(self, "runtime_ngpus", self.plan_ngpus)
        if self.runtime_ngpus % self.plan_ngpus:
            near = max(1, round(self.runtime_ngpus / self.plan_ngpus)) * self.plan_ngpus
            numbers = f"runtime_ngpus {self.runtime_ngpus} is not a multiple of plan_ngpus {self.plan_ngpus}"
            raise ConfigError(f"{numbers}; use for example {near}")
        if self.trace_strategy not in TRACE_STRATEGIES:
            raise ConfigError(f"unknown trace_strategy {self.trace_strategy!r}: {suggest(self.trace_strategy, TRACE_STRATEGIES)}")
        if self.guards not in GUARDS:
            raise ConfigError(f"unknown guards {self.guards!r}: {suggest(self.guards, GUARDS)}")
        for name in ("pas_config", "user_config"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"{name} is {getattr(self, name)!r:.60}; it must be a dict")

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


def _whole(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool)
