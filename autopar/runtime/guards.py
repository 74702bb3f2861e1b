"""Checks that generated code runs on its inputs: the guards of the trace, and the shapes that were baked in.
Must not know how the checks were found; each arrives with the user's line and text.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from autopar.errors import GuardError, LayoutError

_warned: set[tuple[str, str]] = set()


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    try:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.shape == b.shape and bool((a == b).all())
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(map(_same, a, b))
        equal = a == b
        if hasattr(equal, "all"):
            return bool(equal.all())
        return bool(equal) or (a != a and b != b)  # nan is as nan
    except (TypeError, ValueError, RuntimeError):
        return False


def guard(actual: Any, expected: Any, where: str, text: str, mode: str = "error") -> None:
    """The value that the program read while it was traced, against the value now.

    mode 'error' raises GuardError with the line and both values, 'warn' warns once per line, 'off' does nothing.
    """
    if mode == "off" or _same(actual, expected):
        return
    message = (
        f"{where}: `{text}` is {actual!r}, but was {expected!r} when the model was traced: this input takes another path than the "
        f"generated code. Trace with a dummy input like this one, or set guards='warn' or 'off' if the difference does not matter."
    )
    if mode == "error":
        raise GuardError(message)
    if mode != "warn":
        raise LayoutError(f"unknown guards mode {mode!r}; write 'error', 'warn' or 'off'")
    if (where, text) not in _warned:
        _warned.add((where, text))
        warnings.warn(message, stacklevel=3)


def check_mode(training: bool, traced: bool, where: str, text: str) -> None:
    """Raise GuardError unless the module is in the mode it was traced in, naming the line at which the other mode parts from it."""
    if training is not traced:
        now, then = ("train", "eval") if training else ("eval", "train")
        raise GuardError(
            f"{where}: `{text}` takes another path in {now} mode, but this code was generated from the module in {then} mode. Call "
            f".{'train' if traced else 'eval'}() on it, or generate code for {now} mode too: parallelize the module in {now} mode with "
            f"instance_name='{now}'."
        )


def check_input(name: str, value: Any, shape: tuple[int | None, ...] | None = None, dtype: torch.dtype | None = None) -> None:
    """Raise GuardError unless value is a tensor of this shape (None: any) and dtype, naming both."""
    if not isinstance(value, torch.Tensor):
        raise GuardError(f"input {name!r} is {type(value).__name__} {value!r:.60}; the code was generated for a tensor")
    if dtype is not None and value.dtype != dtype:
        raise GuardError(f"input {name!r} has dtype {value.dtype}; the code was generated for {dtype}. Convert it before the call.")
    if shape is None:
        return
    if len(shape) != value.dim() or any(n is not None and n != m for n, m in zip(shape, value.shape, strict=True)):
        wanted = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
        raise GuardError(
            f"input {name!r} has shape {tuple(value.shape)}; the code was generated for {wanted}. "
            f"Generate it with constant_folding=False to allow other sizes, or with a dummy input of this shape."
        )


def check_divisible(size: int, parts: int, what: str) -> None:
    """Raise LayoutError unless size splits evenly into parts."""
    if size % parts:
        raise LayoutError(f"{what} has size {size}, which does not split evenly into {parts} parts")
