"""Rules of ops that make tensors: zeros, full, new_zeros, ones_like, arange.
Must not know random ones: they are another table.
"""

from __future__ import annotations

from autopar.rules.case import Case, NoRule
from autopar.rules.recipe import Emitted, Recipe, Split
from autopar.rules.registry import rule
from autopar.rules.views import names, term


def filled(c: Case, *like: str) -> Recipe:
    """The same number everywhere: each rank makes its own shard."""
    if len(c["size"]) != len(c.outputs[0].shape):
        raise NoRule("not a shape")
    return c.make(dict.fromkeys(like, "?"), term(names(len(c.outputs[0].shape))))


def local_size(c: Case, recipe: Recipe, splits: tuple[Split, ...]) -> Emitted:
    return c.emitted(size=c.local_sizes(recipe, splits, c["size"]))


@rule("zeros", "ones", "empty", args="*size")
def zeros(c: Case) -> Recipe:
    return filled(c)


@rule("new_zeros", "new_ones", "new_empty", args="input|self, *size")
def new_zeros(c: Case) -> Recipe:
    return filled(c)


@rule("full", args="size, fill_value")
def full(c: Case) -> Recipe:
    return filled(c)


@rule("new_full", args="input|self, size, fill_value")
def new_full(c: Case) -> Recipe:
    return filled(c)


for made in (zeros, new_zeros, full, new_full):
    made.local(local_size)


@rule("ones_like", "empty_like", "full_like", args="input|self, fill_value=0")
def ones_like(c: Case) -> Recipe:
    row = term(names(len(c.outputs[0].shape)))
    return c.make({"input": row, "fill_value": "?"}, row)


@rule("fill", "zero", args="input|self, value=0")
def fill(c: Case) -> Recipe:
    row = term(names(len(c.outputs[0].shape)))
    return c.make({"input": row, "value": "?"}, row)


WHOLE = "arange linspace logspace range eye tensor as_tensor new_tensor scalar_tensor tril_indices triu_indices"


@rule(*WHOLE.split())
def whole(c: Case) -> Recipe:
    return c.unsplit()
