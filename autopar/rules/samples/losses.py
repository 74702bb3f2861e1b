"""Sample calls of rules/losses.py.
Must not know how the ops are split.
"""

import torch

from autopar.rules.samples import Sample, T

F = "torch.nn.functional."
CE = F + "cross_entropy"
HOW = ("mean", "sum", "none")
CLASS_WEIGHT = T(8, values="positive", grad=False)


def targets(x: torch.Tensor) -> torch.Tensor:
    """Class indices 0..7, the first row ignored."""
    t = (x * 100).long().remainder(8)
    t[0] = -100
    return t


def probabilities(x: torch.Tensor) -> torch.Tensor:
    return x.softmax(1)


def log_probabilities(x: torch.Tensor) -> torch.Tensor:
    return x.log_softmax(1)


def orders(x: torch.Tensor) -> torch.Tensor:
    """Distinct classes per row, ended by -1."""
    t = x.argsort(1)
    t[:, -2] = -1
    return t


sign, unit = torch.sign, torch.sigmoid
X, X3 = T(4, 8), T(4, 8, 4)
INDEX, INDEX3 = T(4, values=targets), T(4, 4, values=targets)

SAMPLES = [
    *(
        Sample(CE, X, t, weight=w, reduction=how, label_smoothing=s, splits="n0 c")
        for how in HOW
        for s in (0.0, 0.1)
        for w in (None, CLASS_WEIGHT)
        for t in (INDEX, T(4, 8, values=probabilities))
    ),
    *(
        sample
        for how in HOW
        for sample in (
            Sample(CE, X3, INDEX3, reduction=how, splits="n0 c n2"),
            Sample(CE, X3, INDEX3, CLASS_WEIGHT, reduction=how, splits="n0 c n2"),
            Sample(CE, X3, T(4, 4, values=8), CLASS_WEIGHT, reduction=how, ignore_index=3, splits="n0 c n2"),
            Sample(CE, X3, T(4, 8, 4, values=probabilities), reduction=how, splits="n0 c n2"),
            Sample(CE, T(8), T(values=8), reduction=how, splits="c"),
            Sample(F + "nll_loss", T(4, 8, values=log_probabilities), INDEX, reduction=how, splits="n0"),
            Sample(F + "nll_loss", X3, T(4, 4, values=8), CLASS_WEIGHT, reduction=how, ignore_index=2, splits="n0 n2"),
            Sample(F + "binary_cross_entropy", T(4, 8, values=unit), T(4, 8, values=unit), reduction=how, splits="d0 d1"),
            Sample(F + "binary_cross_entropy", T(4, 8, values=unit), T(4, 8, values=unit), weight=CLASS_WEIGHT, reduction=how),
            Sample(F + "binary_cross_entropy_with_logits", X, T(4, 8, values=unit), reduction=how, splits="d0 d1"),
            Sample(
                F + "binary_cross_entropy_with_logits",
                X,
                T(4, 8, values=unit),
                weight=T(4, 1, values="positive", grad=False),
                reduction=how,
                pos_weight=CLASS_WEIGHT,
                splits="d0 d1",
            ),
            Sample(F + "kl_div", T(4, 8, values=log_probabilities), T(4, 8, values=probabilities), reduction=how, splits="d0 d1"),
            Sample(F + "kl_div", X, T(4, 8, values=log_probabilities), reduction=how, log_target=True, splits="d0 d1"),
            Sample(F + "mse_loss", X, T(8), reduction=how, splits="d0 d1"),
            Sample(F + "mse_loss", X, T(4, 1), reduction=how, splits="d0 d1"),
            Sample(F + "huber_loss", X, T(1, 8), reduction=how, delta=0.3, splits="d0 d1"),
            *(Sample(F + n, X, X, reduction=how, splits="d0 d1") for n in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")),
            *(
                Sample(F + n, X, T(4, 8, values=sign, grad=False), reduction=how, splits="d0 d1")
                for n in ("soft_margin_loss", "hinge_embedding_loss")
            ),
            Sample(F + "poisson_nll_loss", X, T(4, 8, values="positive"), reduction=how, splits="d0 d1"),
            Sample(F + "gaussian_nll_loss", X, X, T(4, 8, values="positive"), reduction=how, splits="d0 d1"),
            Sample(F + "margin_ranking_loss", T(8), T(8), T(8, values=sign, grad=False), margin=0.1, reduction=how, splits="d0"),
            Sample(F + "cosine_embedding_loss", T(8, 6), T(8, 6), T(8, values=sign, grad=False), 0.1, reduction=how, splits="n"),
            Sample(F + "triplet_margin_loss", T(8, 6), T(8, 6), T(8, 6), reduction=how, splits="n"),
            Sample(F + "multi_margin_loss", T(8, 6), T(8, values=6), reduction=how, splits="n"),
            Sample(F + "multilabel_margin_loss", T(8, 4), T(8, 4, values=orders), reduction=how, splits="n"),
            Sample(F + "multilabel_soft_margin_loss", T(8, 4), T(8, 4, values=unit, grad=False), reduction=how, splits="n"),
        )
    ),
    Sample(CE, X, INDEX, splits="n0 c"),
    Sample(CE, X, INDEX, None, None, -100, None, "mean", 0.0, splits="n0 c"),
    Sample(F + "mse_loss", X, X, splits="d0 d1"),
    Sample(F + "kl_div", T(4, 8, values=log_probabilities), T(4, 8, values=probabilities), reduction="batchmean", splits="d0 d1"),
    Sample(F + "kl_div", X3, T(4, 8, 4, values=probabilities), None, None, "batchmean", splits="d0 d1 d2"),
]
