"""Reducer sums gradients over groups of ranks in buckets, at once; GradReducer does it for an optimizer: overlapped, sharded.
Must not know why a parameter belongs to a group (module.py): both are handed parameters and joint axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from autopar.errors import ConfigError, LayoutError
from autopar.runtime.axis import Axis
from autopar.runtime.buckets import Bucket, Item, Piece, make_buckets

BUCKET_MB = 25.0
Hook = Callable[["GradReducer", Tensor], None]


@dataclass
class _Sum:
    """Parameters whose gradients travel together: the same ranks, dtype and device."""

    axis: Axis
    items: list[tuple[str, torch.nn.Parameter]] = field(default_factory=list)
    numel: int = 0


class Reducer:
    """Sums the gradients of (name, parameter, axis) over their axes, in place.

    The layout of the buckets depends on the parameters alone, so ranks agree on it without asking: a missing gradient travels as zeros, and
    one number per parameter counts the ranks that have one. Nobody has one: it stays None. Somebody has: all get the sum.
    Frozen parameters take no part. Raises LayoutError for a sparse gradient.
    """

    def __init__(self, items: Sequence[tuple[str, torch.nn.Parameter, Axis]], bucket_mb: float = BUCKET_MB):
        self.items = [(name, p, axis) for name, p, axis in items if axis.size > 1]
        self.bucket_mb = bucket_mb
        self._trained: tuple[bool, ...] | None = None
        self.buckets: list[_Sum] = []

    def _layout(self) -> list[_Sum]:
        """Fill buckets in parameter order up to the cap; a parameter above it has one of its own."""
        trained = tuple(p.requires_grad for _, p, _ in self.items)
        if trained == self._trained:
            return self.buckets
        open_: dict[tuple, _Sum] = {}
        self.buckets, self._trained = [], trained
        for name, p, axis in self.items:
            if not p.requires_grad:
                continue
            key = (axis.name, p.dtype, p.device)
            cap = int(self.bucket_mb * 2**20 / p.dtype.itemsize)
            bucket = open_.get(key)
            if bucket is None or bucket.numel + p.numel() > cap:
                bucket = _Sum(axis)
                self.buckets.append(bucket)
                if p.numel() <= cap:
                    open_[key] = bucket
            bucket.items.append((name, p))
            bucket.numel += p.numel()
        return self.buckets

    @torch.no_grad()
    def reduce(self) -> None:
        """Call on all ranks. NB: sums; a mean over replicas is the caller's division."""
        buckets = self._layout()
        for bucket in buckets:
            for name, p in bucket.items:
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise LayoutError(f"the gradient of {name} is sparse; only dense gradients can be summed (use sparse=False)")
        for bucket in buckets:
            self._sum(bucket)

    @staticmethod
    def _sum(bucket: _Sum) -> None:
        params = [p for _, p in bucket.items]
        like = params[0]
        flat = torch.empty(bucket.numel + len(params), dtype=like.dtype, device=like.device)
        views = [v.view(p.shape) for v, p in zip(flat.split([*(p.numel() for p in params), len(params)]), params, strict=False)]
        counts = flat[bucket.numel :]
        have = [p.grad is not None for p in params]
        if all(have):
            counts.fill_(1)
        else:
            counts.copy_(torch.tensor(have, dtype=like.dtype))
        mine = [(p.grad, v) for p, v in zip(params, views, strict=False) if p.grad is not None]
        grads, places = [g for g, _ in mine], [v for _, v in mine]
        if mine:
            torch._foreach_copy_(places, grads)
        if not all(have):
            torch._foreach_zero_([v for v, h in zip(views, have, strict=False) if not h])
        bucket.axis.all_reduce_(flat)
        if mine:
            torch._foreach_copy_(grads, places)
        if not all(have):  # NB: reads from the device, so only where it is needed
            for p, v, h, total in zip(params, views, have, counts.tolist(), strict=False):
                if not h and total:
                    p.grad = v.clone()


class GradReducer:
    """Sums the gradients of a module's parameters over their axes for an optimizer that updates `pieces`.

    One reduction per parameter per optimizer step: all micro batches but the last run inside accumulate(), and reduce() follows
    the last backward.
    use_async: buckets leave while the last backward still runs.
    """

    def __init__(
        self,
        module: nn.Module,
        items: Sequence[Item],
        *,
        zero: int = 0,
        zero_ngroups: int = 1,
        use_reduce_scatter: bool = False,
        use_async: bool = False,
        bucket_mb: float = BUCKET_MB,
    ):
        if zero:
            raise ConfigError("ZeRO is not built yet")
        self.module, self.items = module, tuple(items)
        self.buckets = make_buckets([i for i in self.items if i.axis is not None and i.axis.size > 1], bucket_mb)
        self.pieces = tuple(Piece(i.name, 0, i.param.numel(), i.param, i.param.shape) for i in self.items)
        self._item = {i.name: i for i in self.items}
        self._accumulating = False
        self._pre: list[Hook] = []
        self._post: list[Hook] = []

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Inside, a backward only accumulates: for all micro batches of a step but the last."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def register_pre_hook(self, fn: Hook) -> None:
        """fn(reducer, flat gradients of a bucket) before each bucket is reduced."""
        self._pre.append(fn)

    def register_post_hook(self, fn: Hook) -> None:
        """fn(reducer, flat gradients of a bucket) after each bucket has been reduced."""
        self._post.append(fn)

    @torch.no_grad()
    def reduce(self) -> None:
        """After the last backward of a step, on all ranks: sum what has not been summed yet, and put gradients on the pieces."""
        for b in self.buckets:
            if b.state == "reduced" and any(i.param.grad is v for i, v in zip(b.items, b.views, strict=True)):
                raise LayoutError("gradients are reduced a second time in the same step; call zero_grad() after each step")
            self._launch(b)
        for b in self.buckets:
            self._finish(b)

    def _launch(self, b: Bucket) -> None:
        b.fill()
        for fn in self._pre:
            fn(self, b.grads)
        b.axis.all_reduce_(b.flat)
        b.state = "launched"

    def _finish(self, b: Bucket) -> None:
        for fn in self._post:
            fn(self, b.grads)
        if not all(b.have):  # NB: reads from the device, so only where it is needed
            for item, view, have, total in zip(b.items, b.views, b.have, b.counts.tolist(), strict=True):
                if not have and total:
                    item.param.grad = view
        b.state = "reduced"

    def publish(self) -> None:
        """After the optimizer's step: bring updated pieces to all who hold the parameter. Nothing to do without ZeRO."""

    def zero_grad(self) -> None:
        """Forget all gradients; the buckets stay."""
        for i in self.items:
            i.param.grad = None
        for b in self.buckets:
            b.state = "open"

    def replicas(self, piece: Piece) -> Axis | None:
        """The ranks that hold the same piece, for counting it once (.size, .rank; it carries no messages). None: only this rank."""
        item = self._item[piece.name]
        if item.mesh is None:
            return item.axis
        ranks = next(g for g in item.mesh.groups(item.held) if item.mesh.rank in g)
        return Axis("+".join(item.held), len(ranks), ranks.index(item.mesh.rank), _NO_COMM, item.mesh.rank) if len(ranks) > 1 else None


_NO_COMM = object()
