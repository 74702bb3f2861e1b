"""What the gradient reducer is made of: the parameters it looks after, the pieces an optimizer updates, and flat buckets of gradients.
Must not know when a bucket is reduced (reducer.py) nor who updates what (zero.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.errors import ConfigError, LayoutError
from autopar.runtime.axis import Axis
from autopar.runtime.mesh import UNITS, RankMesh
from autopar.runtime.pending import Pending


@dataclass(frozen=True)
class Item:
    """One parameter the reducer looks after."""

    name: str  # original qualified name in the whole user module
    param: nn.Parameter  # the local parameter
    axis: Axis | None  # the joint axis its gradient is summed over; None: nothing to sum
    block: str = ""  # path of the Block instance that declares it; "" for parameters of ordinary modules
    mesh: RankMesh | None = None
    held: tuple[str, ...] = ()  # mesh axes along which the ranks hold the same local parameter, 'units' among them


@dataclass(frozen=True)
class Piece:
    """What an optimizer updates: entries [start, stop) of the flattened local parameter."""

    name: str
    start: int
    stop: int
    param: nn.Parameter  # the parameter itself, or with ZeRO a 1-D parameter of these entries
    whole_shape: torch.Size  # of the local parameter


def collect_items(module: nn.Module, mesh: RankMesh | None = None) -> list[Item]:
    """Every trained parameter of a module with ParallelModules inside, once, in the order of named_parameters. NB: collective.

    Parameters outside of parallel modules are the same on all ranks of a scale unit, and are summed over the units. A module with no
    parallel module inside needs a mesh, or each process is a unit. Raises ConfigError where parallel modules differ in size.
    """
    from autopar.runtime.groups import rank_mesh
    from autopar.runtime.module import Block, ParallelModule

    parts = [(path, m) for path, m in module.named_modules() if isinstance(m, ParallelModule)]
    sizes = {m.mesh.unit_size: path for path, m in parts}
    if len(sizes) > 1:
        (a, first), (b, second) = list(sizes.items())[:2]
        raise ConfigError(
            f"parallel module {first!r} was compiled for plan_ngpus={a}, {second!r} for plan_ngpus={b}; "
            f"all parallel modules of a model need the same"
        )
    mesh = parts[0][1].mesh if parts else mesh or rank_mesh((("device", 1),))
    joint = mesh.replicas if mesh.units > 1 else None
    known: dict[int, Item] = {}
    for path, m in parts:
        prefix = path + "." if path else ""
        placements, axes = m.named_placements(), m.reduce_axes()
        owner = {p + name: (prefix + p).rstrip(".") for p, block in m._blocks() for name in block._declared}
        # NB: in the order of their sets, so that all ranks create their groups alike.
        joined = {names: m.mesh.join(names) for names in sorted(set(axes.values())) if names}
        for name, names in axes.items():
            p, types = m.get_parameter(name), placements[name].types
            held = (UNITS, *(n for n, t in zip(m.mesh.names, types, strict=True) if t in ("R", "I")))
            known[id(p)] = Item(prefix + name, p, joined.get(names), owner[name], m.mesh, held)
    out = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            inside = next((path for path, m in parts if isinstance(m, Block) and name.startswith(path + ".")), "")
            out.append(known.get(id(p)) or Item(name, p, joint, inside, mesh, (UNITS, *mesh.names)))
    return out


def ranks_of(axis: Axis) -> tuple[int, ...]:
    """The world ranks along an axis."""
    if axis.comm is None:
        return (axis.world_rank,)
    group = axis.comm.group
    return group if isinstance(group, tuple) else tuple(dist.get_process_group_ranks(group))


@dataclass(eq=False)
class Bucket:
    """Parameters of one dtype and device whose gradients travel together, back to back in one flat buffer."""

    axis: Axis
    block: str = ""
    items: list[Item] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=dict)  # id of a parameter -> its index among items
    shapes: list[torch.Size] = field(default_factory=list)  # NB: a parameter that is freed (zero3.py) has none itself
    numel: int = 0
    shards: int = 1  # the buffer is padded to a multiple of this
    state: str = "open"  # 'open' | 'ready' (all gradients have arrived, others go first) | 'launched'
    stale: set[int] = field(default_factory=set)  # places of those items whose gradients are of a step that is over
    taken: set[int] = field(default_factory=set)  # places of those items whose gradients are in the buffer only
    pending: Pending | None = None
    arrived: set[int] = field(default_factory=set)  # ids of parameters that have a gradient since the last backward began
    have: list[bool] = field(default_factory=list)  # of this step: does this rank have a gradient?
    totals: list[float] | None = None  # how many ranks have one; read where this rank lacks one
    flat: Tensor | None = None  # gradients, padding, and one count per parameter; made when first needed
    views: list[Tensor] = field(default_factory=list)  # of flat, shaped like the parameters

    def add(self, item: Item) -> None:
        self.place[id(item.param)] = len(self.items)
        self.items.append(item)
        self.shapes.append(item.param.shape)
        self.numel += item.param.numel()

    @property
    def padded(self) -> int:
        return -(-self.numel // self.shards) * self.shards

    @property
    def grads(self) -> Tensor:
        """The gradients, and padding."""
        return self.flat[: self.padded]

    @property
    def counts(self) -> Tensor:
        """Per parameter, the number of ranks that have a gradient."""
        return self.flat[self.padded :]

    def spans(self) -> Iterator[tuple[Item, int, int]]:
        """(item, start, stop) of each parameter in the flat buffer."""
        at = 0
        for item, shape in zip(self.items, self.shapes, strict=True):
            yield item, at, at + shape.numel()
            at += shape.numel()

    def _allocate(self) -> None:
        like = self.items[0].param
        self.flat = torch.empty(self.padded + len(self.items), dtype=like.dtype, device=like.device)
        self.flat[self.numel : self.padded].zero_()
        self.views = [self.flat[a:b].view(shape) for (_, a, b), shape in zip(self.spans(), self.shapes, strict=True)]

    def take(self, i: int, *, keep: bool = True) -> None:
        """Bring one gradient into the buffer and let .grad be its view, so that accumulation goes on in place.

        keep=False: let .grad be None instead. NB: as soon as it is there, while it is in the cache, and its memory serves the next one.
        """
        if self.flat is None:
            self._allocate()
        param, view = self.items[i].param, self.views[i]
        g = param.grad
        if g is None:
            return
        if g is view:
            if i in self.stale:
                raise LayoutError(
                    f"gradients of the step before are still there (of {self.items[-1].name} ...); call zero_grad() after each step"
                )
            return
        if g.layout != torch.strided:
            raise LayoutError(f"the gradient of {self.items[i].name} is sparse; only dense gradients can be summed (use sparse=False)")
        with torch.no_grad():
            if i in self.taken:
                view.add_(g)
            else:
                view.copy_(g)
        self.stale.discard(i)
        if keep:
            param.grad = view
        else:
            param.grad = None
            self.taken.add(i)

    @torch.no_grad()
    def fill(self, *, keep: bool = True) -> None:
        """The buffer as it is sent: gradients, zeros for those that this rank lacks, and the counts."""
        for i in range(len(self.items)):
            self.take(i, keep=keep)
        self.have, self.totals = [n in self.taken or i.param.grad is not None for n, i in enumerate(self.items)], None
        self.taken.clear()
        if all(self.have):
            self.counts.fill_(1)
        else:
            self.counts.copy_(torch.tensor(self.have, dtype=self.flat.dtype))
            torch._foreach_zero_([v for v, h in zip(self.views, self.have, strict=True) if not h])

    def forget(self, *, sent: bool = False) -> None:
        """The gradients there are belong to no step any more; sent: they must not be added to."""
        self.state = "open"
        self.stale = set(range(len(self.items))) if sent else set()
        self.taken.clear()

    def used(self) -> list[bool]:
        """After the reduction: does any rank have a gradient? NB: reads from the device, only where this rank lacks one."""
        if all(self.have):
            return self.have
        if self.totals is None:
            self.totals = self.counts.tolist()
        return [h or t > 0 for h, t in zip(self.have, self.totals, strict=True)]


def make_buckets(items: Sequence[Item], cap_mb: float, *, per_block: bool = False) -> list[Bucket]:
    """Buckets in backward order: the last parameter first. A parameter above the cap has a bucket of its own.

    The layout depends on the items alone, so ranks agree on it without asking.
    """
    open_: dict[tuple, Bucket] = {}
    out: list[Bucket] = []
    for item in reversed(items):
        p = item.param
        key = (ranks_of(item.axis), p.dtype, p.device, item.block if per_block else "")
        cap = cap_mb * 2**20 / p.dtype.itemsize
        bucket = open_.get(key)
        if bucket is None or bucket.numel + p.numel() > cap:
            bucket = Bucket(item.axis, block=item.block if per_block else "")
            out.append(bucket)
            if p.numel() <= cap:
                open_[key] = bucket
        bucket.add(item)
    return out
