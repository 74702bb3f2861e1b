"""How tensors are taken for a save: as they are, or copied to CPU memory so that training may go on while they are written; and who
writes what several ranks hold.
Must not know where they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from autopar.runtime.state.inventory import Entry

Take = Callable[[torch.Tensor], torch.Tensor]


def as_is(t: torch.Tensor) -> torch.Tensor:
    return t


def alone(t: torch.Tensor) -> torch.Tensor:
    """NB: torch.save writes the whole memory behind a view (of a bucket of ZeRO), of which the rest is another rank's to save."""
    return t if t.untyped_storage().nbytes() == t.numel() * t.itemsize else t.clone()


def on_cpu(t: torch.Tensor) -> torch.Tensor:
    return alone(t) if t.device.type == "cpu" else t.cpu()


def taken(value: Any, take: Take) -> Any:
    """The same dicts, lists and tuples with every tensor taken."""
    if isinstance(value, torch.Tensor):
        return take(value)
    if isinstance(value, Mapping):
        return {k: taken(v, take) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(taken(v, take) for v in value)
    return value


class Staging:
    """Copies of tensors in CPU memory (pinned for CUDA), which is kept for the next save: new memory costs more time than the copy."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []
        self._used = 0
        self._cuda = False

    def begin(self) -> None:
        """What was taken before may be overwritten from here on."""
        self._used = 0

    def take(self, t: torch.Tensor) -> torch.Tensor:
        at, self._used = self._used, self._used + 1
        kept = self._kept[at] if at < len(self._kept) else None
        if kept is None or kept.shape != t.shape or kept.dtype != t.dtype:
            kept = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
            self._kept[at : at + 1] = [kept]
        self._cuda |= t.is_cuda
        return kept.copy_(t, non_blocking=True)

    def end(self) -> None:
        """All copies are there; memory that was not used this time is given back."""
        del self._kept[self._used :]
        if self._cuda:
            torch.cuda.synchronize()


def written_here(mine: Mapping[str, Entry], rank: int, world: int) -> set[str]:
    """Names of the parameters that this rank writes: of each that several ranks hold, one of them, so that all have equally much to do.

    NB: every rank comes to the same answer without talking: those that hold the same part know each other, and see the same list.
    """
    known: dict[Any, tuple[tuple[int, ...], list[int]]] = {None: (tuple(range(world)), [0] * world)}
    out = set()
    for e in mine.values():
        if not e.param:
            continue
        mesh = e.module.mesh if e.module is not None else None
        key = None if mesh is None else (mesh.names, mesh.sizes, e.over)
        if key not in known:
            ranks = next(g for g in mesh.groups(e.over) if mesh.rank in g)
            known[key] = ranks, [0] * len(ranks)
        ranks, load = known[key]
        least = load.index(min(load))
        load[least] += e.tensor.numel() * e.tensor.itemsize
        if ranks[least] == rank or not e.layout.complete:  # NB: who has the same range (ZeRO-3) is left to DCP
            out.add(e.name)
    return out
