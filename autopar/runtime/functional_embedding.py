"""Embedding with the vocabulary split: each rank looks up the rows it holds, the result is a partial sum.
Must not know how the result is reduced: generated code converts it where it needs to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.runtime.shards import Axes, position


def check_indices(ids: Tensor, size: int, what: str) -> None:
    """Refuse indices that the whole op would refuse; a shard on its own could not tell them from another rank's."""
    if ids.device.type == "meta" or ids.numel() == 0:
        return
    bad = (ids < 0) | (ids >= size)
    if ids.device.type == "cpu":
        if bad.any():
            raise IndexError(f"{what}: index {int(ids[bad][0])} is out of range for size {size}")
    else:
        torch._assert_async(~bad.any(), f"{what}: an index is out of range for size {size}")


def vocab_embedding(ids: Tensor, weight: Tensor, axes: Axes, padding_idx: int | None = None) -> Tensor:
    """F.embedding on a weight of type S(0). Rows of other ranks give zeros, so the sum over the ranks is the embedding."""
    index, count = position(axes)
    rows = weight.size(0)
    check_indices(ids, rows * count, "embedding")
    local = ids - index * rows
    outside = (local < 0) | (local >= rows)
    if padding_idx is not None:
        padding_idx = padding_idx % (rows * count) - index * rows
        if not 0 <= padding_idx < rows:
            padding_idx = None  # another rank holds the row
    out = F.embedding(local.masked_fill(outside, 0), weight, padding_idx)
    return out.masked_fill(outside.unsqueeze(-1), 0)
