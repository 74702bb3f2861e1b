"""Sample calls of rules/whole.py.
Must not know how the ops are split.
"""

import torch

from autopar.rules.samples import Sample, T

I8, H = 6, 4


def weights(gates: int, layers: int, directions: int) -> list[T]:
    out = []
    for layer in range(layers):
        for _ in range(directions):
            wide = I8 if layer == 0 else H * directions
            out += [T(gates * H, wide), T(gates * H, H), T(gates * H), T(gates * H)]
    return out


def solvable(x: torch.Tensor) -> torch.Tensor:
    return x.tril() + 3 * torch.eye(x.shape[-1], dtype=x.dtype)


def ones_and_zeros(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).long()


SAMPLES = [
    *(
        Sample("torch._VF.lstm", T(*x), (T(4, 4, H), T(4, 4, H)), weights(4, 2, 2), True, 2, 0.0, True, True, first, splits="b")
        for first, x in ((True, (4, 8, I8)), (False, (8, 4, I8)))
    ),
    *(
        Sample("torch._VF.gru", T(*x), T(1, 4, H), weights(3, 1, 1), True, 1, 0.0, False, False, first, splits="b")
        for first, x in ((True, (4, 8, I8)), (False, (8, 4, I8)))
    ),
    Sample("torch._VF.rnn_tanh", T(4, 8, I8), T(1, 4, H), weights(1, 1, 1), True, 1, 0.0, False, False, True, splits="b"),
    Sample("torch.fft.fft", T(4, 8), splits="d0"),
    Sample("torch.fft.rfft", T(4, 8), dim=0, splits="d1"),
    Sample("torch.fft.irfft", T(4, 5, values="complex"), 8, 1, splits="d0"),
    Sample("torch.linalg.solve_triangular", T(4, 4, 4, values=solvable), T(4, 4, 8), upper=False, splits="b0 k"),
    Sample("torch.linalg.solve_triangular", T(4, 8, 8, values=solvable), T(4, 4, 8), upper=False, left=False, splits=""),
    Sample("torch.linalg.inv", T(4, 4, 4, values=solvable), splits="b0"),
    Sample("torch.linalg.det", T(4, 3, 3), splits="b0"),
    Sample("torch.bincount", T(12, values=8), splits=""),
    Sample("torch.nonzero", T(4, 4, values=ones_and_zeros), splits=""),
    Sample("torch.histc", T(8), 4, 0.0, 1.0, splits=""),
    Sample("torch.masked_select", T(4, 4), T(4, 4, values="bool"), splits=""),
    Sample("torch.fft.fft2", T(4, 4, 8), splits=""),
]
