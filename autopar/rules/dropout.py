"""Rules of random ops. Split ones draw other numbers for other shards; the rest draw the same numbers on every rank.
Must not know how streams are seeded: runtime/functional_random.py.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.rules.case import Case
from autopar.rules.recipe import Emitted, Recipe, Split
from autopar.rules.registry import rule
from autopar.rules.terms import shards, term


@rule(
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
    args="input, p=0.5, training|train=True, inplace=False",
)  # fmt: skip
def dropout(c: Case) -> Recipe:
    if not isinstance(c["p"], (int, float)):
        return replace(c.unsplit(), random=True)
    same = term(c.inputs[0].shape)
    linear = [] if "alpha" in c.name and active(c) else [("input",)]
    return c.make({"input": same}, same, linear=linear, random=active(c))


def active(c: Case) -> bool:
    return c["p"] != 0 and c["training"] is not False


@dropout.local
def _(c: Case, recipe: Recipe, splits: tuple[Split, ...]) -> Emitted:
    if not active(c):
        return c.emitted()
    kwargs = {"p": c["p"], "training": c["training"], "shards": shards(recipe, splits, recipe.outputs[0])}
    if c["inplace"]:
        kwargs["inplace"] = True
    return Emitted(f"ap.{c.name}", (c["input"],), kwargs)


@rule("rand_like", "randn_like", args="input")
def like(c: Case) -> Recipe:
    same = term(c.inputs[0].shape)
    return c.make({"input": same}, same, random=True)


@like.local
def _(c: Case, recipe: Recipe, splits: tuple[Split, ...]) -> Emitted:
    return c.emitted(fn=f"ap.{c.name}", shards=shards(recipe, splits, recipe.outputs[0]))


RANDOM = """
bernoulli multinomial rand randn randint randperm normal poisson binomial randint_like uniform random exponential geometric
cauchy log_normal gumbel_softmax rrelu fractional_max_pool1d fractional_max_pool2d fractional_max_pool3d feature_dropout
trunc_normal dirichlet
""".split()  # noqa: SIM905


@rule(*RANDOM)
def unsplit_random(c: Case) -> Recipe:
    return replace(c.unsplit(), random=True)
