"""A Block with one op, made from a call with concrete tensors, and the running of such ops. For the prover and tests.
Must not know rules or splits.
"""

from __future__ import annotations

import builtins
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from autopar.ir.graph import AxisRef, Block, Op, Ref, Source, Struct, Value, op_outputs, refs
from autopar.rules.recipe import Scaled, TrainingOnly

# qualified name -> function of ops registered by users, also those defined inside functions; and of ops that only graphs have
functions: dict[str, Any] = {"autopar:select_training": lambda in_training, otherwise: in_training}


@dataclass(frozen=True)
class Scalar:
    """A number that is a run-time scalar of the block, not a literal."""

    value: int | float


@dataclass(frozen=True)
class Constant:
    """A floating tensor that carries no gradient: a class weight, a running statistic."""

    value: torch.Tensor


@dataclass(frozen=True)
class OneOp:
    """`values` holds the tensors and numbers the op's Refs stand for."""

    block: Block
    op: Op
    values: dict[int, Any]


def resolve(fn: str) -> Callable[..., Any]:
    """The callable of a qualified op name."""
    if fn in functions:
        return functions[fn]
    if fn.startswith("ap."):
        return getattr(importlib.import_module("autopar.runtime.functional"), fn[3:])
    if ":" in fn:
        module, _, qual = fn.removeprefix("apply:").partition(":")
        found: Any = importlib.import_module(module)
        for part in qual.split("."):
            found = getattr(found, part)
        return found.apply if fn.startswith("apply:") else found
    parts = fn.removesuffix(".__get__").split(".")
    for n in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        for part in parts[n:]:
            found = getattr(found, part)
        return found if callable(found) else lambda x: getattr(x, parts[-1])
    return getattr(builtins, fn)


def writes_first(fn: str, kwargs: dict[str, Any]) -> bool:
    """Whether a torch op writes its first tensor in place."""
    last = fn.rpartition(".")[2]
    if last.startswith("__"):
        return last == "__setitem__" or (last.startswith("__i") and last not in ("__invert__", "__index__", "__int__", "__iter__"))
    return ":" not in fn and (last.endswith("_") or kwargs.get("inplace") is True)


def leaves(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, (tuple, list)):
        return [t for x in tree for t in leaves(x)]
    if isinstance(tree, dict):
        return [t for x in tree.values() for t in leaves(x)]
    return []


def one_op(fn: str, *args: Any, **kwargs: Any) -> OneOp:
    """Run a call and describe it as the tracer would. Every use of a tensor is a value of its own; floating ones carry a gradient."""
    values: list[Value] = []
    bound: dict[int, Any] = {}

    def add(x: Any, name: str) -> Ref:
        constant = isinstance(x, Constant)
        x = x.value if isinstance(x, (Constant, Scalar)) else x
        tensor = isinstance(x, torch.Tensor)
        dtype = str(x.dtype).removeprefix("torch.") if tensor else type(x).__name__
        grad = tensor and not constant and (x.is_floating_point() or x.is_complex())
        values.append(Value(len(values), name, "tensor" if tensor else "scalar", tuple(x.shape) if tensor else (), dtype, grad))
        bound[values[-1].id] = x
        return Ref(values[-1].id)

    def refer(x: Any) -> Any:
        return add(x, f"x{len(values)}") if isinstance(x, (Scalar, Constant, torch.Tensor)) else x

    spec_args, spec_kwargs = _map(args, refer), _map(kwargs, refer)
    inputs = tuple(bound)
    given: dict[int, Any] = {}

    def plainly(x: Any) -> Any:
        if isinstance(x, (Scalar, Constant, torch.Tensor)):
            i = inputs[len(given)]
            given[i] = bound[i].clone() if values[i].is_tensor else bound[i]
            return given[i]
        return x

    plain = _map((args, kwargs), plainly)
    result = resolve(fn)(*plain[0], **plain[1])
    before = len(values)
    writes: tuple[tuple[int, int], ...] = ()
    if writes_first(fn, kwargs):
        first = next(i for i in inputs if values[i].is_tensor)
        new = add(leaves(plain)[0], "y")
        writes = ((first, new.id),)
        out: Any = None if result is None else new
    else:
        out = _map(tuple(result) if isinstance(result, tuple) else result, lambda x: add(x, "y") if isinstance(x, torch.Tensor) else x)
        # Running statistics and the like: arguments that the call has changed.
        for i in inputs:
            if values[i].is_tensor and not torch.equal(given[i], bound[i]):
                writes += ((i, add(Constant(given[i]), "y").id),)
    outputs = tuple(range(before, len(values)))
    for i in outputs:
        bound.pop(i)
    op = Op(fn.rpartition(".")[2], fn, spec_args, spec_kwargs, out, "", Source("<sample>", 1, fn, ""), writes=writes)
    block = Block("OneOp", "", inputs, outputs, (), tuple(values), (op,))
    return OneOp(block, op, bound)


def _map(tree: Any, f: Callable[[Any], Any]) -> Any:
    """f on every leaf of tuples, lists, dicts, slices."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(_map(x, f) for x in tree) if type(tree) in (tuple, list) else tuple(_map(x, f) for x in tree)
    if isinstance(tree, dict):
        return {k: _map(v, f) for k, v in tree.items()}
    if isinstance(tree, slice):
        return slice(_map(tree.start, f), _map(tree.stop, f), _map(tree.step, f))
    if isinstance(tree, Struct):
        return Struct(tree.cls, tree.names, tuple(_map(x, f) for x in tree.items))
    return f(tree)


def run(one: OneOp, fn: str, args: Any, kwargs: Any, values: dict[int, Any], axes: Any = None) -> list[torch.Tensor]:
    """Run a (local) form of the op on other values; the tensors come in the order of op_outputs."""

    def fill(x: Any) -> Any:
        if isinstance(x, Ref):
            return values[x.id]
        if isinstance(x, Scaled):
            return fill(x.ref) // x.divisor
        if isinstance(x, TrainingOnly):
            return x.value
        return axes[x.name] if isinstance(x, AxisRef) else x

    result = resolve(fn)(*_map(args, fill), **_map(kwargs, fill))
    found = leaves(result) if one.op.out is not None else []
    made = {r.id for r in refs(one.op.out)}
    found += [values[old] for old, new in one.op.writes if new not in made]
    assert len(found) == len(op_outputs(one.block, one.op)), "the local form returns another number of tensors"
    return found
