"""Sample calls of rules/dropout.py.
Must not know how the ops are split.
"""

import torch

from autopar.rules.samples import Sample, T

F = "torch.nn.functional."
SHAPES = {
    "dropout": T(4, 8, 6),
    "dropout1d": T(4, 8, 6),
    "dropout2d": T(4, 8, 2, 4),
    "dropout3d": T(4, 8, 2, 2, 4),
    "alpha_dropout": T(4, 8),
    "feature_alpha_dropout": T(4, 8, 4),
}

SAMPLES = [
    *(
        Sample(F + n, x, *args, splits=" ".join(f"d{i}" for i in range(len(x.shape))), **kwargs)
        for n, x in SHAPES.items()
        for args, kwargs in (
            ((0.3, False), {}),
            ((), {"p": 0.3, "training": True}),
            ((0.3, True, True), {}),
            ((0.3,), {"training": True, "inplace": True}),
        )
    ),
    Sample(F + "dropout1d", T(4, 8), 0.5, True, splits="d0 d1"),
    Sample(F + "dropout", T(4, 8), p=0.0, training=True, splits="d0 d1"),
    Sample(F + "dropout", T(4, 8, values=torch.t), 0.4, True, splits="d0 d1"),
    Sample("torch.dropout", T(4, 8), 0.5, True, splits="d0 d1"),
    Sample("torch.rand_like", T(4, 8), splits="d0 d1"),
    Sample("torch.randn_like", T(4, 8), dtype=torch.float64, splits="d0 d1"),
    Sample("torch.bernoulli", T(4, 8, values=torch.sigmoid, grad=False), splits=""),
]
