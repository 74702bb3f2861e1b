"""What the runs train that test_train_kill.py kills: a data set that takes its time, and a hook that says where a run is.
Must not know who kills it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from autopar.train import TrainHook
from tests.train_cases import Noisy


class Slow(Noisy):
    """Reading a sample takes a few milliseconds, and draws random numbers."""

    def __getitem__(self, i):
        time.sleep(0.008)
        return super().__getitem__(i)


class Diary(TrainHook):
    """A line `rank pid attempt step` in a file of this rank: at the start of training and after every step."""

    def __init__(self, folder: str):
        self.file = Path(folder) / f"rank{os.environ.get('RANK', 0)}"

    def _note(self, step):
        with self.file.open("a") as f:
            f.write(f"{os.getpid()} {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} {step}\n")

    def on_train_start(self, trainer):
        self._note(trainer.train_status.finished_train_steps)

    def on_step_end(self, trainer, *args):
        self._note(trainer.train_status.finished_train_steps)
