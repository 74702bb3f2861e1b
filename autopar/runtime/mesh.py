"""RankMesh: the mesh as one rank sees it, a mapping from axis name to Axis; and the joint axes along which gradients are summed.
Must not know which transport carries the messages: it is handed a function that takes a label and all groups of one kind
and connects this rank to its peers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch

from autopar.errors import LayoutError, suggest
from autopar.runtime.axis import Axis, Comm

UNITS = "units"  # the axis of scale-unit replicas


class RankMesh(dict[str, Axis]):
    """mesh['tp'] is this rank's Axis. World rank r is device r % unit_size of unit r // unit_size; devices are row-major in the mesh.

    .rank, .world_size: of the whole run. .device_index: inside the unit. .unit, .units: which replica, of how many. .device: torch device.
    """

    def __init__(
        self,
        axes: Sequence[tuple[str, int]],
        rank: int,
        units: int,
        connect: Callable[[str, list[tuple[int, ...]]], Comm],
        device: torch.device,
    ):
        super().__init__()
        self.names = tuple(n for n, _ in axes)
        self.sizes = tuple(k for _, k in axes)
        self.rank, self.units, self.device = rank, units, device
        self.unit_size = prod(self.sizes)
        self.world_size = units * self.unit_size
        self.unit, self.device_index = divmod(rank, self.unit_size)
        self._connect = connect
        self._joint: dict[tuple[str, ...], Axis] = {}
        for name in self.names:
            self[name] = self.join((name,))
        self.replicas = self.join((UNITS,))

    def __missing__(self, name: str) -> Axis:
        raise LayoutError(f"the mesh has no axis {name!r}: {suggest(name, self.names)}")

    def __deepcopy__(self, memo: dict) -> RankMesh:
        return self

    def __repr__(self) -> str:
        shape = ", ".join(f"{n}={k}" for n, k in zip(self.names, self.sizes, strict=True))
        return f"RankMesh({shape}; rank {self.rank} of {self.world_size}, unit {self.unit} of {self.units})"

    def coords(self, rank: int) -> dict[str, int]:
        """The coordinates of a world rank, the unit included."""
        unit, device = divmod(rank, self.unit_size)
        out = {UNITS: unit}
        for name, k in zip(reversed(self.names), reversed(self.sizes), strict=True):
            device, out[name] = divmod(device, k)
        return out

    def groups(self, names: Sequence[str]) -> list[tuple[int, ...]]:
        """All groups of ranks that differ only in their coordinates along these axes; the groups, and the ranks in each, in rank order."""
        out: dict[tuple, list[int]] = {}
        for r in range(self.world_size):
            coords = self.coords(r)
            out.setdefault(tuple(c for n, c in coords.items() if n not in names), []).append(r)
        return [tuple(g) for g in out.values()]

    def join(self, names: Sequence[str]) -> Axis:
        """One Axis over several axes at once ('units' among them), its ranks in world order. NB: collective; all ranks call it alike."""
        names = tuple(n for n in (UNITS, *self.names) if n in names)
        if names not in self._joint:
            groups = self.groups(names)
            mine = next(g for g in groups if self.rank in g)
            label = "+".join(names)
            comm = self._connect(label, groups) if len(mine) > 1 else None
            self._joint[names] = Axis(label, len(mine), mine.index(self.rank), comm, self.rank)
        return self._joint[names]
