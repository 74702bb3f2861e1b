"""Random ops on shards. Ranks that hold different shards draw different numbers, ranks that hold the same data the same.
Must not know how streams are seeded (random.py) nor who compares (exact.py).

`shards` says how this rank's tensor lies in the whole one: a tuple of (dim, axis), the outer axis of a dim first, or
(dim, axis, groups) for a dim sharded inside groups. In exact mode (random.EXACT) each function draws for the whole tensor from
the default generator and takes its slice, so that a split model can be compared with the unsplit one digit for digit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.runtime import random as streams
from autopar.runtime.shards import Shards, take, whole_shape


def _different(shards: Shards) -> Any:
    """The context in which this rank draws other numbers than the ranks that hold other shards."""
    return streams.random_streams(*(axis for _, axis, *_ in shards))


def _bernoulli(x: Tensor, shape: tuple[int, ...], keep: float, shards: Shards) -> Tensor:
    """Exact mode: the shard of zeros and ones drawn for a whole noise tensor whose local shape is given."""
    return take(torch.empty(whole_shape(shape, shards), dtype=x.dtype, device=x.device).bernoulli_(keep), shards)


def _times(x: Tensor, noise: Tensor, inplace: bool) -> Tensor:
    return x.mul_(noise) if inplace else x * noise


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, shards: Shards = ()) -> Tensor:
    if not training or p == 0.0 or p == 1.0:
        return F.dropout(x, p, training, inplace)
    if streams.EXACT:
        return _times(x, _bernoulli(x, tuple(x.shape), 1 - p, shards).div_(1 - p), inplace)
    with _different(shards):
        return F.dropout(x, p, training, inplace)


def _feature_dropout(fn: Any, x: Tensor, p: float, training: bool, inplace: bool, shards: Shards, unbatched: int) -> Tensor:
    """Whole channels are dropped: the noise has size 1 in every dim after the channel."""
    lead = 1 if x.dim() == unbatched else 2
    shards = tuple(s for s in shards if s[0] < lead)
    if not training or p == 0.0 or p == 1.0:
        return fn(x, p, training, inplace)
    if streams.EXACT:
        shape = tuple(x.shape[:lead]) + (1,) * (x.dim() - lead)
        return _times(x, _bernoulli(x, shape, 1 - p, shards).div_(1 - p), inplace)
    with _different(shards):
        return fn(x, p, training, inplace)


def dropout1d(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, shards: Shards = ()) -> Tensor:
    return _feature_dropout(F.dropout1d, x, p, training, inplace, shards, 2)


def dropout2d(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, shards: Shards = ()) -> Tensor:
    return _feature_dropout(F.dropout2d, x, p, training, inplace, shards, -1)  # NB: torch takes 3 dims as (N, C, L)


def dropout3d(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, shards: Shards = ()) -> Tensor:
    return _feature_dropout(F.dropout3d, x, p, training, inplace, shards, 4)


def _alpha(x: Tensor, noise: Tensor, p: float) -> Tensor:
    """aten's alpha dropout, given its zeros and ones."""
    alpha = 1.7580993408473766
    a = 1.0 / ((alpha * alpha * p + 1) * (1 - p)) ** 0.5
    return x * (noise * a) + ((noise - 1) * (alpha * a) + alpha * a * p)


def alpha_dropout(x: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False, shards: Shards = ()) -> Tensor:
    if streams.EXACT and training and 0 < p < 1:
        return _written(x, _alpha(x, _bernoulli(x, tuple(x.shape), 1 - p, shards), p), inplace)
    with _different(shards):
        return F.alpha_dropout(x, p, training, inplace)


def feature_alpha_dropout(x: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False, shards: Shards = ()) -> Tensor:
    shards = tuple(s for s in shards if s[0] < 2)
    if streams.EXACT and training and 0 < p < 1:
        shape = tuple(x.shape[:2]) + (1,) * (x.dim() - 2)
        return _written(x, _alpha(x, _bernoulli(x, shape, 1 - p, shards), p), inplace)
    with _different(shards):
        return F.feature_alpha_dropout(x, p, training, inplace)


def _written(x: Tensor, out: Tensor, inplace: bool) -> Tensor:
    return x.copy_(out) if inplace else out


def rand_like(x: Tensor, shards: Shards = (), **options: Any) -> Tensor:
    return _like(torch.rand_like, x, shards, options)


def randn_like(x: Tensor, shards: Shards = (), **options: Any) -> Tensor:
    return _like(torch.randn_like, x, shards, options)


def _like(fn: Any, x: Tensor, shards: Shards, options: dict[str, Any]) -> Tensor:
    if streams.EXACT:
        return take(fn(x.new_empty(whole_shape(x.shape, shards)), **options), shards).clone()
    with _different(shards):
        return fn(x, **options)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    shards: Shards = (),
) -> Tensor:
    """Attention with dropout whose batch or head dims are split; shards are those of the result."""
    if dropout_p > 0.0 and streams.EXACT:
        return attention_math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa, shards=shards)
    with _different(shards if dropout_p > 0.0 else ()):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def attention_math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    shards: Shards = (),
) -> Tensor:
    """Exact mode: the formula of attention, with the shard of a dropout mask drawn for the whole."""
    if enable_gqa:
        repeat = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(repeat, -3), value.repeat_interleave(repeat, -3)
    scores = (query * (query.size(-1) ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~keep, float("-inf"))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = torch._safe_softmax(scores, -1)  # a row with nothing to attend to gives zeros, as in torch
    if dropout_p > 0.0:
        weights = weights * _bernoulli(weights, tuple(weights.shape), 1 - dropout_p, shards).div_(1 - dropout_p)
    return weights @ value
