"""softmax and log_softmax over a dim that is split between ranks.
Must not know the backward of communication: the sum over ranks is a conversion of collectives.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autopar.runtime.collectives import p_to_r
from autopar.runtime.shards import Axes, axes_of, total


def _shift(x: Tensor, dim: int, axes: Axes) -> tuple[Tensor, Tensor]:
    """x minus the maximum over all ranks, and the sum of its exponentials over all ranks (type R)."""
    shifted = x - total(x.detach().amax(dim, keepdim=True), axes, "max")
    s = shifted.exp().sum(dim, keepdim=True)
    for axis in axes_of(axes):
        s = p_to_r(s, axis)
    return shifted, s


def softmax(x: Tensor, dim: int, axes: Axes, dtype: torch.dtype | None = None) -> Tensor:
    x, out = widened(x, dtype)
    shifted, s = _shift(x, dim, axes)
    return (shifted.exp() / s).to(out)


def log_softmax(x: Tensor, dim: int, axes: Axes, dtype: torch.dtype | None = None) -> Tensor:
    x, out = widened(x, dtype)
    shifted, s = _shift(x, dim, axes)
    return (shifted - s.log()).to(out)


def widened(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, torch.dtype]:
    """x as float32 if it is half precision (as torch computes inside), and the dtype torch would return."""
    if dtype is not None:
        x = x.to(dtype)
    if x.dtype not in (torch.float16, torch.bfloat16):
        return x, x.dtype
    kind = x.device.type
    wide = dtype is None and torch.is_autocast_enabled(kind)  # these ops are in autocast's float32 list
    return x.float(), torch.float32 if wide else x.dtype
