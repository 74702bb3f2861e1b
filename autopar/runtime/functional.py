"""The `ap.*` functions that generated code calls where a split op needs more than torch's own function.
Must not know graphs, plans or rules: it sees local tensors and mesh axes. Splits over several axes take a tuple, outermost first.
"""

from __future__ import annotations

from autopar.runtime.functional_embedding import vocab_embedding
from autopar.runtime.functional_losses import cross_entropy, nll_loss
from autopar.runtime.functional_random import (
    alpha_dropout,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    feature_alpha_dropout,
    rand_like,
    randn_like,
    scaled_dot_product_attention,
)
from autopar.runtime.functional_softmax import log_softmax, softmax

__all__ = [
    "alpha_dropout",
    "cross_entropy",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
    "log_softmax",
    "nll_loss",
    "rand_like",
    "randn_like",
    "scaled_dot_product_attention",
    "softmax",
    "vocab_embedding",
]
