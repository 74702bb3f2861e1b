"""Losses whose result needs numbers of other ranks: a global denominator, or classes split between ranks.
Must not know the backward of communication: sums that carry a gradient go through collectives.py.

`batch`: axes that split any dim but the class dim; the result is this rank's addend (P) of the loss.
`classes`: axes that split the class dim; the result is the same on all of them (I).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.runtime.collectives import p_to_i
from autopar.runtime.functional_embedding import check_indices
from autopar.runtime.functional_softmax import widened
from autopar.runtime.shards import Axes, axes_of, position, total


def _reduced(loss: Tensor, denominator: Tensor | None, reduction: str, out: torch.dtype) -> Tensor:
    """none: as it is; sum: added up; mean: added up and divided by the global denominator."""
    if reduction == "none":
        return loss.to(out)
    loss = loss.sum() if loss.dtype not in (torch.float16, torch.bfloat16) else loss.float().sum()
    # NB: added up in float32: a sum of half-precision losses overflows where their mean would not.
    return (loss / denominator if reduction == "mean" else loss).to(out)


def _weight_of(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The sum of the class weights of this rank's targets (their number if there are no weights)."""
    kept = target != ignore_index
    if weight is None:
        return kept.sum()
    return weight.detach()[target.masked_fill(~kept, 0)].masked_fill(~kept, 0).sum()


def nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int = -100, reduction: str = "mean", batch: Axes = ()
) -> Tensor:
    """F.nll_loss on a shard of the batch."""
    loss = F.nll_loss(input, target, weight, ignore_index=ignore_index, reduction="none")
    denominator = total(_weight_of(target, weight, ignore_index), batch) if reduction == "mean" else None
    return _reduced(loss, denominator, reduction, loss.dtype)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    batch: Axes = (),
    classes: Axes = (),
) -> Tensor:
    """F.cross_entropy on a shard of the batch, the classes or both. A class weight and probability targets are split as the classes."""
    indices = not target.is_floating_point()
    if axes_of(classes):
        loss, kept_weight, out = _split_classes(input, target, weight, ignore_index, label_smoothing, axes_of(classes))
        denominator = kept_weight.sum()
    else:
        loss = F.cross_entropy(input, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
        out = loss.dtype
        denominator = _weight_of(target, weight, ignore_index) if indices else torch.tensor(loss.numel(), device=loss.device)
    denominator = total(denominator, batch) if reduction == "mean" else None
    return _reduced(loss, denominator, reduction, out)


def _split_classes(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float, classes: tuple
) -> tuple[Tensor, Tensor, torch.dtype]:
    """(loss of each target, weight of each target in the mean, dtype of the result).

    With m the maximum logit and z = logit - m: loss = log(sum exp z) - z[target]. Everything summed over the classes is
    stacked and reduced at once.
    """
    dim = 1 if input.dim() > 1 else 0
    x, out = widened(input)
    z = x - total(x.detach().amax(dim, keepdim=True), classes, "max")
    shape = [1] * z.dim()
    shape[dim] = -1
    w = None if weight is None else weight.to(z.dtype)
    parts = [z.exp().sum(dim)]
    if target.is_floating_point():
        index, count = position(classes)
        t = target.to(z.dtype)
        if smoothing > 0:
            t = t * (1 - smoothing) + smoothing / (z.size(dim) * count)
        if w is not None:
            t = t * w.view(shape)
        parts += [t.sum(dim), (t * z).sum(dim)]
        exp_sum, mass, dot = _sum(parts, classes)
        loss = exp_sum.log() * mass - dot
        return loss, torch.tensor(loss.numel(), device=loss.device), out

    index, count = position(classes)
    size = z.size(dim)
    ignored = target == ignore_index
    check_indices(target.masked_fill(ignored, 0), size * count, "cross_entropy")
    local = target - index * size
    outside = (local < 0) | (local >= size) | ignored
    local = local.masked_fill(outside, 0)
    parts.append(z.gather(dim, local.unsqueeze(dim)).squeeze(dim).masked_fill(outside, 0))
    if w is not None:
        parts.append(w[local].masked_fill(outside, 0))
    if smoothing > 0:
        wz = z if w is None else z * w.view(shape)
        parts.append(wz.sum(dim))
        if w is not None:
            parts.append(w.sum().expand_as(parts[0]))
    exp_sum, picked, *rest = _sum(parts, classes)
    log_sum = exp_sum.log()
    loss = log_sum - picked
    kept = torch.ones_like(loss) if w is None else rest.pop(0).detach()
    loss = loss * kept
    if smoothing > 0:
        dot = rest[0]
        mass = size * count if w is None else rest[1]
        loss = (1 - smoothing) * loss + smoothing / (size * count) * (log_sum * mass - dot)
    return loss.masked_fill(ignored, 0), kept.masked_fill(ignored, 0), out


def _sum(parts: list[Tensor], axes: tuple) -> list[Tensor]:
    """Each part summed over the axes, with one all-reduce per axis."""
    stacked = torch.stack(parts)
    for axis in axes:
        stacked = p_to_i(stacked, axis)
    return list(stacked.unbind())
