"""Arguments: what a module's forward calls the tensors it is given, and the tensors in what it returns.
Must not know values or recordings; the caller turns tensors into ids.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch

from autopar.trace import symbolic


def named_values(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], known: Callable[[Any], int | None]
) -> tuple[tuple[int, str], ...]:
    """(id, name) of every tensor and symbolic number among a call's arguments that is known.

    An element of a container has the name that forward unpacks it to (`cos, sin = position_embeddings`), otherwise
    'position_embeddings[0]', which is no identifier.
    """
    forward = module.forward
    function = getattr(forward, "__func__", forward)
    found: dict[int, str] = {}
    for name, value in _bound(_parameters(function), args, kwargs):
        for x, label in _leaves(value, name, function):
            vid = known(x)
            if vid is not None:
                found.setdefault(vid, label)
    return tuple(found.items())


def tensors_in(x: Any) -> Iterator[torch.Tensor]:
    """Tensors of a module's result, in a fixed order."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for v in x:
            yield from tensors_in(v)
    elif isinstance(x, Mapping):
        for v in x.values():
            yield from tensors_in(v)
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        for f in dataclasses.fields(x):
            yield from tensors_in(getattr(x, f.name, None))


def _bound(names: tuple[tuple[str, ...], str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    positional, rest = names
    yield from zip(positional, args, strict=False)
    for i, extra in enumerate(args[len(positional) :]):
        yield f"{rest}[{i}]", extra
    yield from kwargs.items()


def _leaves(x: Any, name: str, function: Any) -> Iterator[tuple[Any, str]]:
    if isinstance(x, torch.Tensor) or type(x) in symbolic.SCALARS:
        yield x, name
    elif type(x) in (tuple, list):
        unpacked = _unpacked(function).get((name, len(x)), ())
        for i, v in enumerate(x):
            yield from _leaves(v, unpacked[i] if unpacked else f"{name}[{i}]", function)
    elif type(x) is dict:
        for k, v in x.items():
            yield from _leaves(v, f"{name}[{k}]", function)


@lru_cache(maxsize=4096)
def _parameters(function: Any) -> tuple[tuple[str, ...], str]:
    """Names of the positional parameters after self, and of *args."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return (), "args"
    if inspect.isfunction(inspect.unwrap(function)) and found and found[0].name == "self":
        found = found[1:]
    names = tuple(p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    return names, next((p.name for p in found if p.kind is p.VAR_POSITIONAL), "args")


@lru_cache(maxsize=4096)
def _unpacked(function: Any) -> dict[tuple[str, int], tuple[str, ...]]:
    """(parameter, length) -> names, for every statement `a, b = parameter` of the function."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}
    out: dict[tuple[str, int], tuple[str, ...]] = {}
    for n in ast.walk(tree):
        if isinstance(n, ast.Assign) and isinstance(n.value, ast.Name) and isinstance(t := n.targets[0], ast.Tuple):
            names = tuple(e.id for e in t.elts if isinstance(e, ast.Name))
            if len(names) == len(t.elts):
                out.setdefault((n.value.id, len(names)), names)
    return out
