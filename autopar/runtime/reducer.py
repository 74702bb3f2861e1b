"""Sums gradients over groups of ranks in buckets, synchronously.
Must not know why a parameter belongs to a group (module.py): it is handed parameters and joint axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from autopar.errors import LayoutError
from autopar.runtime.axis import Axis

BUCKET_MB = 25.0


@dataclass
class Bucket:
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
        self.buckets: list[Bucket] = []

    def _layout(self) -> list[Bucket]:
        """Fill buckets in parameter order up to the cap; a parameter above it has one of its own."""
        trained = tuple(p.requires_grad for _, p, _ in self.items)
        if trained == self._trained:
            return self.buckets
        open_: dict[tuple, Bucket] = {}
        self.buckets, self._trained = [], trained
        for name, p, axis in self.items:
            if not p.requires_grad:
                continue
            key = (axis.name, p.dtype, p.device)
            cap = int(self.bucket_mb * 2**20 / p.dtype.itemsize)
            bucket = open_.get(key)
            if bucket is None or bucket.numel + p.numel() > cap:
                bucket = Bucket(axis)
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
    def _sum(bucket: Bucket) -> None:
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
