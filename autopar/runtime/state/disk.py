"""Files written so that a full disk says so: torch hides why a write has failed.
Must not know what is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem


class _File:
    """A file that remembers the first error."""

    def __init__(self, file: Any):
        self.file, self.error = file, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as e:
            self.error = self.error or e
            raise


@contextmanager
def telling(file: Any) -> Iterator[Any]:
    """The file to write to; where that fails inside, its own error is what is raised."""
    out = _File(file)
    try:
        yield out
    except Exception as e:
        if out.error is None or out.error is e:
            raise
        raise out.error from e


def save_file(path: Path, value: Any) -> None:
    """torch.save; on the disk when it returns. Raises OSError where that is full."""
    with path.open("wb") as f, telling(f) as out:
        torch.save(value, out)
        f.flush()
        os.fsync(f.fileno())


class _Files(FileSystem):
    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream, telling(stream) as out:
            yield out


class Writer(FileSystemWriter):
    """DCP's writer of a folder."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.fs = _Files()
