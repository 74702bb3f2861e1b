"""Sample calls of rules/attention.py.
Must not know how the ops are split.
"""

import torch

from autopar.rules.samples import Sample, T

A = "torch.nn.functional.scaled_dot_product_attention"
FULL, GROUPED, ONE_HEAD = "b0 b1", "b0 g", "b0 r"


def qkv(heads: int = 8, kv: int = 8, rows: int = 6, cols: int = 6, value: int = 4) -> tuple[T, T, T]:
    return T(4, heads, rows, 4), T(4, kv, cols, 4), T(4, kv, cols, value)


def blocked(x: torch.Tensor) -> torch.Tensor:
    """A boolean mask with a row that attends to nothing."""
    keep = x > 0
    keep[..., 1, :] = False
    return keep


SAMPLES = [
    Sample(A, *qkv(), splits=FULL),
    Sample(A, *qkv(), is_causal=True, splits=FULL),
    Sample(A, *qkv(cols=8, value=8), attn_mask=None, scale=0.3, splits=FULL),
    *(
        Sample(A, *qkv(), attn_mask=T(*m), splits=FULL)
        for m in [(6, 6), (1, 6), (6, 1), (1, 1, 6, 6), (4, 1, 6, 6), (4, 8, 6, 6), (4, 1, 1, 6), (1, 8, 6, 6), (8, 1, 6)]
    ),
    Sample(A, *qkv(), T(4, 1, 6, 6, values=blocked), splits=FULL),
    Sample(A, *qkv(8, 4), enable_gqa=True, is_causal=True, splits=GROUPED),
    Sample(A, *qkv(8, 4), attn_mask=T(4, 8, 6, 6), enable_gqa=True, splits=GROUPED),
    Sample(A, *qkv(8, 4), attn_mask=T(4, 1, 6, 6), enable_gqa=True, splits=GROUPED),
    Sample(A, *qkv(8, 4), attn_mask=T(6, 6), enable_gqa=True, splits=GROUPED),
    Sample(A, *qkv(8, 2), attn_mask=T(4, 8, 6, 6), enable_gqa=True, splits=GROUPED),
    Sample(A, *qkv(8, 1), enable_gqa=True, splits=ONE_HEAD),
    Sample(A, *qkv(8, 8), enable_gqa=True, splits=FULL),
    Sample(A, *qkv(8, 1), splits=FULL),
    Sample(A, T(4, 6, 4), T(4, 6, 4), T(4, 6, 4), splits="b0"),
    Sample(A, T(6, 4), T(6, 4), T(6, 4), splits=""),
    Sample(A, T(4, 8, 6, 4), T(1, 8, 6, 4), T(1, 8, 6, 4), splits=FULL),
    Sample(A, T(1, 8, 1, 4), T(1, 8, 6, 4), T(1, 8, 6, 4), splits="b1"),
    Sample(A, *qkv(), None, 0.3, True, splits=FULL),
    Sample(A, *qkv(), attn_mask=T(4, 1, 6, 6, values=blocked), dropout_p=0.3, splits=FULL),
    Sample(A, *qkv(8, 4), dropout_p=0.3, enable_gqa=True, splits=GROUPED),
]
