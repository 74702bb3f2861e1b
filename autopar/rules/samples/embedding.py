"""Sample calls of rules/embedding.py.
Must not know how the ops are split.
"""

from autopar.rules.samples import Sample, T

E = "torch.nn.functional.embedding"
IDS, W = T(4, 8, values=16), T(16, 8)

SAMPLES = [
    Sample(E, IDS, W, splits="i0 i1 v e"),
    Sample(E, IDS, W, padding_idx=3, splits="i0 i1 v e"),
    Sample(E, T(8, values=16), T(16, 4), -1, splits="i0 v e"),
    Sample(E, T(values=16), T(16, 4), splits="v e"),
    Sample(E, IDS, W, max_norm=1.0, splits=""),
    Sample(E, IDS, W, scale_grad_by_freq=True, splits=""),
    Sample(E, IDS, W, None, None, 2.0, False, False, splits="i0 i1 v e"),
]
