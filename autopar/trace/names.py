"""Names of callables: the spelling of a traced function in a graph, and back from the spelling to the callable.
Must not know tensors, recordings or generated code: a name only ever means what Python's import system says.

Four forms, all regular: 'torch.nn.functional.linear' (an attribute path under torch, operator, math or builtins),
'torch.Tensor.T.__get__' (a getter), 'package.module:Qual.name' (a user's function), 'apply:package.module:Qual' (Function.apply).
"""

from __future__ import annotations

import builtins
import functools
import importlib
import math
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional

from autopar.errors import TraceError

# NB: the order decides the spelling of functions that live in two places (F.conv2d is torch.conv2d).
_SPACES: tuple[tuple[str, Any], ...] = (
    ("torch.nn.functional", torch.nn.functional),
    ("torch", torch),
    ("torch.Tensor", torch.Tensor),
    ("torch.linalg", torch.linalg),
    ("torch.special", torch.special),
    ("torch.fft", torch.fft),
    ("torch.nn.init", torch.nn.init),
    ("torch.autograd", torch.autograd),
    ("torch._C._nn", torch._C._nn),
    ("torch._C._linalg", torch._C._linalg),
    ("torch._C._special", torch._C._special),
    ("torch._C._fft", torch._C._fft),
    ("torch._VF", torch._VF),
)
_ROOTS = {"torch": torch, "operator": operator, "math": math, "builtins": builtins}


def name_of(func: Any) -> str:
    """The spelling of a callable met while tracing. Raises TraceError if the name would not lead back to it."""
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"torch.ops.{func}"
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return f"torch.Tensor.{func.__self__.__name__}.{name}"
    for space, holder in _SPACES:
        if getattr(holder, name, None) == func:
            return f"{space}.{name}"
    return import_name(func)


def import_name(obj: Any) -> str:
    """'package.module:Qual.name' of a function or class. Raises TraceError if it cannot be imported by that name."""
    module, qual = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    if not module or not qual:
        raise TraceError(f"{obj!r} has no importable name; give the code a function or class at the top level of a module")
    try:
        found = functools.reduce(getattr, qual.split("."), sys.modules.get(module) or importlib.import_module(module))
    except (AttributeError, ImportError):
        found = None
    if found is not obj:
        raise TraceError(
            f"{module}.{qual} cannot be imported by its name; move it to the top level of a module, so that generated code can import it"
        )
    return f"{module}:{qual}"


def qualified(cls: type) -> str:
    """The dotted name of a class, for messages and region headers (it need not be importable)."""
    return f"{cls.__module__}.{cls.__qualname__}"


@functools.cache
def resolve_fn(fn: str) -> Callable[..., Any]:
    """The callable a spelled name stands for. Raises AttributeError or ImportError if there is none."""
    if fn.startswith("apply:"):
        return resolve_fn(fn[6:]).apply  # type: ignore[attr-defined]
    if ":" in fn:
        module, qual = fn.split(":")
        return functools.reduce(getattr, qual.split("."), importlib.import_module(module))
    root, *path = fn.split(".")
    return functools.reduce(getattr, path, _ROOTS[root])
