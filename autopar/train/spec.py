"""RunSpec: one frozen description of a training run, which the core reads; made and checked by args.py.
Must not know class paths, YAML or torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

SAVE_TYPES = ("sharded", "deduped", "merged", "dcp")


@dataclass(frozen=True)
class CheckpointSpec:
    """When and how checkpoints are written, kept and resumed from."""

    save_dir: str = "./checkpoints"
    no_save: bool = False
    save_type: Literal["sharded", "deduped", "merged", "dcp"] = "dcp"
    save_last: bool = True
    save_best: bool = True
    symlink_best_and_last: bool = True
    every_n_train_steps: int | None = None
    every_n_epochs: int | None = None
    keep_last_n_checkpoints: int | None = None
    resume_from: str | None = None
    async_save: bool = False
    on_save_error: Literal["stop", "continue"] = "stop"
    save_on_interrupt: bool = True


@dataclass(frozen=True)
class ProfileSpec:
    """torch.profiler over `active_steps` steps every `every_n_train_steps`; None: never."""

    every_n_train_steps: int | None = None
    active_steps: int = 1
    folder: str = "./profile"
    memory_snapshot: bool = False


@dataclass(frozen=True)
class RunSpec:
    """global_batch_size = micro_batch_size * scale units * grad_accumulation_steps; limits and intervals are None where there is none."""

    run_mode: Literal["run", "compile"] = "run"
    seed: int | None = None

    micro_batch_size: int = 1
    grad_accumulation_steps: int = 1
    global_batch_size: int = 1

    max_epochs: int | None = None
    max_train_steps: int | None = None
    max_val_steps: int | None = None
    val_every_n_train_steps: int | None = None
    val_every_n_epochs: int | None = 1

    loss_reduction: Literal["mean", "sum"] = "mean"
    grad_reduction: Literal["mean", "sum", "per-token-mean"] = "mean"
    clip_gnorm: float | None = None
    check_finite: bool = True
    lr_interval: Literal["epoch", "step"] = "epoch"

    enable_progress_bar: bool = True
    log_progress_every_n_train_steps: int = 100

    checkpoint: CheckpointSpec = field(default_factory=CheckpointSpec)
    profile: ProfileSpec = field(default_factory=ProfileSpec)
