"""One file of a checkpoint, written so that a full disk says so.
Must not know what is in it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

MERGED = "merged.pt"  # the file of a merged checkpoint; the others have one per rank


def rank_file(rank: int) -> str:
    return f"rank{rank}.pt"


class _File:
    """What torch.save writes to. NB: torch hides why a write has failed."""

    def __init__(self, file: Any):
        self.file, self.error = file, None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as e:
            self.error = self.error or e
            raise

    def flush(self) -> None:
        self.file.flush()


def save_file(path: Path, value: Any) -> None:
    """torch.save; on the disk when it returns. Raises OSError where the disk is full."""
    with path.open("wb") as f:
        out = _File(f)
        try:
            torch.save(value, out)
        except Exception as e:
            raise (out.error or e) from e
        f.flush()
        os.fsync(f.fileno())
