"""Sample calls of rules/reduce.py.
Must not know how the ops are split.
"""

import torch

from autopar.rules.samples import Sample, T

F = "torch.nn.functional."
X = T(8, 12, 16)
INTS, FLAGS = T(8, 12, values=9), T(8, 12, values="bool")

SAMPLES = [
    *(Sample(f"torch.{n}", X, splits="d0 d1 d2") for n in ("sum", "mean")),
    *(Sample(f"torch.{n}", X, -1, splits="d0 d1 d2") for n in ("sum", "mean")),
    *(Sample(f"torch.Tensor.{n}", X, dim=(0, 2), keepdim=True, splits="d0 d1 d2") for n in ("sum", "mean")),
    Sample("torch.sum", X, axis=1, keepdims=True),
    Sample("torch.sum", X, []),
    Sample("torch.sum", INTS, 1),
    Sample("torch.sum", FLAGS, 1),
    Sample("torch.sum", T()),
    *(Sample(f"torch.{n}", X, 1, splits="d0 d2") for n in ("var", "std")),
    Sample("torch.var", X, splits=""),
    Sample("torch.var", X, False),
    Sample("torch.var", X, (0, 1), unbiased=False, keepdim=True),
    Sample("torch.std", X, dim=-1, correction=0),
    Sample("torch.var_mean", X, -1),
    Sample("torch.std_mean", X, -1, keepdim=True),
    *(Sample(f"torch.{n}", X, 1, splits="d0 d2") for n in ("amax", "amin", "argmax", "argmin", "prod", "logsumexp", "max", "min")),
    *(Sample(f"torch.{n}", X, 1, splits="d0 d2") for n in ("median", "nanmedian", "mode", "nanmean", "nansum", "count_nonzero")),
    *(Sample(f"torch.{n}", X, splits="") for n in ("max", "min", "argmax", "prod")),
    Sample("torch.amax", X, (0, 2), True),
    Sample("torch.aminmax", X, dim=1, grad=torch.__version__ >= "2.12"),  # has no derivative before
    Sample("torch.argmax", X, dim=-1, keepdim=True),
    Sample("torch.max", X, T(16), splits="d0 d1 d2"),
    Sample("torch.min", X, other=T(16)),
    Sample("torch.max", X, dim=0, keepdim=True),
    Sample("torch.all", FLAGS, 1, splits="d0"),
    Sample("torch.any", FLAGS, splits=""),
    Sample("torch.any", FLAGS, dim=0, keepdim=True),
    Sample("torch.norm", X, splits=""),
    Sample("torch.norm", X, 2, -1, splits="d0 d1"),
    Sample("torch.norm", X, p=1, dim=(1,), keepdim=True),
    Sample("torch.linalg.norm", X, dim=-1),
    Sample("torch.linalg.vector_norm", X, 2, (0, 1), splits="d2"),
    Sample("torch.cumsum", X, 1, splits="d0 d2"),
    Sample("torch.cumsum", INTS, -1),
    *(Sample(f"torch.{n}", T(8, 12, values="positive"), 0, splits="d1") for n in ("cumprod", "logcumsumexp", "cummax", "cummin")),
    Sample("torch.diff", X, dim=1, splits="d0 d2"),
    *(Sample(F + n, X, dim=-1, splits="d0 d1") for n in ("softmax", "log_softmax", "softmin")),
    Sample("torch.softmax", X, 1, splits="d0 d2"),
    Sample("torch.Tensor.softmax", X, dim=0),
    Sample(F + "normalize", X, splits="d0 d2"),
    Sample(F + "normalize", X, 2.0, -1),
    Sample(F + "cosine_similarity", X, T(8, 12, 16), dim=-1, splits="d0 d1"),
    Sample(F + "layer_norm", X, (16,), splits="*0 *1"),
    Sample(F + "layer_norm", X, (16,), T(16), T(16), 1e-5, splits="*0 *1"),
    Sample(F + "layer_norm", X, [12, 16], weight=T(12, 16), splits="*0"),
    Sample("torch.layer_norm", X, (16,), T(16), T(16)),
    Sample(F + "rms_norm", X, (16,), T(16), 1e-6, splits="*0 *1"),
    Sample(F + "rms_norm", X, (16,)),
    Sample(F + "group_norm", T(8, 16, 3, 5), 4, T(16), T(16), splits="b g"),
    Sample(F + "group_norm", T(8, 16, 6), 8),
]
