"""The registry of op rules: lookup by canonical name, Recipe of an op, local form of a split op.
Must not know any single op: those are in the tables below, which fill it.

How to write a rule
-------------------
A rule is one function from a `Case` (case.py: the call with its arguments bound by name) to a Recipe:

    @rule("linear", args="input, weight, bias=None")
    def linear(c):
        return c.make({"input": "* k+", "weight": "n k+", "bias": "n"}, "* n", partial_bias=["bias"],
                      linear=[("input", "bias"), ("weight", "bias")], matmul=True, flops=...)

- several canonical names may share a function; `c.name` tells which it is. See `canonical` (names.py).
- `args` is the signature: names in order, 'dim|axis=None' for aliases and defaults, '*size' for f(2, 3) and f((2, 3)),
  a final '...' to accept and ignore anything else. Without args nothing is bound and any call is accepted.
- `c["dim"]` is the raw argument: a literal or a tree with Refs. `c.dim("dim")`, `c.dims("dim")`, `c.number("p")` give
  literals or give up; `c.tensor("bias")` is the Value or None. To give up, raise NoRule or return None: the op is then replicated.
- `c.make` takes notation terms (notation.py) per tensor argument by name, so calls by keyword in any order work.
  Build the terms from `c.inputs[i].shape` where they depend on shapes. `sizes=` gives the sizes of factors that the shapes
  do not tell. `inner=("v",)` marks factors whose emitted form communicates by itself, `positional=` those whose local form
  depends on which entries a rank holds, `nested=` those that may be split inside outer factors of the same dim (Recipe.inner).
- never split what you cannot prove. The prover (prove.py) runs every legal factor on the samples of samples/*.py.

If the local call differs from the global one, add the local form:

    @linear.local
    def _(c, recipe, splits):                   # splits: one Split(axis, size, factor) per mesh axis that splits the op
        return c.emitted(shape=c.local_sizes(recipe, splits, c["shape"]))      # arguments by name, in the user's form

`divisor(recipe, splits, dims, dim)` says by how much a dim is shortened. `c.emitted(fn="ap.vocab_embedding", ...)` emits
another function (for other arguments build Emitted(fn, args, kwargs) yourself; `split.ref` is the axis as an argument).

Put the file into TABLES, and sample calls into samples/<same name>.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

from autopar.errors import RuleError
from autopar.ir.graph import Block, Op
from autopar.rules.case import Case, NoRule, divisor
from autopar.rules.names import canonical
from autopar.rules.recipe import Emitted, Recipe, Split
from autopar.rules.training import at_run_time

__all__ = ["NoRule", "Rule", "canonical", "divisor", "known_ops", "localise", "recipe_of", "rule", "user_rules"]

TABLES = ("elementwise", "matmul", "views", "indexing", "reduce", "create",
    "embedding", "attention", "dropout", "losses", "conv", "pool", "gather", "whole",
)  # fmt: skip
RecipeFunction = Callable[[Case], Recipe | None]
LocalFunction = Callable[[Case, Recipe, tuple[Split, ...]], Emitted]


class Rule:
    """The registration block of one op, or of several that behave alike."""

    def __init__(self, names: tuple[str, ...], args: str | None, recipe: RecipeFunction, user: bool = False) -> None:
        self.names, self.args, self.recipe, self.user = names, args, recipe, user
        self.local_form: LocalFunction | None = None

    def local(self, f: LocalFunction) -> LocalFunction:
        """Decorator: how a split op is emitted, where it differs from the op itself."""
        self.local_form = f
        return f


_rules: dict[str, Rule] = {}
_loaded = False


def rule(*names: str, args: str | None = None) -> Callable[[RecipeFunction], Rule]:
    """Register the rule of canonical names; see the module's docstring."""

    def register(f: RecipeFunction) -> Rule:
        made = Rule(names, args, f)
        for n in names:
            assert n not in _rules, f"two rules for {n}"
            _rules[n] = made
        return made

    return register


def add_rule(made: Rule) -> None:
    """Put a rule in place, replacing an older one (users' ops)."""
    _load()
    for n in made.names:
        _rules[n] = made


def _load() -> None:
    global _loaded
    if not _loaded:
        _loaded = True
        for t in TABLES:
            import_module(f"autopar.rules.{t}")


def find_rule(fn: str) -> Rule | None:
    """The rule of a qualified or canonical op name."""
    _load()
    return _rules.get(fn) or _rules.get(canonical(fn))


def known_ops() -> tuple[str, ...]:
    """Canonical names of all ops that have a rule."""
    _load()
    return tuple(sorted(_rules))


def user_rules() -> dict[str, Rule]:
    """The rules that register_op made."""
    return {n: r for n, r in _rules.items() if r.user}


def recipe_of(block: Block, op: Op, *, strict: bool = False) -> Recipe | None:
    """What is known of an op; None if nothing is, then it stays replicated. A rule that fails counts as none,

    except that the notation of a user's op that does not fit raises RuleError, and `strict` (tests) hides nothing.
    """
    found = find_rule(op.fn)
    if found is None:
        return None
    try:
        c = Case(block, op, canonical(op.fn), found.args)
        if op.whole:
            return c.unsplit()
        recipe = found.recipe(c)
    except NoRule:
        return None
    except RuleError as e:
        if found.user:
            raise RuleError(f"{op.fn} at {op.src}: {e}") from None
        if strict:
            raise
        return None
    except Exception:
        if strict or found.user:
            raise
        return None
    if recipe is not None and (len(recipe.inputs), len(recipe.outputs)) != (len(c.inputs), len(c.outputs)):
        assert not strict, (op, recipe)
        return None
    return recipe


def localise(block: Block, op: Op, recipe: Recipe, splits: tuple[Split, ...]) -> Emitted:
    """The local form of an op that the given axes split. Raises RuleError if a size is not divisible."""
    for s in splits:
        if not recipe.legal(s.factor):
            raise RuleError(f"{op.id} ({op.src}): cannot be split on {s.factor!r}; it can on {recipe.choices(1) or 'nothing'}")
    args, kwargs = at_run_time(op)  # also where nothing is split
    op = replace(op, args=args, kwargs=kwargs)
    found = find_rule(op.fn)
    if not splits or found is None or found.local_form is None:
        return Emitted(op.fn, op.args, op.kwargs)
    local = found.local_form(Case(block, op, canonical(op.fn), found.args), recipe, splits)
    # NB: a slice of a contiguous tensor need not be contiguous, so a view of it may need a copy.
    if local.fn == "torch.Tensor.view":
        kwargs = {"shape" if k == "size" else k: v for k, v in local.kwargs.items()}
        return replace(local, fn="torch.Tensor.reshape", kwargs=kwargs)
    return local
