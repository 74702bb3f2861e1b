"""Exact mode: random ops draw for the whole tensor in an order that does not depend on memory layout or on the split.
Must not know the compiler. For verification only: slower, and not the numbers production draws.

    with exact():              # around the original module, and inside the function of every rank
        out = module(x)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from autopar.runtime import functional_random as ours
from autopar.runtime import random as streams


def _dropout(input: Any, p: float = 0.5, train: bool = True) -> Any:
    return ours.dropout(input, p, train)


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, **options: Any
) -> Any:
    return ours.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)


REPLACED: dict[Any, Callable[..., Any]] = {
    F.dropout: ours.dropout,
    F.dropout1d: ours.dropout1d,
    F.dropout2d: ours.dropout2d,
    F.dropout3d: ours.dropout3d,
    F.alpha_dropout: ours.alpha_dropout,
    F.feature_alpha_dropout: ours.feature_alpha_dropout,
    torch.dropout: _dropout,
    torch.rand_like: ours.rand_like,
    torch.randn_like: ours.randn_like,
    F.scaled_dot_product_attention: _attention,
}


class _Replace(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return REPLACED.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def exact() -> Iterator[None]:
    """Exact mode in this thread; ranks running in other threads see the flag and enter it themselves for torch's own ops."""
    with streams.EXACT, _Replace():
        yield


exact_reference = exact
