"""Sample calls of rules/conv.py.
Must not know how the ops are split.
"""

from autopar.rules.samples import Sample, T

F = "torch.nn.functional."
X, DENSE, GROUPED = T(4, 8, 6, 6), "n i o", "n g"

SAMPLES = [
    Sample(F + "conv1d", T(4, 8, 6), T(12, 8, 3), T(12), splits=DENSE),
    Sample(F + "conv1d", T(4, 8, 6), T(12, 8, 3), splits=DENSE),
    Sample(F + "conv2d", X, T(8, 8, 3, 3), T(8), padding=1, stride=2, splits=DENSE),
    Sample("torch.conv2d", X, T(8, 8, 3, 3), T(8), 1, 1, 1, 1, splits=DENSE),
    Sample(F + "conv2d", X, T(8, 1, 3, 3), T(8), 1, 1, 1, 8, splits=GROUPED),
    Sample(F + "conv2d", X, T(16, 2, 3, 3), T(16), groups=4, splits=GROUPED),
    Sample("torch.conv2d", X, T(16, 2, 3, 3), None, 1, 0, 1, 4, splits=GROUPED),
    Sample(F + "conv2d", X, T(8, 4, 3, 3), T(8), groups=2, splits=GROUPED),
    Sample(F + "conv2d", T(8, 6, 6), T(8, 8, 3, 3), T(8), padding="same", splits="i o"),
    Sample(F + "conv2d", T(4, 1, 6, 6), T(8, 1, 3, 3), T(8), splits="n o"),
    Sample(F + "conv3d", T(2, 4, 4, 4, 4), T(4, 4, 3, 3, 3), T(4), splits=DENSE),
    Sample(F + "conv_transpose1d", T(4, 8, 6), T(8, 12, 3), T(12), splits=DENSE),
    Sample(F + "conv_transpose2d", X, T(8, 2, 3, 3), T(8), 1, 0, 0, 4, splits=GROUPED),
    Sample(F + "conv_transpose2d", X, T(8, 4, 3, 3), T(4), stride=2, splits=DENSE),
    Sample(F + "conv_transpose3d", T(2, 4, 4, 4, 4), T(4, 4, 3, 3, 3), None, splits=DENSE),
    Sample("torch._weight_norm", T(8, 4, 3), T(8, 1, 1), 0, splits="d0"),
    Sample("torch._weight_norm", T(8, 4, 16), T(1, 1, 16), 2, splits="d2"),
]
