"""A tensor in a file of a checkpoint: where its numbers lie, and reading some of them straight into memory that is there.
Must not know plans or layouts. Anything but a contiguous tensor as torch.save writes it on this machine is left to torch.load.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, BinaryIO

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """Contiguous numbers from `start` of the file on."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Part(io.RawIOBase):
    """`length` bytes of a file as a file. NB: DCP's own view seeks from its end in the wrong direction."""

    def __init__(self, file: BinaryIO, offset: int, length: int):
        self.file, self.offset, self.length, self.at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.at)
        n = self.file.readinto(memoryview(buffer)[: max(0, self.length - self.at)])
        self.at += n
        return n


class Locator:
    """locate() for many tensors: one whose file begins with the very bytes of an earlier one's lies as that one does."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[bytes, int, Stored]] = {}  # by length: all bytes before the numbers, where they begin, and what

    def __call__(self, file: BinaryIO, at: Any) -> Stored | Tensor:
        if at.length in self._known:
            head, skip, like = self._known[at.length]
            file.seek(at.offset)
            if _masked(file.read(skip)) == head:
                return replace(like, start=at.offset + skip)
        found = locate(file, at)
        if isinstance(found, Stored):
            skip = found.start - at.offset
            file.seek(at.offset)
            self._known[at.length] = _masked(file.read(skip)), skip, found
        return found


def _masked(head: bytes) -> bytes:
    """Without the checksum of the numbers, in the last header before them."""
    last = head.rfind(b"PK\x03\x04")
    return head[: last + 14] + head[last + 18 :] if last >= 0 else head


def locate(file: BinaryIO, at: Any) -> Stored | Tensor:
    """at: DCP's storage info. The tensor itself where it has to be loaded as a whole."""
    part = io.BufferedReader(_Part(file, at.offset, at.length))
    with torch.serialization.skip_data():
        like = torch.load(part, map_location="cpu", weights_only=True)
    if isinstance(like, Tensor) and like.is_contiguous():
        part.seek(0)
        with zipfile.ZipFile(part) as z:
            names = {n.partition("/")[2]: n for n in z.namelist()}
            order = z.read(names["byteorder"]) if "byteorder" in names else b""
            data = z.getinfo(names["data/0"]) if "data/0" in names else None
        if data is not None and data.compress_type == zipfile.ZIP_STORED and order == sys.byteorder.encode():
            part.seek(data.header_offset + 26)
            lengths = part.read(4)  # of the name and of the extra field in front of the data; those of the directory may differ
            skip = 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            start = at.offset + data.header_offset + skip + like.storage_offset() * like.itemsize
            return Stored(start, tuple(like.shape), like.dtype)
    part.seek(0)
    return torch.load(part, map_location="cpu", weights_only=True)


def read(file: BinaryIO, found: Stored | Tensor, offsets: Sequence[int], target: Tensor) -> None:
    """target = the rectangle of its shape that begins at `offsets`. Raises EOFError where the file ends before that."""
    if target.numel() == 0:
        return
    if isinstance(found, Tensor):
        target.copy_(_rectangle(found, offsets, target.shape))
        return
    shape = found.shape
    if not shape:
        shape, offsets, target = (1,), (0,), target.view(1)
    row = prod(shape[1:]) * found.dtype.itemsize
    file.seek(found.start + offsets[0] * row)
    rows = (target.shape[0], *shape[1:])
    if rows == tuple(target.shape) and target.is_contiguous() and target.dtype == found.dtype and target.device.type == "cpu":
        _fill(file, target)
        return
    buffer = torch.empty(rows, dtype=found.dtype)
    _fill(file, buffer)
    target.copy_(_rectangle(buffer, (0, *offsets[1:]), target.shape))


def _fill(file: BinaryIO, t: Tensor) -> None:
    left = memoryview(t.detach().view(-1).view(torch.uint8).numpy())
    while left:
        n = file.readinto(left)
        if not n:
            raise EOFError(f"the file ends {len(left)} bytes too early")
        left = left[n:]


def _rectangle(t: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for dim, (start, n) in enumerate(zip(offsets, sizes, strict=True)):
        t = t.narrow(dim, start, n)
    return t
