"""Rules of loss functions. Sums and means over split dims are partial sums; a mean divides by the global count.
Must not know the formulas: classes split between ranks are runtime/functional_losses.py.
"""

from __future__ import annotations

from typing import Any

from autopar.rules.case import Case, NoRule
from autopar.rules.recipe import Emitted, Recipe, Split
from autopar.rules.registry import rule
from autopar.rules.terms import aligned, axes_on, one_or_tuple, split_by


def reduction(c: Case) -> str:
    if any(c.args.get(n) is not None for n in ("size_average", "reduce")):
        raise NoRule("size_average and reduce are deprecated")
    how = c["reduction"] or "mean"
    if how not in ("none", "sum", "mean", "batchmean"):
        raise NoRule(f"reduction {how!r}")
    return how


def result(how: str, names: str) -> str:
    return names if how == "none" else ""


def marked(names: str, how: str) -> str:
    """Names of dims that the loss adds up, unless reduction='none'. Numbers and kept names stay."""
    return names if how == "none" else " ".join(n if n.isdigit() or n.endswith("^") else f"{n}+" for n in names.split())


def class_terms(c: Case, kept: bool) -> tuple[str, str]:
    """(term of input, term of the dims without the class)."""
    shape = c.tensor("input").shape
    at = 1 if len(shape) > 1 else 0
    names = [("c^" if kept else "c") if i == at else f"n{i}" for i in range(len(shape))]
    names = ["1" if n == 1 else name for n, name in zip(shape, names, strict=True)]
    return " ".join(names), " ".join(n for i, n in enumerate(names) if i != at)


@rule(
    "cross_entropy",
    args="input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction=None, label_smoothing=0.0",
)
def cross_entropy(c: Case) -> Recipe:
    how = reduction(c)
    target = c.tensor("target")
    if how == "batchmean" or target is None or not isinstance(c["label_smoothing"], (int, float)) or not isinstance(c["ignore_index"], int):
        raise NoRule("cross_entropy of an unknown form")
    full, rest = class_terms(c, kept=False)
    prob = c.is_float(target)
    if prob and target.shape != c.tensor("input").shape:
        raise NoRule("probabilities of another shape than the logits")
    if not prob and len(target.shape) != len(c.tensor("input").shape) - 1:
        raise NoRule("target does not line up with the logits")
    out = marked(rest, how)
    dims = dict(zip(rest.split(), out.split(), strict=True))
    full = " ".join(dims.get(n, n) for n in full.split())
    terms = {"input": full, "target": full if prob else out, "weight": "c"}
    return c.make(terms, result(how, rest), inner=["c"], positional=["c"])


@cross_entropy.local
def _(c: Case, recipe: Recipe, splits: tuple[Split, ...]) -> Emitted:
    how = reduction(c)
    classes = axes_on(splits, recipe, "c")
    batch = tuple(s.ref for s in splits if recipe.parse(s.factor)[0] != "c")
    if not classes:
        if how != "mean":
            return c.emitted()
        if c.is_float(c.tensor("target")):
            return c.emitted(divide=split_by(recipe, splits))
    kwargs: dict[str, Any] = {} if how == "mean" else {"reduction": how}
    if c["weight"] is not None:
        kwargs["weight"] = c["weight"]
    if c["ignore_index"] != -100:
        kwargs["ignore_index"] = c["ignore_index"]
    if c["label_smoothing"] != 0:
        kwargs["label_smoothing"] = c["label_smoothing"]
    if batch and how == "mean":
        kwargs["batch"] = one_or_tuple(batch)
    if classes:
        kwargs["classes"] = one_or_tuple(classes)
    return Emitted("ap.cross_entropy", (c["input"], c["target"]), kwargs)


@rule("nll_loss", args="input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction=None")
def nll_loss(c: Case) -> Recipe:
    if c.op.fn != "torch.nn.functional.nll_loss":
        raise NoRule("another signature")
    how = reduction(c)
    target = c.tensor("target")
    if how == "batchmean" or target is None or not isinstance(c["ignore_index"], int):
        raise NoRule("nll_loss of an unknown form")
    full, rest = class_terms(c, kept=True)
    return c.make({"input": marked(full, how), "target": marked(rest, how), "weight": "c^"}, result(how, rest))


@nll_loss.local
def _(c: Case, recipe: Recipe, splits: tuple[Split, ...]) -> Emitted:
    if reduction(c) != "mean":
        return c.emitted()
    kwargs: dict[str, Any] = {} if c["weight"] is None else {"weight": c["weight"]}
    if c["ignore_index"] != -100:
        kwargs["ignore_index"] = c["ignore_index"]
    return Emitted("ap.nll_loss", (c["input"], c["target"]), {**kwargs, "batch": one_or_tuple(tuple(s.ref for s in splits))})


def elementwise(c: Case, *names: str) -> Recipe:
    """A loss of each entry of the broadcast arguments, then a reduction over all of them."""
    how = reduction(c)
    values = {n: c.tensor(n) for n in names if c.args.get(n) is not None}
    if any(v is None for v in values.values()):
        raise NoRule("an argument is no tensor")
    rank = max(len(v.shape) for v in values.values())
    shape = tuple(max(v.shape[i - rank] if i - rank >= -len(v.shape) else 1 for v in values.values()) for i in range(rank))
    for v in values.values():
        if any(n not in (1, m) for n, m in zip(reversed(v.shape), reversed(shape), strict=False)):
            raise NoRule("shapes do not broadcast")
    if how == "batchmean" and len({v.shape for v in values.values()}) != 1:
        raise NoRule("batchmean of broadcast arguments")
    terms = {n: marked(aligned(v.shape, shape), how) for n, v in values.items()}
    return c.make(terms, result(how, aligned(shape, shape)))


def rows(c: Case, *names: str) -> Recipe:
    """A loss of each row (the leading dim), computed from dims that are not split."""
    how = reduction(c)
    terms = {}
    for i, n in enumerate(names):
        v = c.tensor(n)
        if v is not None:
            kept = " ".join("1" if s == 1 else f"k{i}_{j}^" for j, s in enumerate(v.shape[1:]))
            terms[n] = f"{'1' if v.shape[0] == 1 else marked('n', how)} {kept}"
    if len({c.tensor(n).shape[0] for n in terms}) != 1:
        raise NoRule("rows do not line up")
    if how == "none" and len(c.outputs[0].shape) != 1:
        raise NoRule("more than a number per row")
    return c.make(terms, result(how, "n" if c.tensor(names[0]).shape[0] != 1 else "1"))


def mean(c: Case, recipe: Recipe, splits: tuple[Split, ...]) -> Emitted:
    """The local form of a mean over all dims: one division after the local mean."""
    how = reduction(c)
    if how == "batchmean":
        return c.emitted(divide=split_by(recipe, splits, "d0"))
    return c.emitted(divide=split_by(recipe, splits) if how == "mean" else 1)


TAIL = "size_average=None, reduce=None, reduction=None"


@rule("mse_loss", "l1_loss", args=f"input, target, {TAIL}, weight=None")
def difference(c: Case) -> Recipe:
    if c["weight"] is not None:
        raise NoRule("a mean over weights")
    return elementwise(c, "input", "target")


@rule("smooth_l1_loss", args=f"input, target, {TAIL}, beta=1.0")
def smooth(c: Case) -> Recipe:
    return elementwise(c, "input", "target")


@rule("huber_loss", args="input, target, reduction=None, delta=1.0, weight=None")
def huber(c: Case) -> Recipe:
    if c["weight"] is not None:
        raise NoRule("a mean over weights")
    return elementwise(c, "input", "target")


@rule("binary_cross_entropy", args="input, target, weight=None, size_average=None, reduce=None, reduction=None")
def bce(c: Case) -> Recipe:
    return elementwise(c, "input", "target", "weight")


@rule("binary_cross_entropy_with_logits", args=f"input, target, weight=None, {TAIL}, pos_weight=None")
def bce_with_logits(c: Case) -> Recipe:
    if "functional" not in c.op.fn:
        raise NoRule("another signature")
    return elementwise(c, "input", "target", "weight", "pos_weight")


@rule("kl_div", args=f"input, target, {TAIL}, log_target=False")
def kl_div(c: Case) -> Recipe:
    if "functional" not in c.op.fn:
        raise NoRule("another signature")
    return elementwise(c, "input", "target")


@rule("poisson_nll_loss", args="input, target, log_input=True, full=False, size_average=None, eps=1e-8, reduce=None, reduction=None")
def poisson_nll(c: Case) -> Recipe:
    if "functional" not in c.op.fn:
        raise NoRule("another signature")
    return elementwise(c, "input", "target")


@rule("soft_margin_loss", args=f"input, target, {TAIL}")
def soft_margin(c: Case) -> Recipe:
    return elementwise(c, "input", "target")


@rule("hinge_embedding_loss", args=f"input, target, margin=1.0, {TAIL}")
def hinge(c: Case) -> Recipe:
    if "functional" not in c.op.fn:
        raise NoRule("another signature")
    return elementwise(c, "input", "target")


@rule("margin_ranking_loss", args=f"input1, input2, target, margin=0.0, {TAIL}")
def ranking(c: Case) -> Recipe:
    if "functional" not in c.op.fn:
        raise NoRule("another signature")
    return elementwise(c, "input1", "input2", "target")


@rule("gaussian_nll_loss", args="input, target, var, full=False, eps=1e-6, reduction=None")
def gaussian_nll(c: Case) -> Recipe:
    if any(c.tensor(n) is None or c.tensor(n).shape != c.tensor("input").shape for n in ("target", "var")):
        raise NoRule("variances of another shape")
    return elementwise(c, "input", "target", "var")


@rule("cosine_embedding_loss", args=f"input1, input2, target, margin=0.0, {TAIL}")
def cosine_embedding(c: Case) -> Recipe:
    if "functional" not in c.op.fn or len(c.tensor("input1").shape) != 2:
        raise NoRule("another form")
    return rows(c, "input1", "input2", "target")


@rule("triplet_margin_loss", args=f"anchor, positive, negative, margin=1.0, p=2.0, eps=1e-6, swap=False, {TAIL}")
def triplet(c: Case) -> Recipe:
    if "functional" not in c.op.fn or any(len(c.tensor(n).shape) != 2 for n in ("anchor", "positive", "negative")):
        raise NoRule("another form")
    return rows(c, "anchor", "positive", "negative")


@rule("multi_margin_loss", args=f"input, target, p=1, margin=1.0, weight=None, {TAIL}")
def multi_margin(c: Case) -> Recipe:
    if len(c.tensor("input").shape) != 2:
        raise NoRule("no rows")
    return rows(c, "input", "target")


@rule("multilabel_margin_loss", args=f"input, target, {TAIL}")
def multilabel_margin(c: Case) -> Recipe:
    if len(c.tensor("input").shape) != 2:
        raise NoRule("no rows")
    return rows(c, "input", "target")


@rule("multilabel_soft_margin_loss", args=f"input, target, weight=None, {TAIL}")
def multilabel_soft_margin(c: Case) -> Recipe:
    if len(c.tensor("input").shape) != 2:
        raise NoRule("no rows")
    return rows(c, "input", "target")


for _made in (
    difference, smooth, huber, bce, bce_with_logits, kl_div, poisson_nll, soft_margin, hinge, ranking, gaussian_nll,
    cosine_embedding, triplet, multi_margin, multilabel_margin, multilabel_soft_margin,
):  # fmt: skip
    _made.local(mean)


@rule("ctc_loss", "multilabel_margin_loss_forward", "triplet_margin_with_distance_loss", "linear_cross_entropy")
def unsplit_loss(c: Case) -> Recipe:
    return c.unsplit()
