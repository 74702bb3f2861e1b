"""The public register_op and verify_op: rules of users' own functions, and their proof.
Must not know the built-in tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from autopar.errors import RuleError, VerifyError
from autopar.ir.graph import Ref
from autopar.rules import oneop
from autopar.rules.case import Case
from autopar.rules.notation import parse
from autopar.rules.prove import Proof, prove
from autopar.rules.recipe import Recipe
from autopar.rules.registry import Rule, add_rule, find_rule, recipe_of

Notation = str | Callable[..., str]


def qualified(fn: Any) -> str:
    """The name under which the tracer records a leaf: 'pkg.mod:func', 'apply:pkg.mod:Class' or 'torch.ops.ns.name'."""
    if isinstance(fn, str):
        return fn
    if isinstance(fn, type) and issubclass(fn, torch.autograd.Function):
        return f"apply:{fn.__module__}:{fn.__qualname__}"
    if isinstance(fn, torch._ops.OpOverload):
        fn = fn.overloadpacket
    if isinstance(fn, torch._ops.OpOverloadPacket):
        return "torch.ops." + fn._qualified_op_name.replace("::", ".")
    if isinstance(fn, torch._library.custom_ops.CustomOpDef):
        return "torch.ops." + fn._qualname.replace("::", ".")
    if not callable(fn) or not hasattr(fn, "__qualname__"):
        raise RuleError(f"register_op needs a function or a torch.autograd.Function class, got {fn!r}")
    if (fn.__module__ or "").partition(".")[0] in ("torch", "_operator"):
        from autopar.trace.names import name_of

        return name_of(fn)
    return f"{fn.__module__}:{fn.__qualname__}"


def register_op(fn: Any = None, notation: Notation | None = None, *, linear: tuple[tuple[int, ...], ...] = ()) -> Any:
    """Tell autopar how a function of your own may be split; the tracer then records it as one op.

        @autopar.register_op("* k+, n k+ -> * n")
        def my_linear(x, weight): ...

        autopar.register_op(package.function, "b s (h d^) -> b s h d^")
        autopar.register_op(MyAutogradFunction, lambda x, dim: ..., linear=((0,),))

    notation: text (see autopar/rules/notation.py), or a callable that gets the arguments of a call, tensors replaced by
        objects with .shape and .dtype, and returns the text. Arguments that are no tensor are not part of the notation,
        or '?' in their place.
    linear: groups of tensor positions in which the function is jointly linear (then partial sums pass through it).
    Check a notation with verify_op. Raises RuleError where the text does not parse.
    """
    if isinstance(fn, str) and notation is None:
        return lambda f: register_op(f, fn, linear=linear)
    if fn is None and notation is not None:
        return lambda f: register_op(f, notation, linear=linear)
    if notation is None:
        raise RuleError(f"register_op of {qualified(fn)} needs a notation: @register_op('a b -> a b') or register_op(f, 'a b -> a b')")
    if isinstance(notation, str):
        parse(notation)
    from autopar.trace.leaves import register_leaf

    register_leaf(fn)  # first: it refuses what generated code could not import
    name = qualified(fn)
    oneop.functions[name] = fn.apply if name.startswith("apply:") else fn
    add_rule(Rule((name,), None, lambda c: read(c, notation, linear), user=True))
    return fn


def read(c: Case, notation: Notation, linear: tuple[tuple[int, ...], ...] = ()) -> Recipe:
    """The recipe a notation gives one call."""
    if not isinstance(notation, str):
        args, kwargs = oneop._map((c.op.args, c.op.kwargs), lambda x: c.block.values[x.id] if isinstance(x, Ref) else x)
        notation = notation(*args, **kwargs)
    n = parse(notation)
    inputs = n.inputs
    if len(inputs) != len(c.inputs) and len(inputs) <= len(c.op.args) + len(c.op.kwargs):
        # '?' may also stand for the arguments that are no tensor
        given = [*c.op.args, *c.op.kwargs.values()]
        inputs = tuple(t for t, a in zip(inputs, given, strict=False) if t is not None or c.value(a) is not None)
    if len(inputs) == 0 and len(c.inputs) == 1 and not c.inputs[0].shape:
        inputs = (parse_scalar(),)
    bound = type(n)(n.text, inputs, n.outputs, n.kept, n.summed).bind([v.shape for v in c.inputs], [v.shape for v in c.outputs])
    wrong = [g for g in linear if not all(0 <= i < len(c.inputs) for i in g)]
    if wrong:
        raise RuleError(f"notation {n.text!r}: linear={linear} names inputs that do not exist; there are {len(c.inputs)}")
    return Recipe(bound.inputs, bound.outputs, bound.factors, c.groups(linear))


def parse_scalar() -> Any:
    return parse(", -> ").inputs[0]


class OpReport(tuple[Proof, ...]):
    """What verify_op has proven, one Proof per way to split."""

    def __str__(self) -> str:
        worst = max((p.error for p in self), default=0.0)
        return "\n".join([*map(str, self), f"{len(self)} ways to split agree with the whole op, largest error {worst:.1e}"])


def verify_op(fn: Any, notation: Notation | None = None, *inputs: Any, linear: tuple[tuple[int, ...], ...] = (), **kwargs: Any) -> OpReport:
    """Prove a notation on example inputs: for each factor it lets split and 2 and 4 ranks, shards through the function
    and put together again must equal the function of the whole, forward and backward, to 1e-12 in float64.

    notation: None for that of a registered (or built-in) op. Floating inputs are taken in float64; sizes should be
    different multiples of 4. Raises RuleError if the notation does not fit, VerifyError if it is wrong.
    """
    name = qualified(fn)
    if isinstance(fn, str) or name.startswith(("torch.ops.", "apply:")):
        oneop.functions.setdefault(name, oneop.resolve(name) if isinstance(fn, str) else getattr(fn, "apply", fn))
    else:
        oneop.functions[name] = fn
    double = oneop._map(inputs, lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x)
    one = oneop.one_op(name, *double, **kwargs)
    if notation is not None:
        recipe = read(Case(one.block, one.op, name, None), notation, linear)
    else:
        builtin = name if find_rule(name) else f"torch.{name.rpartition(':')[2]}"
        if find_rule(builtin) is None:
            raise RuleError(f"{name} has no rule; give verify_op its notation, or register_op it first")
        recipe = recipe_of(one.block, one.op, strict=True)
        if recipe is None:
            raise RuleError(f"the rule of {name} does not know this form of call; it stays unsplit")
    proofs = prove(one, recipe)
    splits = [p for p in proofs if any(recipe.parse(c)[0] in recipe.factors for c in p.choice)]
    if not splits and not recipe.linear:
        raise RuleError(f"{name}: nothing to verify: no factor may be split and has a size that 2 divides")
    bad = [p for p in proofs if not p.ok]
    if bad:
        raise VerifyError("\n".join([f"{name} is not what its notation says:", *(f"  {p}" for p in bad[:10])]))
    return OpReport(proofs)
