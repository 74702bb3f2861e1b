"""Collectives on flat tensors that run while this rank computes on: start() one, wait for it later.
Must not know what is sent. Between in-process ranks, and through host memory, they are over when start() returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.runtime import axis as axes
from autopar.runtime.axis import Axis, DistComm
from autopar.runtime.mesh import RankMesh


class Pending:
    """A collective under way. NB: its tensors may not be touched before wait() has returned."""

    def __init__(self, *works: dist.Work, then: Callable[[], object] | None = None):
        self._works, self._then = works, then

    @property
    def done(self) -> bool:
        """Whether wait() would return at once."""
        return all(w.is_completed() for w in self._works)

    def wait(self) -> None:
        works, then, self._works, self._then = self._works, self._then, (), None
        for work in works:
            axes.wait(work)
        if then is not None:
            then()


def overlaps(axis: Axis, device: torch.device) -> bool:
    """Whether collectives along the axis, of tensors on the device, run while this rank computes."""
    return isinstance(axis.comm, DistComm) and not (axis.comm.staged and device.type == "cuda")


def all_reduce(axis: Axis, t: Tensor) -> Pending:
    """Overwrite t by the sum over the ranks."""
    if axis.size > 1 and overlaps(axis, t.device):
        _note("all_reduce", axis, t)
        return Pending(dist.all_reduce(t, group=axis.comm.group, async_op=True))
    axis.all_reduce_(t)
    return Pending()


def all_gather(axis: Axis, out: Tensor, t: Tensor) -> Pending:
    """out = the t of all ranks back to back. t may be its place in out."""
    if axis.size == 1:
        if out.data_ptr() != t.data_ptr():
            out.copy_(t)
        return Pending()
    _note("all_gather", axis, t)
    if overlaps(axis, t.device):
        group, parts = axis.comm.group, out.view(axis.size, -1)
        if not axis.comm.staged:
            return Pending(dist.all_gather_into_tensor(out, t, group=group, async_op=True))
        # NB: gloo's own allocates and copies everything once more.
        if parts[axis.rank].data_ptr() != t.data_ptr():
            parts[axis.rank].copy_(t)
        return Pending(*(dist.broadcast(part, group=group, group_src=src, async_op=True) for src, part in enumerate(parts.unbind())))
    axis.comm.all_gather_into(out.view(axis.size, -1), t)
    return Pending()


class Scratch:
    """Memory for what arrives, used again by the next bucket: new memory costs as much as the copy into it."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, n: int, like: Tensor) -> Tensor:
        for i, t in enumerate(self._free):
            if t.numel() >= n and t.dtype == like.dtype and t.device == like.device:
                return self._free.pop(i)
        return like.new_empty(n)

    def give(self, t: Tensor) -> None:
        self._free.append(t)

    def clear(self) -> None:
        self._free.clear()


def reduce_scatter(axis: Axis, out: Tensor, t: Tensor, scratch: Scratch | None = None) -> Pending:
    """out = this rank's part (of `size` equal ones) of the sum of t over the ranks. out may be its place in t."""
    if axis.size == 1:
        out.copy_(t)
        return Pending()
    _note("reduce_scatter", axis, t)
    if not overlaps(axis, t.device):
        into = torch.empty_like(out)
        axis.comm.reduce_scatter_into(into, t.view(axis.size, -1))
        out.copy_(into)
        return Pending()
    if not axis.comm.staged:
        return Pending(dist.reduce_scatter_tensor(out, t, group=axis.comm.group, async_op=True))
    # NB: gloo's own is an all-reduce inside, and cannot be asked whether it is done. This rank's own part stays where it is, if that is
    # at the start or there are two; elsewhere out, which may be that part, would be written before it has been added.
    n, k, me = out.numel(), axis.size, axis.rank
    own = t[me * n : (me + 1) * n]
    given = t[n:] if me == 0 else t[:-n] if k == 2 else t
    sizes = [n if len(given) == len(t) or r != me else 0 for r in range(k)]
    taken = scratch.take(len(given), t) if scratch is not None else t.new_empty(len(given))
    parts = taken[: len(given)]
    work = dist.all_to_all_single(parts, given, sizes, sizes, group=axis.comm.group, async_op=True)

    def add() -> None:
        rows = list(parts.split(n))
        if len(rows) < k:
            rows.insert(me, own)
        torch.add(rows[0], rows[1], out=out)
        for row in rows[2:]:
            out.add_(row)
        if scratch is not None:
            scratch.give(taken)

    return Pending(work, then=add)


def _note(name: str, axis: Axis, t: Tensor) -> None:
    if axes._recorders:
        axes._note(name, axis, t)


def own_channel(axis: Axis, groups: Sequence[tuple[int, ...]]) -> Axis:
    """The same ranks (one of all `groups`) over a process group of their own: its messages come in their own order. NB: collective."""
    if not isinstance(axis.comm, DistComm):
        return axis
    backend = axis.comm.group._get_backend(torch.device("cpu" if axis.comm.staged else "cuda"))
    made = [(ranks, dist.new_group(list(ranks), timeout=backend.options._timeout)) for ranks in groups]
    mine = next(group for ranks, group in made if axis.world_rank in ranks)
    return Axis(axis.name, axis.size, axis.rank, DistComm(mine), axis.world_rank)


def groups_of(axis: Axis, mesh: RankMesh) -> list[tuple[int, ...]]:
    """The ranks of every axis like this one."""
    return mesh.groups(axis.name.split("+"))


def split_groups(groups: Sequence[tuple[int, ...]], parts: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Each group in `parts` groups of neighbours, and the ranks with the same place in each of these."""
    k = len(groups[0]) // parts
    inner = [g[i : i + k] for g in groups for i in range(0, len(g), k)]
    return inner, [g[i::k] for g in groups for i in range(k)]


def connect(label: str, groups: Sequence[tuple[int, ...]], mesh: RankMesh) -> Axis:
    """This rank's Axis in one of the groups. NB: collective."""
    mine = next(g for g in groups if mesh.rank in g)
    comm = mesh._connect(label, list(groups)) if len(mine) > 1 else None
    return Axis(label, len(mine), mine.index(mesh.rank), comm, mesh.rank)
