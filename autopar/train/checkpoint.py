"""Checkpointer: saves a training run, at once or in the background, keeps last, best and the last n, and loads what a run resumes from.
Must not know when to save, nor what the trainer's state consists of.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autopar.errors import CheckpointError
from autopar.runtime.state import checkpoint as state
from autopar.runtime.state import folder as files
from autopar.runtime.state.taking import Staging, as_is, on_cpu
from autopar.train import resume, retention
from autopar.train.merged import merge_checkpoint
from autopar.train.resume import Loaded
from autopar.train.saving import LostContact, Meeting, Write, collect, describe, expected, frozen, plain
from autopar.train.spec import CheckpointSpec

__all__ = ["Checkpointer", "Loaded", "SaveReport", "merge_checkpoint"]
log = logging.getLogger("autopar")


@dataclass(frozen=True)
class SaveReport:
    """path: where the checkpoint is, or will be; None where it was not saved. stall_s: how long training has waited.

    bytes: of the tensors that this rank writes.
    """

    path: Path | None
    stall_s: float
    bytes: int


class Checkpointer:
    """Of one run; all ranks make one and call it alike, between optimizer steps. NB: every method is collective.

    A checkpoint is a folder `{epoch}-{step}` in save_dir. It appears when it is complete: whatever happens during a save, what was there
    before stays loadable. Errors in the environment (a full disk, ...) follow spec.on_save_error; state that cannot be saved always raises.
    Raises CheckpointError where save_dir cannot be written to.
    """

    def __init__(self, spec: CheckpointSpec, *, rank: int, world_size: int):
        self.spec, self.rank = spec, rank
        self.save_dir = Path(spec.save_dir).absolute()
        self._meeting = Meeting(rank, world_size)
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None  # of the save in the background
        self._best: float | None = None  # the lowest validation loss of a saved checkpoint
        self._swept = False
        if not spec.no_save:  # better now than after an hour
            self._meeting.together("save checkpoints", lambda: None if rank else retention.check_writable(self.save_dir))

    # -- saving

    def save(
        self,
        *,
        module: Any,
        optimizer: Any,
        status: Mapping[str, Any],
        lr_scheduler: Mapping[str, Any] | None = None,
        dataloader: Any = None,
        custom: Mapping[str, Any] | None = None,
        step: int,
        epoch: int,
        val_loss: float | None = None,
        args: Mapping[str, Any] | None = None,
    ) -> SaveReport:
        """Save this moment's state; with async_save, return when it has been copied, and write in the background.

        The next save, and wait(), wait for the one before. Raises CheckpointError, the same on all ranks, as spec.on_save_error says.
        """
        start = time.perf_counter()
        self.wait()
        if self.spec.no_save:
            return SaveReport(None, time.perf_counter() - start, 0)
        folder = self.save_dir / retention.name_of(epoch, step)
        best = self._best_with(val_loss)
        layout = state.facts(module, self.spec.save_type)
        head = {"step": step, "epoch": epoch, "val_loss": val_loss, "best_val_loss": best, "saved": time.time()}
        head |= {"model": type(module).__name__, **{k: layout[k] for k in ("world", "unit", "mesh")}}
        own = self._meeting.together("save", lambda: self._own(status, lr_scheduler, dataloader, custom, args, head))
        in_background = self.spec.async_save
        take = self._staging.take if in_background else as_is if self.spec.save_type == "dcp" else on_cpu
        self._staging.begin()
        with torch.no_grad():
            write, size = collect(self.spec.save_type, module, optimizer, own, take, self._meeting)
        self._staging.end()
        facts = {**layout, "trainer": head}
        path: Path | None = folder
        if in_background:
            device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            self._thread = threading.Thread(target=self._in_background, args=(folder, write, facts, device), name="autopar save")
            self._thread.start()
        else:
            try:
                self._write(folder, write, facts)
            except CheckpointError as e:
                self._settle(e)
                path = None
        return SaveReport(path, time.perf_counter() - start, size)

    def wait(self) -> None:
        """Until the save in the background has ended. Raises its error, or logs it, as spec.on_save_error says."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            self._settle(error)

    def close(self) -> None:
        """As wait(), but raises nothing: for a run that ends with an error of its own, before the process groups are given up."""
        try:
            self.wait()
        except CheckpointError as e:
            log.warning("%s", e)

    def _own(self, status: Any, lr_scheduler: Any, dataloader: Any, custom: Any, args: Any, head: Any) -> dict[str, Any]:
        parts = {
            "status": ("the trainer's status", dict(status)),
            "lr_scheduler": ("the state of the learning-rate scheduler", lr_scheduler),
            "dataloader": ("the state of the dataloader", dataloader),
            "custom": ("what on_save_checkpoint has added to the checkpoint", dict(custom or {})),
        }
        return {**frozen(parts), "args": plain(args or {}), "head": head}

    def _settle(self, error: CheckpointError) -> None:
        if self.spec.on_save_error == "stop" or isinstance(error, LostContact):
            raise error
        if self.rank == 0:
            log.warning("%s; training goes on without this checkpoint, those before it stay", error)

    # -- the writing, in the background or not

    def _in_background(self, folder: Path, write: Write, facts: dict[str, Any], device: int | None) -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # NB: the current device is of a thread; without this all would use the first
            self._write(folder, write, facts)
        except CheckpointError as e:
            self._error = e
        except BaseException as e:
            self._error = LostContact(f"cannot save {folder}: {describe(e)}")

    def _write(self, folder: Path, write: Write, facts: dict[str, Any]) -> None:
        first, tmp, meeting = self.rank == 0, files.aside(folder, "saving"), self._meeting
        try:
            meeting.together(f"save {folder}", lambda: self._begin(folder) if first else None)
            meeting.together(f"save {folder}", lambda: write(tmp))
            meeting.together(f"save {folder}", lambda: self._commit(tmp, folder, facts) if first else None)
        except CheckpointError:
            if first:
                files.remove(tmp)  # NB: so that a full disk has room again
            raise
        self._best = facts["trainer"]["best_val_loss"]

    def _begin(self, folder: Path) -> None:
        self.save_dir.mkdir(parents=True, exist_ok=True)
        if not self._swept:
            retention.sweep(self.save_dir)
            self._swept = True
        files.start(folder)

    def _commit(self, tmp: Path, folder: Path, facts: dict[str, Any]) -> None:
        """NB: in this order, so that a kill in between leaves last and best on checkpoints that are there."""
        spec, head = self.spec, facts["trainer"]
        better = head["best_val_loss"] is not None and head["best_val_loss"] != self._best
        lost = [name for name in expected(spec.save_type, facts["world"]) if not (tmp / name).exists()]
        if lost:
            raise CheckpointError(f"{', '.join(lost[:6])} cannot be seen by rank 0; is save_dir on a disk that all ranks share?")
        files.finish(tmp, folder, facts)
        if spec.save_last:
            retention.point(self.save_dir / "last", folder, spec.symlink_best_and_last)
        if spec.save_best and (better or (_number(head["val_loss"]) and not retention.best_there(self.save_dir))):
            retention.point(self.save_dir / "best", folder, spec.symlink_best_and_last)
        retention.prune(self.save_dir, spec.keep_last_n_checkpoints)

    def _best_with(self, val_loss: float | None) -> float | None:
        """The lowest validation loss of a saved checkpoint, with this one."""
        return val_loss if _number(val_loss) and (self._best is None or val_loss < self._best) else self._best

    # -- resuming

    def find(self, resume_from: str | None) -> Path | None:
        """What to resume from: 'last', 'best' (None where there is none yet), or a path, which has to exist. Raises CheckpointError."""
        found = self._meeting.together("resume", lambda: None if self.rank else retention.find(self.save_dir, resume_from))
        return self._meeting.gather(found)[0]

    def load(self, path: Path, *, module: Any, optimizer: Any) -> Loaded:
        """Fill the module and optimizer. Raises CheckpointError for a checkpoint that is damaged, or does not fit the model or layout."""
        self.wait()
        loaded = resume.load(path, module, optimizer)
        # NB: in another folder than that of before, the best is the best of those there.
        self._best = loaded.head.get("best_val_loss") if retention.best_there(self.save_dir) else None
        return loaded


def _number(x: float | None) -> bool:
    return x is not None and not math.isnan(x)
