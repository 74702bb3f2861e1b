"""Sample calls of rules/gather.py.
Must not know how the ops are split.
"""

import torch

from autopar.rules.samples import Sample, T

X = T(4, 8)


def picks(x: torch.Tensor) -> torch.Tensor:
    """Distinct indices along dim 1."""
    return x.argsort(1)[:, :4]


def ordered(x: torch.Tensor) -> torch.Tensor:
    return x.sort(-1)[0]


PICKS, SRC, TWO = T(4, 8, values=picks), T(4, 4), torch.tensor([3, 1])

SAMPLES = [
    Sample("torch.gather", T(4, 8, 4), 1, T(4, 4, 4, values=8), splits="d0 d2 k"),
    Sample("torch.Tensor.gather", X, -1, T(4, 4, values=8), splits="d0 k"),
    Sample("torch.gather", X, 1, T(2, 4, values=8), splits="k"),
    Sample("torch.gather", X, dim=0, index=T(8, 8, values=4), splits="d1 k"),
    Sample("torch.take_along_dim", X, T(4, 4, values=8), 1, splits="d0 k"),
    Sample("torch.take_along_dim", X, T(1, 8, values=4), dim=0, splits="d1"),
    Sample("torch.take_along_dim", X, T(1, 8, values=8), dim=1, splits=""),
    Sample("torch.scatter", X, 1, PICKS, SRC, splits="d0"),
    Sample("torch.Tensor.scatter_", X, 1, PICKS, SRC, splits="d0"),
    Sample("torch.Tensor.scatter", X, 1, PICKS, 0.5, splits="d0"),
    Sample("torch.Tensor.scatter", X, -1, PICKS, value=0, splits="d0"),
    Sample("torch.Tensor.scatter_", X, 1, PICKS, 1.0, splits="d0"),
    Sample("torch.scatter", X, 1, T(2, 8, values=picks), T(2, 4), splits=""),
    Sample("torch.Tensor.scatter_add", X, 1, T(4, 4, values=8), SRC, splits="d0"),
    Sample("torch.Tensor.scatter_add_", X, 0, T(4, 8, values=4), T(4, 8), splits="d1"),
    Sample("torch.scatter_reduce", X, 1, T(4, 4, values=8), SRC, "amax", splits="d0"),
    Sample("torch.scatter_reduce", X, 1, T(4, 4, values=8), SRC, reduce="mean", include_self=False, splits="d0"),
    Sample("torch.index_select", T(4, 8, 4), 1, T(12, values=8), splits="d0 d2 k"),
    Sample("torch.Tensor.index_select", X, dim=0, index=T(8, values=4), splits="d1 k"),
    Sample("torch.index_select", X, 1, T(values=8), splits="d0"),
    Sample("torch.index_select", X, 1, T(1, values=8), splits="d0"),
    Sample("torch.Tensor.index_add_", T(8, 4), 0, T(12, values=8), T(12, 4), splits="d1"),
    Sample("torch.index_add", T(8, 4), 0, T(12, values=8), T(12, 4), alpha=2.0, splits="d1"),
    Sample("torch.Tensor.index_copy", T(8, 4), 0, TWO, T(2, 4), splits="d1"),
    Sample("torch.Tensor.index_fill", T(8, 4), 0, TWO, 2.0, splits="d1"),
    Sample("torch.Tensor.index_fill", T(8, 4), 0, TWO, T(), splits="d1"),
    Sample("torch.topk", T(4, 8, 4), 2, splits="d0 d1"),
    Sample("torch.topk", X, 4, dim=0, splits="d1"),
    Sample("torch.Tensor.topk", X, 1, splits="d0"),
    Sample("torch.Tensor.topk", T(4, 8, 8), k=3, dim=1, sorted=False, splits="d0 d2"),
    Sample("torch.sort", X, splits="d0"),
    Sample("torch.Tensor.sort", X, dim=0, descending=True, splits="d1"),
    Sample("torch.sort", X, stable=True, dim=1, splits="d0"),
    Sample("torch.argsort", X, splits="d0"),
    Sample("torch.msort", X, splits="d1"),
    Sample("torch.kthvalue", X, 2, splits="d0"),
    Sample("torch.kthvalue", T(4, 8, 2), 2, 1, True, splits="d0 d2"),
    Sample("torch.nn.functional.one_hot", T(4, 4, values=8), 8, splits="d0 d1"),
    Sample("torch.nn.functional.one_hot", T(4, 4, values=8), splits=""),
    Sample("torch.searchsorted", T(8, values=ordered), X, splits="d0 d1"),
    Sample("torch.searchsorted", T(4, 8, values=ordered), T(4, 6), right=True, splits="d0 v"),
    Sample("torch.bucketize", X, T(5, values=ordered), splits="d0 d1"),
    Sample("torch.isin", T(4, 8, values=8), T(3, values=8), splits="d0 d1"),
    Sample("torch.cdist", X, T(12, 8), splits="p r"),
    Sample("torch.cdist", T(4, 8, 6), T(4, 12, 6), splits="b0 p r"),
    Sample("torch.cdist", T(4, 8, 6), T(1, 12, 6), p=1.0, splits="b0 p r"),
    Sample("torch.nn.functional.pairwise_distance", X, X, splits="d0"),
    Sample("torch.nn.functional.pairwise_distance", X, X, keepdim=True, splits="d0"),
]
