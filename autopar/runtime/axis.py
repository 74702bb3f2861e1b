"""Axis: the ranks along one mesh axis, with raw collectives that no gradient flows through, and DistComm for torch.distributed.
Must not know about autograd (collectives.py), about the whole mesh (groups.py) or about in-process ranks (inproc.py).
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist

from autopar.errors import LayoutError

OPS = ("sum", "max", "min")


class Comm(Protocol):
    """A transport between the `k` ranks of one group. All tensors are contiguous, and `stacked` ones are (k, *shape of one)."""

    def all_reduce_(self, t: torch.Tensor, op: str) -> None:
        """Overwrite t by the reduction over the ranks."""

    def all_gather_into(self, stacked: torch.Tensor, t: torch.Tensor) -> None:
        """stacked[j] = the t of rank j."""

    def reduce_scatter_into(self, t: torch.Tensor, stacked: torch.Tensor) -> None:
        """t = sum over the ranks of their stacked[my rank]. May not change stacked."""

    def all_to_all_into(self, out: torch.Tensor, stacked: torch.Tensor) -> None:
        """out[j] = the stacked[my rank] of rank j."""

    def broadcast_(self, t: torch.Tensor, src: int) -> None:
        """Overwrite t by the t of rank src (an index in the group)."""


@dataclass(frozen=True)
class Record:
    """One collective as one rank saw it."""

    name: str  # 'all_reduce' | 'all_gather' | 'reduce_scatter' | 'all_to_all' | 'broadcast'
    axis: str
    rank: int  # world rank
    size: int  # ranks along the axis
    shape: tuple[int, ...]  # of the tensor this rank put in
    dtype: torch.dtype
    backward: bool  # issued while autograd was running a backward

    @property
    def payload(self) -> int:
        """Bytes of the tensor this rank put in."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes one rank sends (ring algorithms), the measure that the cost model uses."""
        n, k = self.payload, self.size
        sent = {"all_reduce": 2 * n * (k - 1) // k, "all_gather": n * (k - 1), "broadcast": n * (k - 1) // k}
        return sent.get(self.name, n * (k - 1) // k)


_recorders: list[list[Record]] = []  # empty unless somebody records: then every collective costs one truth test
_current = threading.local()  # .rank is set in the threads of in-process ranks


@contextmanager
def record() -> Iterator[list[Record]]:
    """Log every collective until the end of the `with`. In an in-process rank, only that rank's."""
    log: list[Record] = []
    _recorders.append(log)
    log_rank[id(log)] = getattr(_current, "rank", None)
    try:
        yield log
    finally:
        # NB: by identity; two empty logs are equal.
        _recorders[:] = [r for r in _recorders if r is not log]
        del log_rank[id(log)]


log_rank: dict[int, int | None] = {}


def _note(name: str, axis: Axis, t: torch.Tensor) -> None:
    backward = torch._C._current_graph_task_id() != -1
    entry = Record(name, axis.name, axis.world_rank, axis.size, tuple(t.shape), t.dtype, backward)
    for log in list(_recorders):
        if log_rank.get(id(log)) in (None, axis.world_rank):
            log.append(entry)


def _raw(t: torch.Tensor) -> torch.Tensor:
    """A view of t in a type that every transport moves. Only for collectives that copy."""
    return t.view(torch.uint8) if t.dtype == torch.bool or (t.dtype.itemsize == 1 and t.dtype.is_floating_point) else t


class Axis:
    """This rank's place on one mesh axis, and raw collectives along it. Each returns a new contiguous tensor without a gradient."""

    __slots__ = ("comm", "name", "rank", "size", "world_rank")

    def __init__(self, name: str, size: int, rank: int, comm: Comm | None, world_rank: int = 0):
        assert 0 <= rank < size and (size == 1 or comm is not None), (name, size, rank, comm)
        self.name, self.size, self.rank, self.comm, self.world_rank = name, size, rank, comm, world_rank

    def __repr__(self) -> str:
        return f"Axis({self.name!r}, size={self.size}, rank={self.rank})"

    def __deepcopy__(self, memo: dict) -> Axis:
        return self  # a copied module talks over the same groups

    def all_reduce(self, t: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """The elementwise 'sum', 'max' or 'min' over the ranks. Of booleans: any, any, all."""
        return self.all_reduce_(t.detach().clone(memory_format=torch.contiguous_format), op)

    def all_reduce_(self, t: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """As all_reduce, overwriting t, which must be contiguous and nobody else's."""
        assert op in OPS, op
        if self.size > 1:
            if _recorders:
                _note("all_reduce", self, t)
            if t.dtype == torch.bool:
                self.comm.all_reduce_(t.view(torch.uint8), "max" if op == "sum" else op)
            else:
                self.comm.all_reduce_(t, op)
        return t

    def all_gather(self, t: torch.Tensor, dim: int) -> torch.Tensor:
        """The slices of all ranks, concatenated along dim in rank order."""
        t = t.detach()
        if self.size == 1:
            return t.clone(memory_format=torch.contiguous_format)
        dim %= t.dim()
        stacked = self.stack(t)
        # NB: a copy is made only where a dim before `dim` is larger than 1.
        shape = list(t.shape)
        shape[dim] *= self.size
        # NB: contiguous, because the user's program may view() the whole value; reshape alone may give a strided view.
        return stacked.movedim(0, dim).reshape(shape).contiguous()

    def stack(self, t: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, stacked along a new dim 0."""
        t = t.detach().contiguous()
        if self.size == 1:
            return t.clone().unsqueeze(0)
        if _recorders:
            _note("all_gather", self, t)
        out = t.new_empty((self.size, *t.shape))
        self.comm.all_gather_into(_raw(out), _raw(t))
        return out

    def reduce_scatter(self, t: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's slice along dim of the sum over the ranks. Raises LayoutError where dim does not divide."""
        t = t.detach()
        if self.size == 1:
            return t.clone(memory_format=torch.contiguous_format)
        stacked = self._split(t, dim)
        if _recorders:
            _note("reduce_scatter", self, stacked)
        out = t.new_empty(stacked.shape[1:])
        self.comm.reduce_scatter_into(out, stacked)
        return out

    def all_to_all(self, t: torch.Tensor, split_dim: int, cat_dim: int) -> torch.Tensor:
        """Send the j-th slice along split_dim to rank j, concatenate what arrives along cat_dim. Raises LayoutError as above."""
        t = t.detach()
        if self.size == 1:
            return t.clone(memory_format=torch.contiguous_format)
        stacked = self._split(t, split_dim)
        if _recorders:
            _note("all_to_all", self, stacked)
        out = torch.empty_like(stacked)
        self.comm.all_to_all_into(_raw(out), _raw(stacked))
        cat_dim %= t.dim()
        shape = list(stacked.shape[1:])
        shape[cat_dim] *= self.size
        return out.movedim(0, cat_dim).reshape(shape).contiguous()

    def broadcast(self, t: torch.Tensor, src: int) -> torch.Tensor:
        """The tensor of rank src of this axis; on the other ranks t gives shape and dtype only."""
        t = t.detach()
        out = t.clone(memory_format=torch.contiguous_format) if self.rank == src else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        if self.size > 1:
            if _recorders:
                _note("broadcast", self, out)
            self.comm.broadcast_(_raw(out), src)
        return out

    def shard(self, size: int, what: str = "") -> int:
        """size / number of ranks. Raises LayoutError where that is not whole."""
        if size % self.size:
            what = what or "a dim"
            raise LayoutError(
                f"{what} of size {size} does not split evenly over the {self.size} ranks of mesh axis {self.name!r}; "
                f"give an input where it is a multiple of {self.size}, or a plan that leaves it whole"
            )
        return size // self.size

    def _split(self, t: torch.Tensor, dim: int) -> torch.Tensor:
        """(k, ... n/k ...): the slices along dim, stacked; a view where dim is the first that is larger than 1."""
        dim %= t.dim()
        n = self.shard(t.shape[dim], f"dim {dim} of a {tuple(t.shape)} tensor")
        return t.unflatten(dim, (self.size, n)).movedim(dim, 0).contiguous()


_SLICE = 0.2  # seconds
# Called while a gloo collective waits (with None) and when it fails (with the error): raises where a rank has failed (faults.py).
interrupt: list[Callable[[RuntimeError | None], None]] = []


def wait(work: dist.Work) -> None:
    """Wait for a gloo collective that was started with async_op=True, no longer than until another rank is known to have failed."""
    if not interrupt:
        work.wait()
        return
    while True:
        start = time.monotonic()
        try:
            work.wait(timedelta(seconds=_SLICE))
            return
        except RuntimeError as e:
            error, failed = e, time.monotonic() - start < _SLICE / 2
        if work.is_completed():
            try:
                work.wait()  # NB: perhaps it is done just now, and well
                return
            except RuntimeError as e:
                error, failed = e, True
        for check in interrupt:
            check(error if failed else None)
        if failed:
            raise error


class DistComm:
    """torch.distributed: NCCL for CUDA tensors, gloo for CPU ones; a gloo group takes CUDA tensors through host memory."""

    made: ClassVar[weakref.WeakSet[DistComm]] = weakref.WeakSet()  # all there are, to let go of their groups when the run ends

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group if group is not None else dist.group.WORLD
        self.made.add(self)
        self.staged = dist.get_backend(self.group) == "gloo"
        self._ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

    def _run(self, collective: Callable[..., dist.Work | None], *args: Any, **kwargs: Any) -> None:
        if self.staged:
            wait(collective(*args, group=self.group, async_op=True, **kwargs))
        else:
            collective(*args, group=self.group, **kwargs)

    def _host(self, t: torch.Tensor) -> torch.Tensor:
        return t.cpu() if self.staged and t.is_cuda else t

    def all_reduce_(self, t: torch.Tensor, op: str) -> None:
        here = self._host(t)
        self._run(dist.all_reduce, here, self._ops[op])
        if here is not t:
            t.copy_(here)

    def all_gather_into(self, stacked: torch.Tensor, t: torch.Tensor) -> None:
        out = torch.empty_like(stacked, device="cpu") if self.staged and t.is_cuda else stacked
        # NB: flat, here and below: NCCL takes stacked or concatenated, gloo the one or the other.
        self._run(dist.all_gather_into_tensor, out.view(-1), self._host(t).view(-1))
        if out is not stacked:
            stacked.copy_(out)

    def reduce_scatter_into(self, t: torch.Tensor, stacked: torch.Tensor) -> None:
        if not self.staged:
            self._run(dist.reduce_scatter_tensor, t.view(-1), stacked.view(-1))
            return
        # NB: gloo's own is an all-reduce inside, and waits for a lost rank for ever.
        here = self._host(stacked)
        parts = torch.empty_like(here)
        self._run(dist.all_to_all_single, parts.view(-1), here.view(-1))
        t.copy_(parts.sum(0, dtype=t.dtype))

    def all_to_all_into(self, out: torch.Tensor, stacked: torch.Tensor) -> None:
        here = torch.empty_like(out, device="cpu") if self.staged and out.is_cuda else out
        self._run(dist.all_to_all_single, here.view(-1), self._host(stacked).view(-1))
        if here is not out:
            out.copy_(here)

    def broadcast_(self, t: torch.Tensor, src: int) -> None:
        here = self._host(t)
        self._run(dist.broadcast, here, group_src=src)
        if here is not t:
            t.copy_(here)
