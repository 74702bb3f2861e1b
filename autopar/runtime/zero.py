"""ZeRO: of each bucket's parameters, back to back in one flat buffer, every rank updates one contiguous range.
Must not know when gradients are reduced (reducer.py) nor when parameters are gathered before use (zero3.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autopar.errors import ConfigError, LayoutError
from autopar.runtime import pending
from autopar.runtime.axis import Axis
from autopar.runtime.buckets import Bucket, Piece, ranks_of
from autopar.runtime.pending import Pending


class Splitter:
    """The groups in which parameters are sharded, `ngroups` along each reduce axis. NB: collective, like the making of any group."""

    def __init__(self, ngroups: int):
        self.ngroups = ngroups
        self._done: dict[tuple[tuple[int, ...], bool], tuple[Axis, Axis, Axis | None]] = {}

    def __call__(self, bucket: Bucket, axis: Axis, *, own: bool) -> tuple[Axis, Axis, Axis | None]:
        """(ranks among which parameters are sharded, the same for gradients, those with the same range in the other groups).

        own: gradients have a channel of their own, as bucket.axis has. Raises ConfigError where ngroups does not divide the axis.
        """
        mesh = bucket.items[0].mesh
        if self.ngroups == 1:
            return axis, bucket.axis, None
        if self.ngroups < 1 or axis.size % self.ngroups or mesh is None:
            divisors = ", ".join(str(n) for n in range(1, axis.size + 1) if axis.size % n == 0)
            raise ConfigError(
                f"zero_ngroups={self.ngroups} does not divide the {axis.size} ranks over which the gradient of {bucket.items[-1].name} "
                f"is summed (mesh axes {axis.name}); use one of {divisors}"
            )
        key = ranks_of(axis), own
        if key not in self._done:
            inside, across = pending.split_groups(pending.groups_of(axis, mesh), self.ngroups)
            inner = pending.connect(f"{axis.name}/{self.ngroups}", inside, mesh)
            sender = pending.own_channel(inner, inside) if own else inner
            self._done[key] = inner, sender, pending.connect(f"{axis.name}/{self.ngroups} across", across, mesh)
        return self._done[key]


class Shard:
    """This rank's range [start, stop) of a bucket, and the parameters of the whole bucket as views into one buffer.

    pieces are the parameters that the optimizer gets. gathered=False: the whole buffer exists only between gather() and free().
    """

    def __init__(
        self,
        bucket: Bucket,
        inner: Axis,
        sender: Axis,
        across: Axis | None,
        *,
        scatter: bool,
        gathered: bool = True,
        scratch: pending.Scratch | None = None,
    ):
        self.bucket, self.inner, self.sender, self.across = bucket, inner, sender, across
        self.scatter, self.gathered = scatter, gathered
        self.scratch = scratch  # NB: not with ZeRO-3, which is there to save memory
        bucket.shards = inner.size
        n = bucket.padded // inner.size
        self.start, self.stop = inner.rank * n, (inner.rank + 1) * n
        like = bucket.items[0].param
        with torch.no_grad():
            self.flat = torch.zeros(bucket.padded, dtype=like.dtype, device=like.device)
            spans = list(bucket.spans())
            self.views = [self.flat[a:b].view(shape) for (_, a, b), shape in zip(spans, bucket.shapes, strict=True)]
            for (item, _, _), view in zip(spans, self.views, strict=True):
                view.copy_(item.param)
                item.param.data = view
            mine = self.flat[self.start : self.stop]
            self.mine = mine if gathered else mine.clone()
        self.out: Tensor | None = None  # reduce-scattered gradients
        self.pieces: list[Piece] = []
        self._places: list[tuple[int, slice]] = []  # of each piece: which item of the bucket, and where in [start, stop)
        for i, (item, a, b) in enumerate(spans):
            lo, hi = max(a, self.start), min(b, self.stop)
            if lo < hi:
                place = slice(lo - self.start, hi - self.start)
                self.pieces.append(Piece(item.name, lo - a, hi - a, nn.Parameter(self.mine[place]), bucket.shapes[i]))
                self._places.append((i, place))
        self._whole = self.flat.untyped_storage().nbytes()
        self._empty = torch.empty(0, dtype=like.dtype, device=like.device)
        self._gather: Pending | None = None
        self.full = True

    # -- gradients

    def send(self) -> Pending:
        """Start the reduction of the bucket's gradients."""
        b = self.bucket
        if not self.scatter:
            return pending.all_reduce(b.axis, b.flat)
        if self.gathered:
            self.out = b.grads[self.start : self.stop]
        elif self.out is None:
            self.out = torch.empty(self.stop - self.start, dtype=b.flat.dtype, device=b.flat.device)
        return pending.reduce_scatter(self.sender, self.out, b.grads, self.scratch if self.gathered else None)

    def receive(self) -> Tensor:
        """Once it is over: the summed gradients of this rank's range."""
        if not self.scatter:
            return self.bucket.grads[self.start : self.stop]
        if self.across is not None:
            self.across.all_reduce_(self.out)
        return self.out

    def give(self, grads: Tensor) -> None:
        """Put gradients on the pieces; the whole parameters keep none, theirs are not complete. None where no rank has one."""
        used = self.bucket.used()
        for piece, (i, place) in zip(self.pieces, self._places, strict=True):
            piece.param.grad = grads[place] if used[i] else None
        for item in self.bucket.items:
            item.param.grad = None

    # -- parameters

    def publish(self) -> Pending:
        """Start bringing all ranges to all ranks."""
        for item, view in zip(self.bucket.items, self.views, strict=True):
            if item.param.data_ptr() != view.data_ptr():
                raise LayoutError(
                    f"the memory of {item.name} was replaced after the optimizer was built; move, cast and load the module before that"
                )
        return pending.all_gather(self.inner, self.flat, self.mine)

    def start_gather(self) -> None:
        """Begin to bring the whole parameters here, if they are not."""
        if not self.full:
            self.flat.untyped_storage().resize_(self._whole)
            self._gather = pending.all_gather(self.inner, self.flat, self.mine)
            self.full = True

    def gather(self) -> None:
        """Have the whole parameters here."""
        self.start_gather()
        if self._gather is not None:
            self._gather.wait()
            self._gather = None
            for item, view in zip(self.bucket.items, self.views, strict=True):
                item.param.data = view

    def free(self) -> None:
        """Give the memory of the whole parameters back.

        NB: the storage shrinks and grows again, so that what autograd saved of the parameters is there again in the backward.
        """
        if self.full:
            if self._gather is not None:
                self._gather.wait()
                self._gather = None
            for item in self.bucket.items:
                item.param.data = self._empty  # NB: to read it now is an error about its shape; a view without memory would crash
            self.flat.untyped_storage().resize_(0)
            self.full = False
