"""Profiler: torch.profiler over k steps of every n, a Chrome trace per rank and profile, and on CUDA a memory snapshot.
Must not know what a step does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from autopar.train.spec import ProfileSpec

log = logging.getLogger("autopar.train")


class Profiler:
    """Call step() after each optimizer step, and close() at the end. Without `every_n_train_steps` both do nothing.

    With n and k the steps n+1 .. n+k are profiled, then 2n+1 .. 2n+k, and so on. Files are <folder>/rank<r>/steps<first>-<last>.json,
    for chrome://tracing or Perfetto, and with a memory snapshot .pickle, for PyTorch's memory_viz.
    What cannot be profiled or written is a warning, and ends profiling on this rank; training goes on.
    """

    def __init__(self, spec: ProfileSpec, *, rank: int, device: torch.device | str = "cpu"):
        self._every, self._active = spec.every_n_train_steps, max(1, spec.active_steps)
        self._folder = Path(spec.folder) / f"rank{rank}"
        self._cuda = torch.device(device).type == "cuda"
        self._memory = spec.memory_snapshot and self._cuda
        self._profile: Any = None
        self._first = self._last = 0
        if self._every and spec.memory_snapshot and not self._cuda and rank == 0:
            log.warning("profile.memory_snapshot is for CUDA devices; there will be none on %s", device)

    def step(self, finished_steps: int) -> None:
        """So many steps are finished."""
        if not self._every:
            return
        self._last = finished_steps
        if self._profile is not None and finished_steps - self._first + 1 >= self._active:
            self._guarded(self._stop)
        if self._profile is None and self._every and finished_steps % self._every == 0:
            self._guarded(self._begin)

    def close(self) -> None:
        """Write what an unfinished profile has."""
        if self._profile is not None:
            self._guarded(self._stop)

    def _begin(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._folder.mkdir(parents=True, exist_ok=True)
        if self._memory:
            torch.cuda.memory._record_memory_history()
        made = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])])
        made.start()
        self._profile, self._first = made, self._last + 1

    def _stop(self) -> None:
        done, self._profile = self._profile, None
        done.stop()
        if self._last < self._first:
            return
        name = self._folder / f"steps{self._first}-{self._last}"
        done.export_chrome_trace(f"{name}.json")
        if self._memory:
            torch.cuda.memory._dump_snapshot(f"{name}.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as e:
            self._every = None
            log.warning("profiling ends: %s: %s", type(e).__name__, e)
