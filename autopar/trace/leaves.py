"""Leaves: plain Python functions that a trace records as one op instead of looking inside.
Must not know how calls are recorded: while tracing, patches.py swaps each leaf's code for a call of the tracer.
"""

from __future__ import annotations

import types
from typing import Any, TypeVar

import torch

from autopar.errors import ConfigError

LEAVES: dict[types.FunctionType, None] = {}  # in order of registration

T = TypeVar("T")


def register_leaf(fn: T) -> T:
    """Record every call of `fn` as one op; returns `fn`, so it can be used as a decorator.

    fn: a Python function of any package, also one that others imported already, or an autograd.Function class.
    Functions of torch and torch.library custom ops are one op anyway and are accepted unchanged.
    Raises ConfigError for anything else (a method, a lambda, a local function): generated code must be able to import it.
    """
    target: Any = fn
    if isinstance(target, type) and issubclass(target, torch.autograd.Function):
        return fn  # apply is one op already
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch.library.CustomOpDef, types.BuiltinFunctionType)):
        return fn
    if not isinstance(target, types.FunctionType):
        raise ConfigError(f"{fn!r} is not a plain function or autograd.Function; register the function it calls")
    if "<" in target.__qualname__:
        raise ConfigError(f"{target.__module__}.{target.__qualname__} is a lambda or local function; move it to the top level of a module")
    LEAVES[target] = None
    return fn


def unregister_leaf(fn: Any) -> None:
    """Undo register_leaf; unknown functions are ignored."""
    LEAVES.pop(fn, None)
