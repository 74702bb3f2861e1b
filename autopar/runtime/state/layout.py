"""Where a local tensor lies in the whole one: per dim runs of indices, a flat range of that, and the rectangles they come to.
Must not know modules, optimizers or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import torch

from autopar.errors import CheckpointError
from autopar.runtime.mesh import RankMesh
from autopar.runtime.placement import Placement

Run = tuple[int, int, int]  # start in the local tensor, start in the whole one, length


@dataclass(frozen=True)
class Box:
    """A rectangle of the whole tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def volume(self) -> int:
        return prod(self.sizes)

    def meet(self, other: Box) -> Box | None:
        """What both cover; None where they have no entry in common."""
        lows = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        highs = [min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)]
        sizes = tuple(h - low for h, low in zip(highs, lows, strict=True))
        return None if any(n <= 0 for n in sizes) else Box(lows, sizes)

    def within(self, t: torch.Tensor, inner: Box) -> torch.Tensor:
        """The view that holds `inner` of a tensor that holds this box."""
        for dim, (at, start, n) in enumerate(zip(inner.offsets, self.offsets, inner.sizes, strict=True)):
            t = t.narrow(dim, at - start, n)
        return t

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, a + n) for a, n in zip(self.offsets, self.sizes, strict=True))


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """The entries [start, stop) of a row-major tensor as (rectangle, its first entry): at most 2 * dims - 1, each contiguous."""
    if start >= stop:
        return
    if not shape:
        yield Box((), ()), 0
        return
    row = prod(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)

    def inside(at: int, a: int, b: int) -> Iterator[tuple[Box, int]]:
        for box, entry in rectangles(shape[1:], a, b):
            yield Box((at, *box.offsets), (1, *box.sizes)), at * row + entry

    if first == last:
        yield from inside(first, head, tail)
        return
    if head:
        yield from inside(first, head, row)
        first += 1
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])), first * row
    if tail:
        yield from inside(last, 0, tail)


@dataclass(frozen=True)
class Layout:
    """This rank's part of a whole tensor: the product of the runs of each dim; of that the flat range [start, stop)."""

    shape: tuple[int, ...]  # of the whole tensor
    runs: tuple[tuple[Run, ...], ...]
    start: int
    stop: int

    @classmethod
    def whole(cls, shape: Iterable[int]) -> Layout:
        shape = tuple(shape)
        return cls(shape, tuple(((0, 0, n),) for n in shape), 0, prod(shape))

    @classmethod
    def of(cls, p: Placement, mesh: RankMesh) -> Layout:
        runs = []
        for dim, (size, mine) in enumerate(zip(p.shape, p.slices(mesh), strict=True)):
            groups = p.groups(dim)
            if mine == slice(None):
                runs.append(((0, 0, size),))
            else:
                n, every = mine.stop - mine.start, size // groups
                runs.append(tuple((g * n, g * every + mine.start, n) for g in range(groups)))
        return cls(p.shape, tuple(runs), 0, prod(p.local_shape(mesh)))

    def range(self, start: int, stop: int) -> Layout:
        """Only the entries [start, stop) of the flattened local tensor."""
        assert 0 <= start <= stop <= prod(self.local_shape), (start, stop, self)
        return replace(self, start=start, stop=stop)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of the local tensor, without regard to the range."""
        return tuple(sum(n for _, _, n in runs) for runs in self.runs)

    @property
    def complete(self) -> bool:
        """The range is all of the local tensor."""
        return self.stop - self.start == prod(self.local_shape)

    def cut(self, t: torch.Tensor) -> list[tuple[Box, torch.Tensor]]:
        """The local tensor (flat where it is a range of one) as rectangles of the whole one, each with its view of t."""
        shape = self.local_shape
        if self.complete:
            if tuple(t.shape) != shape:
                t = t.view(shape)
            parts = [(Box((0,) * len(shape), shape), t)]
        else:
            parts = [
                (box, t[at - self.start : at - self.start + box.volume].view(box.sizes))
                for box, at in rectangles(shape, self.start, self.stop)
            ]
        out = []
        for box, view in parts:
            for runs in product(*self.runs):
                local = Box(tuple(r[0] for r in runs), tuple(r[2] for r in runs))
                both = box.meet(local) if prod(shape) else local
                if both is not None:
                    offsets = tuple(a - r[0] + r[1] for a, r in zip(both.offsets, runs, strict=True))
                    out.append((Box(offsets, both.sizes), box.within(view, both)))
        return out

    def boxes(self) -> list[Box]:
        n = self.stop - self.start
        like = torch.empty(self.local_shape if self.complete else (n,), device="meta")
        return [box for box, _ in self.cut(like)]

    def to_data(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "runs": [[list(r) for r in d] for d in self.runs], "range": [self.start, self.stop]}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Layout:
        return cls(tuple(data["shape"]), tuple(tuple(tuple(r) for r in d) for d in data["runs"]), *data["range"])


def assemble(what: str, shape: tuple[int, ...], parts: Iterable[tuple[Box, torch.Tensor]]) -> torch.Tensor:
    """The whole tensor from its rectangles; of those that are the same the first is taken.

    Raises CheckpointError where they overlap in part or leave gaps.
    """
    unique: dict[Box, torch.Tensor] = {}
    for box, t in parts:
        unique.setdefault(box, t)
    covered = sum(box.volume for box in unique)
    if not unique or covered != prod(shape):
        raise CheckpointError(
            f"the parts of {what} hold {covered} of the {prod(shape)} entries of {tuple(shape)}; "
            f"are all ranks' files there, and of one save?"
        )
    out = next(iter(unique.values())).new_empty(shape)
    for box, t in unique.items():
        out[box.slices] = t
    return out
