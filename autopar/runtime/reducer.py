"""Reducer sums gradients over groups of ranks in buckets, at once; GradReducer does it for an optimizer: overlapped, sharded.
Must not know why a parameter belongs to a group (module.py): both are handed parameters and joint axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from autopar.errors import ConfigError, LayoutError
from autopar.runtime.axis import Axis
from autopar.runtime.buckets import Bucket, Item, Piece, make_buckets, ranks_of
from autopar.runtime.pending import Scratch, all_reduce, groups_of, overlaps, own_channel
from autopar.runtime.zero import Shard, Splitter
from autopar.runtime.zero3 import Gatherer

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
    """Sums the gradients of a module's parameters over their axes for an optimizer that updates `pieces`. NB: collective.

    One reduction per parameter per optimizer step: all micro batches but the last run inside accumulate(), and reduce() follows
    the last backward. use_async: buckets leave while the last backward still runs.
    zero=1: each rank updates its own range of every bucket (zero.py); reduce() leaves the gradients of that, publish() brings it to all.
    zero=3: and the parameters of parallel modules are whole only while a block needs them (zero3.py); their gradients always leave early.
    Raises ConfigError where zero_ngroups does not divide the ranks of a reduction.
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
        if zero not in (0, 1, 3):
            raise ConfigError(f"zero={zero!r} is not known; use 0, 1 or 3")
        self.module, self.items = module, tuple(items)
        self._item = {i.name: i for i in self.items}
        self._accumulating = False
        self._pre: list[Hook] = []
        self._post: list[Hook] = []
        self._next = 0  # buckets before this one have left; the order is the same on all ranks
        self._scratch = Scratch()

        summed = [i for i in self.items if i.axis is not None and i.axis.size > 1 and i.param.numel()]
        freed = [i for i in summed if zero == 3 and _in_block(module, i)]
        late, order = {id(i) for i in freed}, {id(i): n for n, i in enumerate(summed)}
        kept = [i for i in summed if id(i) not in late]
        self.buckets = make_buckets(freed, float("inf"), per_block=True) + make_buckets(kept, bucket_mb)
        self.buckets.sort(key=lambda b: -min(order[id(i)] for i in b.items))  # as they get complete
        self._early = (use_async or bool(freed)) and all(overlaps(b.axis, b.items[0].param.device) for b in self.buckets)
        axes = {b: b.axis for b in self.buckets}
        if self._early:
            self._separate()

        self.shards: dict[Bucket, Shard] = {}
        if zero:
            split, scratch = Splitter(zero_ngroups), self._scratch
            for b in self.buckets:
                whole = id(b.items[0]) not in late
                how = {"scatter": use_reduce_scatter or not whole, "gathered": whole, "scratch": scratch}
                self.shards[b] = Shard(b, *split(b, axes[b], own=self._early), **how)
        self.gatherer = Gatherer(module, [s for s in self.shards.values() if not s.gathered]) if freed else None

        self._shard_of = {i.name: s for b, s in self.shards.items() for i in b.items}
        pieces = {i.name: [Piece(i.name, 0, i.param.numel(), i.param, i.param.shape)] for i in self.items if not zero or id(i) not in order}
        for s in self.shards.values():
            for piece in s.pieces:
                pieces.setdefault(piece.name, []).append(piece)
        self.pieces = tuple(p for i in self.items for p in pieces.get(i.name, ()))
        for index, b in enumerate(self.buckets):
            for i in b.items:
                i.param.register_post_accumulate_grad_hook(partial(self._arrived, index, b))

    def _separate(self) -> None:
        """What leaves in a backward goes over a process group of its own: a rank that lacks a gradient sends later than others."""
        own: dict[tuple[int, ...], Axis] = {}
        for b in self.buckets:
            ranks = ranks_of(b.axis)
            mesh = b.items[0].mesh
            if ranks not in own:
                own[ranks] = own_channel(b.axis, groups_of(b.axis, mesh)) if mesh is not None else b.axis
            b.axis = own[ranks]

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Inside, a backward only accumulates: for all micro batches of a step but the last."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before
            for b in self.buckets:
                b.arrived.clear()

    def register_pre_hook(self, fn: Hook) -> None:
        """fn(reducer, flat gradients of a bucket) before each bucket is reduced."""
        self._pre.append(fn)

    def register_post_hook(self, fn: Hook) -> None:
        """fn(reducer, flat gradients of a bucket) after each bucket has been reduced; with reduce-scatter, of this rank's range."""
        self._post.append(fn)

    # -- while a backward runs

    def _arrived(self, index: int, b: Bucket, p: Tensor) -> None:
        """The gradient of one parameter is complete, as far as this backward goes."""
        if b.state == "launched":
            raise LayoutError(
                f"a backward came after the gradients of bucket {index} ({b.items[-1].name} ...) were sent; "
                f"run all backwards of a step but the last inside accumulate()"
            )
        shard = self.shards.get(b)
        freed = shard is not None and not shard.gathered
        if not freed:
            b.take(b.place[id(p)])
        elif not self._accumulating:
            b.take(b.place[id(p)], keep=False)
        b.arrived.add(id(p))
        if len(b.arrived) < len(b.items):
            return
        b.arrived.clear()
        if not self._accumulating and self._early:
            b.state = "ready"
            while self._next < len(self.buckets) and self.buckets[self._next].state == "ready":
                self._launch(self.buckets[self._next])
        if freed:
            self.gatherer.release(shard)

    # -- a step

    @torch.no_grad()
    def reduce(self) -> None:
        """After the last backward of a step, on all ranks: sum what has not been summed yet, and put gradients on the pieces."""
        for last, b in zip([None, None, *self.buckets], self.buckets, strict=False):
            if b.state != "launched":
                self._launch(b)
            if last is not None:
                self._receive(last)  # so that no more than two of those that leave now are under way
        totals = self._count_scattered()
        for b in self.buckets:
            self._receive(b)
            b.totals = totals.get(b)
            self._finish(b)
        self._next = 0
        self._scratch.clear()

    @torch.no_grad()
    def _launch(self, b: Bucket) -> None:
        shard = self.shards.get(b)
        if shard is not None and any(p.param.grad is not None for p in shard.pieces):
            raise LayoutError("gradients of the step before are still there; call zero_grad() after each step")
        b.fill(keep=shard is None or shard.gathered)
        for fn in self._pre:
            fn(self, b.grads)
        b.pending = all_reduce(b.axis, b.flat) if shard is None else shard.send()
        b.state = "launched"
        self._next += 1
        if shard is not None and not shard.gathered:
            self._free_sent()

    def _free_sent(self) -> None:
        """Give memory of gradients that have arrived back. NB: never waits: another rank may be behind, and wait for this one."""
        for b, shard in self.shards.items():
            if not shard.gathered and b.state == "launched" and b.pending is not None and b.pending.done:
                self._receive(b)

    def _receive(self, b: Bucket) -> None:
        shard = self.shards.get(b)
        if b.pending is not None:
            b.pending.wait()
            b.pending = None
            if shard is not None and not shard.gathered:
                b.flat, b.views = None, []

    def _count_scattered(self) -> dict[Bucket, list[int]]:
        """For buckets that are reduce-scattered, how many ranks have each gradient: one small message per group of ranks."""
        groups: dict[tuple[int, ...], list[Bucket]] = {}
        for b, shard in self.shards.items():
            if shard.scatter:
                groups.setdefault(ranks_of(b.axis), []).append(b)
        out: dict[Bucket, list[int]] = {}
        for buckets in groups.values():
            have = [h for b in buckets for h in b.have]
            counts = torch.tensor(have, dtype=torch.int32, device=buckets[0].items[0].param.device)
            buckets[0].axis.all_reduce_(counts)
            if not all(have):
                for b, part in zip(buckets, counts.split([len(b.items) for b in buckets]), strict=True):
                    out[b] = part.tolist()
        return out

    def _finish(self, b: Bucket) -> None:
        shard = self.shards.get(b)
        grads = b.grads if shard is None else shard.receive()
        for fn in self._post:
            fn(self, grads)
        if shard is not None:
            shard.give(grads)
        elif not all(b.have):
            for item, view, have, used in zip(b.items, b.views, b.have, b.used(), strict=True):
                if used and not have:
                    item.param.grad = view
        b.forget(sent=shard is None)

    def publish(self) -> None:
        """After the optimizer's step: bring updated pieces to all who hold the parameter. Nothing to do without ZeRO."""
        for p in [s.publish() for s in self.shards.values() if s.gathered]:
            p.wait()

    def zero_grad(self) -> None:
        """Forget all gradients; the buckets stay."""
        for b in self.buckets:
            self._receive(b)
            b.forget()
            b.arrived.clear()
        self._next = 0
        for p in self.pieces:
            p.param.grad = None
        for s in self.shards.values():
            if not s.gathered:
                s.out = None
        for i in self.items:
            i.param.grad = None

    def replicas(self, piece: Piece) -> Axis | None:
        """The ranks that hold the same piece, for counting it once (.size, .rank; it carries no messages). None: only this rank."""
        item = self._item[piece.name]
        shard = self._shard_of.get(piece.name)
        if item.mesh is None:
            return item.axis if shard is None else shard.across
        ranks = next(g for g in item.mesh.groups(item.held) if item.mesh.rank in g)
        if shard is not None:
            place = {r: g.index(r) % shard.inner.size for g in groups_of(item.axis, item.mesh) for r in g}
            ranks = tuple(r for r in ranks if place[r] == place[item.mesh.rank])
        return Axis("+".join(item.held), len(ranks), ranks.index(item.mesh.rank), _NO_COMM, item.mesh.rank) if len(ranks) > 1 else None


def _in_block(module: nn.Module, item: Item) -> bool:
    from autopar.runtime.module import Block

    return isinstance(module.get_submodule(item.block), Block)


_NO_COMM = object()
