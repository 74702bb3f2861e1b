"""Sample calls of rules/pool.py.
Must not know how the ops are split.
"""

from autopar.rules.samples import Sample, T

F = "torch.nn.functional."
X, X1, X3 = T(4, 8, 8, 8), T(4, 8, 8), T(2, 4, 4, 4, 4)
MEAN, VAR = T(8, grad=False), T(8, values="positive", grad=False)

SAMPLES = [
    *(Sample(F + n, X, 2, splits="l0 l1") for n in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")),
    *(Sample(F + n, X1, 2, splits="l0 l1") for n in ("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d")),
    *(Sample(F + n, X3, 2, splits="l0 l1") for n in ("max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d")),
    Sample(F + "max_pool2d", X, kernel_size=3, stride=2, padding=1, return_indices=True, splits="l0 l1"),
    Sample(F + "max_pool2d", T(8, 8, 8), 2, splits="l0"),
    Sample(F + "adaptive_avg_pool2d", X, (1, 1), splits="l0 l1"),
    Sample(F + "lp_pool2d", T(4, 8, 8, 8, values="positive"), 2.0, 2, splits="l0 l1"),
    Sample(F + "max_unpool2d", T(4, 8, 4, 4), T(4, 8, 4, 4, values=64), 2, splits="l0 l1"),
    Sample(F + "interpolate", X, scale_factor=2, splits="l0 l1"),
    Sample(F + "interpolate", X, size=(12, 4), mode="bilinear", align_corners=False, splits="l0 l1"),
    Sample(F + "interpolate", X1, size=12, splits="l0 l1"),
    Sample(F + "grid_sample", X, T(4, 3, 3, 2, values="unit"), align_corners=False, splits="l0 l1"),
    Sample(F + "pixel_shuffle", T(4, 16, 3, 3), 2, splits="l0 c"),
    Sample(F + "pixel_shuffle", T(16, 3, 3), 2, splits="c"),
    Sample(F + "pixel_unshuffle", T(4, 4, 6, 6), 2, splits="l0 c"),
    Sample(F + "channel_shuffle", T(4, 8, 3, 3), 2, splits="l0"),
    Sample(F + "unfold", T(4, 8, 6, 6), 3, splits="n c"),
    Sample(F + "unfold", T(8, 6, 6), (2, 2), stride=2, splits="c"),
    Sample(F + "fold", T(4, 32, 9), (6, 6), (2, 2), stride=2, splits="n c"),
    Sample("torch.Tensor.unfold", T(4, 8, 6), 1, 2, 2, splits="d0 d2"),
    Sample("torch.Tensor.unfold", T(4, 8, 6), -1, 2, 1, splits="d0 d1"),
    Sample(F + "batch_norm", X, MEAN, VAR, weight=T(8), bias=T(8), training=True, momentum=0.1, eps=1e-5, splits="c"),
    Sample(F + "batch_norm", X1, MEAN, VAR, training=True, splits="c"),
    Sample(F + "batch_norm", X, None, None, T(8), T(8), training=True, splits="c"),
    Sample(F + "batch_norm", T(4, 8), MEAN, VAR, T(8), T(8), training=False, splits="d0 c"),
    Sample(F + "batch_norm", X1, MEAN, VAR, training=False, splits="d0 c d2"),
    Sample(F + "instance_norm", X, None, None, T(8), T(8), splits="d0 c"),
    Sample(F + "instance_norm", X1, use_input_stats=True, splits="d0 c"),
    Sample(F + "instance_norm", X, MEAN, VAR, weight=T(8), bias=T(8), use_input_stats=True, splits="c"),
    Sample(F + "instance_norm", X1, MEAN, VAR, T(8), T(8), use_input_stats=False, splits="d0 c d2"),
    Sample(F + "local_response_norm", X, 2, splits="d0 d2 d3"),
]
