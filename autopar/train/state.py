"""TrainStatus: how far a run has come, as plain data; where that is in its epochs; and random states kept aside.
Must not know who trains or saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from autopar.runtime.state.generators import random_state, restore


@dataclass
class TrainStatus:
    """finished_train_steps is what counts; the epoch and the place in it follow from it and the length of an epoch.

    epoch, epoch_start: an epoch, and how many steps were finished when it began. (0, 0) unless lengths of epochs are not known, or differ.
    best_val_loss: the lowest of all checkpoints.
    """

    finished_train_steps: int = 0
    best_val_loss: float | None = None
    epoch: int = 0
    epoch_start: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> TrainStatus:
        """What is missing keeps its default; other keys are left aside."""
        return cls(**{f.name: d[f.name] for f in fields(cls) if f.name in d})

    def position(self, steps_per_epoch: int | None) -> tuple[int, int]:
        """(epoch, step in it) that comes next. None: epochs have no known length, and the last known one goes on."""
        done = self.finished_train_steps - self.epoch_start
        if not steps_per_epoch:
            return self.epoch, done
        epochs, idx = divmod(done, steps_per_epoch)
        return self.epoch + epochs, idx

    def anchor(self, epoch: int, idx: int, steps_per_epoch: int | None) -> None:
        """Remember where this epoch began, if that does not follow from the rest."""
        if steps_per_epoch is None or self.position(steps_per_epoch) != (epoch, idx):
            self.epoch, self.epoch_start = epoch, self.finished_train_steps - idx


@contextmanager
def randomness_kept() -> Iterator[None]:
    """What is drawn inside (torch, CUDA, Python, NumPy) changes nothing outside."""
    before = random_state()
    try:
        yield
    finally:
        restore(before)
