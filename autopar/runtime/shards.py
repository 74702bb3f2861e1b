"""Where a rank's shard lies in the whole tensor, for one dim split by one or more axes.
Must not know ops; the axes of one dim are given outermost first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from autopar.runtime.axis import Axis

Axes = Any  # an Axis, or a tuple of them, outermost first
Shards = Any  # tuple of (dim, axis) or (dim, axis, groups)


def axes_of(axes: Axes) -> tuple[Axis, ...]:
    return tuple(axes) if isinstance(axes, (tuple, list)) else (axes,)


def position(axes: Axes) -> tuple[int, int]:
    """(index of this rank's slice, number of slices) of a dim split by the axes."""
    index, count = 0, 1
    for axis in axes_of(axes):
        index, count = index * axis.size + axis.rank, count * axis.size
    return index, count


def whole_shape(shape: tuple[int, ...] | torch.Size, shards: Shards) -> tuple[int, ...]:
    """The global shape of a tensor whose local shape is given."""
    out = list(shape)
    for dim, axis, *_ in shards:
        out[dim] *= axis.size
    return tuple(out)


def take(x: Tensor, shards: Shards) -> Tensor:
    """This rank's shard of a whole tensor; dims of size 1 (broadcast) stay."""
    for dim, axis, *rest in shards:
        groups = rest[0] if rest else 1
        if x.size(dim) == 1:
            continue
        inside = x.unflatten(dim, (groups, -1))
        x = inside.chunk(axis.size, dim + 1)[axis.rank].flatten(dim, dim + 1)
    return x


def total(x: Tensor, axes: Axes, op: str = "sum") -> Tensor:
    """A reduction of a tensor without gradient over the axes."""
    x = x.detach()
    for axis in axes_of(axes):
        if axis.size > 1:
            x = axis.all_reduce(x, op)
    return x
