"""What generated code does at the edges of a forward: output containers, arguments fixed while tracing, recomputation.
Must not import any stage of the compiler.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as _checkpoint

from autopar.errors import GuardError


@cache
def _importable(name: str) -> Any:
    module, _, qualified = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualified.split("."):
        found = getattr(found, part)
    return found


def struct(cls: str, /, **fields: Any) -> Any:
    """An instance of 'package.module:Class' (dataclass, namedtuple, ModelOutput) with these fields."""
    return _importable(cls)(**fields)


def check_argument(name: str, value: Any, traced: Any) -> None:
    """Raise GuardError unless a non-tensor argument has the value it had while tracing, naming both."""
    if value is traced:
        return
    same = False
    if not isinstance(value, torch.Tensor):
        try:
            same = bool(value == traced) or (value != value and traced != traced)
        except (TypeError, ValueError, RuntimeError):
            same = False
    if not same:
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{value!r:.80}"
        raise GuardError(
            f"argument {name!r} is {shown}, but was {traced!r:.80} when the model was traced; arguments that are no tensors are fixed. "
            f"Trace with a dummy argument like this one."
        )


def check_structure(name: str, value: Any, traced: tuple[Any, ...] | int) -> None:
    """Raise GuardError unless a container has the keys (or the length) it had while tracing."""
    if isinstance(traced, int):
        if not hasattr(value, "__len__") or len(value) != traced:
            raise GuardError(f"argument {name!r} must be a sequence of {traced} items, as when the model was traced; it is {value!r:.80}")
        return
    if not isinstance(value, Mapping):
        raise GuardError(f"argument {name!r} must be a dict with the keys {', '.join(map(repr, traced))}; it is {value!r:.80}")
    if set(value) != set(traced):
        missing = [repr(k) for k in traced if k not in value]
        extra = [repr(k) for k in value if k not in traced]
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has {', '.join(extra)} in addition"] if extra else []
        raise GuardError(f"argument {name!r} {' and '.join(parts)}, unlike when the model was traced")


def checkpoint(fn: Callable[..., Any], *args: Any) -> Any:
    """fn(*args), its intermediate results computed again in the backward instead of kept."""
    return _checkpoint(fn, *args, use_reentrant=False)
