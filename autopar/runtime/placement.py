"""Placement: how the ranks of a mesh hold one parameter or buffer, and which slice of it is this rank's.
Must not know modules or files. Reads the type texts 'R', 'I', 'S(dim)', 'S(dim,nest)', 'S(dim/groups)' by itself: it imports no compiler.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from autopar.errors import LayoutError
from autopar.runtime.mesh import RankMesh

KINDS = ("param", "buffer", "constant")
_SHARD = re.compile(r"S\((\d+)(?:/(\d+))?(?:,\s*(\d+))?\)")


@lru_cache(maxsize=1024)
def _parse(text: str) -> tuple[str, int, int, int]:
    """(kind, dim, nest, groups) of a type text; dim is -1 unless sharded."""
    if text in ("R", "I"):
        return text, -1, 0, 1
    found = _SHARD.fullmatch(text)
    if not found:
        raise LayoutError(f"{text!r} is not how a tensor of a module can be held; write R, I, S(dim), S(dim,nest) or S(dim/groups)")
    return "S", int(found[1]), int(found[3] or 0), int(found[2] or 1)


@dataclass(frozen=True)
class Placement:
    """One declared tensor. `types` has one text per mesh axis, in mesh order."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    types: tuple[str, ...]
    kind: str = "param"  # 'param' | 'buffer' | 'constant' (a tensor the program made from no input; not in the state dict)
    grad: bool = True  # requires_grad of a parameter
    persistent: bool = True  # in the state dict

    def check(self, mesh: RankMesh) -> None:
        """Raises LayoutError where the placement does not fit the mesh."""
        if self.kind not in KINDS:
            raise LayoutError(f"{self.name}: unknown kind {self.kind!r}; write one of {', '.join(KINDS)}")
        if len(self.types) != len(mesh.names):
            raise LayoutError(
                f"{self.name} has {len(self.types)} types, but the mesh has the {len(mesh.names)} axes {', '.join(mesh.names)}"
            )
        for dim, size in enumerate(self.shape):
            parts = 1
            for axis in self.sharding(mesh, dim):
                parts *= mesh[axis].size
            parts *= self.groups(dim)
            if size % parts:
                raise LayoutError(f"{self.name}: dim {dim} of size {size} does not split evenly over {parts} ranks")
        for text in self.types:
            if _parse(text)[1] >= len(self.shape):
                raise LayoutError(f"{self.name}: type {text} does not fit shape {self.shape}")

    def sharding(self, mesh: RankMesh, dim: int) -> list[str]:
        """The axes that shard a dim, outermost first."""
        found = [(nest, i) for i, (kind, d, nest, _) in enumerate(map(_parse, self.types)) if kind == "S" and d == dim]
        return [mesh.names[i] for _, i in sorted(found)]

    def groups(self, dim: int) -> int:
        """Number of equal parts of a dim, each of which is sharded."""
        return max((g for kind, d, _, g in map(_parse, self.types) if kind == "S" and d == dim), default=1)

    def shard(self, mesh: RankMesh, read: Callable[[tuple[slice, ...]], torch.Tensor]) -> torch.Tensor:
        """This rank's part of the whole tensor, of which read(slices) gives a slice.

        It is read in several pieces only where a dim is sharded inside groups: its part of each group, put together.
        """
        first = self.slices(mesh)

        def along(dim: int, done: tuple[slice, ...]) -> torch.Tensor:
            if dim == len(self.shape):
                return read(done)
            groups, mine = self.groups(dim), first[dim]
            if groups == 1 or mine == slice(None):
                return along(dim + 1, (*done, mine))
            starts = range(0, self.shape[dim], self.shape[dim] // groups)
            return torch.cat([along(dim + 1, (*done, slice(s + mine.start, s + mine.stop))) for s in starts], dim)

        return along(0, ())

    def slices(self, mesh: RankMesh) -> tuple[slice, ...]:
        """This rank's slice of the whole tensor, one per dim; slice(None) where the dim is whole.

        Where a dim is sharded inside groups: of the first group.
        """
        out = []
        for dim, size in enumerate(self.shape):
            index, parts = 0, 1
            for axis in self.sharding(mesh, dim):
                index, parts = index * mesh[axis].size + mesh[axis].rank, parts * mesh[axis].size
            n = size // parts // self.groups(dim)
            out.append(slice(None) if parts == 1 else slice(index * n, (index + 1) * n))
        return tuple(out)

    def local_shape(self, mesh: RankMesh) -> tuple[int, ...]:
        slices = enumerate(zip(self.shape, self.slices(mesh), strict=True))
        return tuple(n if s == slice(None) else (s.stop - s.start) * self.groups(d) for d, (n, s) in slices)

    def replicated(self, mesh: RankMesh) -> tuple[str, ...]:
        """The axes along which each rank holds a part of the gradient (type R)."""
        return tuple(n for n, text in zip(mesh.names, self.types, strict=True) if text == "R" and mesh[n].size > 1)
