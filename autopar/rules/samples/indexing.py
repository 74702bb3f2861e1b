"""Sample calls of rules/indexing.py.
Must not know how the ops are split.
"""

from autopar.rules.samples import Sample, Scalar, T

GET, SET = "torch.Tensor.__getitem__", "torch.Tensor.__setitem__"
ALL = slice(None)
X = T(8, 12, 16)
IDS, MANY = T(4, values=8), T(4, 20, values=8)
MASK = T(8, 12, values="bool")

SAMPLES = [
    Sample(GET, X, 3, splits="d1 d2"),
    Sample(GET, X, (ALL, -1), splits="d0 d2"),
    Sample(GET, X, (..., 0), splits="d0 d1"),
    Sample(GET, X, (..., slice(None, 8)), splits="d0 d1"),
    Sample(GET, X, (ALL, slice(None, None, 2)), splits="d0 d2"),
    Sample(GET, X, (ALL, slice(0, 12)), splits="d0 d2"),
    Sample(GET, X, (slice(0, None), slice(None, 100)), splits="d0 d2"),
    Sample(GET, X, (ALL, slice(None, 2**63 - 1)), splits="d0 d1 d2"),
    Sample(GET, X, (ALL, slice(None, Scalar(12))), splits="d0 d2"),
    Sample(GET, X, (ALL, Scalar(2)), splits="d0 d2"),
    Sample(GET, X, (ALL, None, slice(1, 5), ..., None), splits="d0 d2"),
    Sample(GET, X, (None, ...), splits="d0 d1 d2"),
    Sample(GET, X, ..., splits="d0 d1 d2"),
    Sample(GET, X, (), splits="d0 d1 d2"),
    Sample(GET, X, IDS, splits="d1 d2 i0"),
    Sample(GET, X, MANY, splits="d1 d2 i0 i1"),
    Sample(GET, X, (ALL, T(4, 20, values=12)), splits="d0 d2 i0 i1"),
    Sample(GET, X, (IDS, T(4, values=12)), splits="d2 i0"),
    Sample(GET, X, (T(20, 1, values=8), T(4, values=12)), splits="d2 i0 i1"),
    Sample(GET, X, (IDS, ALL, T(4, values=16)), splits="d1 i0"),
    Sample(GET, X, (ALL, IDS, T(4, values=16)), splits="d0 i0"),
    Sample(GET, X, (0, ALL, IDS), splits="d1 i0"),
    Sample(GET, X, (IDS, 0), splits="d2 i0"),
    Sample(GET, X, (IDS, 0, T(4, values=16)), splits="i0"),
    Sample(GET, X, T(values=8), splits="d1 d2"),
    Sample(GET, X, (ALL, [0, 3, 5]), splits="d0 d2"),
    Sample(GET, X, (None, IDS), splits="d1 d2 i0"),
    Sample(GET, X, MASK, splits="d2"),
    Sample(GET, X, (ALL, T(12, values="bool")), splits="d0 d2"),
    Sample("operator.getitem", X, (ALL, 1)),
    Sample(SET, X, (ALL, slice(1, None)), T(8, 11, 16), splits="d0 d2"),
    Sample(SET, X, (ALL, 0), T(16), splits="d0 d2"),
    Sample(SET, X, (ALL, 0), 2.0, splits="d0 d2"),
    Sample(SET, X, (..., slice(0, 4)), 0, splits="d0 d1"),
    Sample(SET, X, ALL, T(1, 12, 1), splits="d0 d1 d2"),
    Sample(SET, X, (slice(2, 4), ALL), T(12, 16), splits="d1 d2"),
    Sample(SET, X, T(4, values=1), T(4, 12, 16), splits="d1 d2"),
    Sample(SET, X, MASK, 0.0, splits="d2"),
    Sample(SET, X, MASK, T(16), splits="d2"),
    Sample(SET, X, (ALL, T(12, values="bool")), T(), splits="d0 d2"),
]
