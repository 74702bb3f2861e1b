"""Rules of embeddings: rows of ids, the vocabulary (a partial sum), the embedding dim.
Must not know how the lookup of a shard works: runtime/functional_embedding.py.
"""

from __future__ import annotations

from autopar.rules.case import Case, NoRule
from autopar.rules.recipe import Emitted, Recipe, Split
from autopar.rules.registry import rule
from autopar.rules.terms import axes_on, one_or_tuple, term


@rule("embedding", args="input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False")
def embedding(c: Case) -> Recipe:
    if c.op.fn != "torch.nn.functional.embedding":
        raise NoRule("torch.embedding takes its arguments in another order")
    if c["max_norm"] is not None or c["scale_grad_by_freq"] or c["sparse"] or len(c.inputs) != 2:
        return c.unsplit()  # they look at the whole weight or at all ids
    ids = term(c.tensor("input").shape, "i")
    return c.make({"input": ids, "weight": "v+ e"}, f"{ids} e", linear=[("weight",)], positional=["v"])


@embedding.local
def _(c: Case, recipe: Recipe, splits: tuple[Split, ...]) -> Emitted:
    vocab = axes_on(splits, recipe, "v")
    if not vocab:
        return c.emitted()
    padding = {} if c["padding_idx"] is None else {"padding_idx": c["padding_idx"]}
    return Emitted("ap.vocab_embedding", (c["input"], c["weight"], one_or_tuple(vocab)), padding)
