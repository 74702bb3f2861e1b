"""Trees: arguments and results of any Python shape, as trees of Ref and literals (ir.graph), and the forward's signature.
Must not know ops or strategies; the caller says what a tensor becomes.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from autopar.errors import TraceError, suggest
from autopar.ir.graph import Argument, Global, Struct
from autopar.trace import symbolic
from autopar.trace.names import import_name, qualified

LITERALS = frozenset(
    (type(None), bool, int, float, complex, str, type(Ellipsis), torch.dtype, torch.device, torch.layout, torch.memory_format, Global)
)
OPAQUE = Global("autopar:opaque")  # an object that generated code cannot make
MISSING = inspect.Parameter.empty


def encode(x: Any, leaf: Callable[[Any], Any], what: str) -> Any:
    """The tree of x; leaf(x) is called for tensors and symbolic scalars. Raises TraceError naming `what` for other objects."""
    kind = type(x)
    if kind in LITERALS:
        return x
    if isinstance(x, torch.Tensor) or kind in symbolic.SCALARS:
        return leaf(x)
    if kind in (tuple, torch.Size):
        return tuple([encode(i, leaf, what) for i in x])
    if kind is list:
        return [encode(i, leaf, what) for i in x]
    if kind is dict:
        return {_key(k, what): encode(v, leaf, f"{what}[{k!r}]") for k, v in x.items()}
    if kind is slice:
        return slice(encode(x.start, leaf, what), encode(x.stop, leaf, what), encode(x.step, leaf, what))
    if kind is range:
        return list(x)
    if isinstance(x, enum.Enum):
        return Global(f"{import_name(kind)}.{x.name}")
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, tuple):
        if hasattr(kind, "_fields"):
            return Struct(
                import_name(kind), tuple(kind._fields), tuple(encode(i, leaf, f"{what}.{n}") for n, i in zip(kind._fields, x, strict=True))
            )
        return tuple([encode(i, leaf, what) for i in x])  # torch.return_types
    if isinstance(x, Mapping) and all(isinstance(k, str) for k in x):
        return Struct(import_name(kind), tuple(x), tuple(encode(v, leaf, f"{what}.{k}") for k, v in x.items()))
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        names = tuple(f.name for f in dataclasses.fields(x) if f.init)
        return Struct(import_name(kind), names, tuple(encode(getattr(x, n), leaf, f"{what}.{n}") for n in names))
    if isinstance(x, (types.FunctionType, types.BuiltinFunctionType, type)):
        return Global(import_name(x))
    for base in (bool, int, float, str):
        if isinstance(x, base):
            return base(x)
    hint = "; call the model with use_cache=False" if kind.__name__.endswith("Cache") else ""
    raise TraceError(
        f"{what} is a {qualified(kind)}, which generated code cannot hold{hint or ' (tensors, numbers, containers and dataclasses can)'}"
    )


def encode_what_can(x: Any, leaf: Callable[[Any], Any]) -> Any:
    """The tree of x with OPAQUE for every part that has none."""
    try:
        return encode(x, leaf, "the result")
    except TraceError:
        if type(x) in (tuple, list):
            return type(x)([encode_what_can(v, leaf) for v in x])
        if isinstance(x, Mapping) and all(isinstance(k, str) for k in x):
            items = {k: encode_what_can(v, leaf) for k, v in x.items()}
            return items if type(x) is dict else Struct(import_name(type(x)), tuple(items), tuple(items.values()))
        return OPAQUE


def _key(k: Any, what: str) -> Any:
    if type(k) not in LITERALS:
        raise TraceError(f"{what} has a key of type {qualified(type(k))}; use strings or numbers")
    return k


def call_of(module: torch.nn.Module, given: Mapping[str, Any]) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """The forward's parameters and the value of each that is given; var_positional as a tuple, var_keyword as a dict.

    Raises TraceError for a name forward does not take and for a required argument that is missing.
    """
    code = getattr(inspect.unwrap(module.forward), "__code__", None)
    where = f"{type(module).__qualname__}.forward" + (f" ({code.co_filename}:{code.co_firstlineno})" if code else "")
    params = list(inspect.signature(module.forward).parameters.values())
    names = [p.name for p in params]
    extra = next((p for p in params if p.kind is p.VAR_KEYWORD), None)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key in names:
            values[key] = value
        elif extra is not None:
            values.setdefault(extra.name, {})[key] = value
        else:
            raise TraceError(f"{where} has no argument {key!r}: {suggest(key, names)}")
    if extra is not None and extra.name in given:
        named = given[extra.name]
        if not isinstance(named, Mapping):
            raise TraceError(f"{where}: {extra.name!r} takes a dict of keyword arguments, not a {type(named).__name__}")
        values[extra.name] = {**named, **{k: v for k, v in given.items() if k not in names}}
    missing = [p.name for p in params if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.default is MISSING and p.name not in values]
    if missing:
        by_name = "; positional-only arguments are given by name too" if any(p.kind is p.POSITIONAL_ONLY for p in params) else ""
        them = "it" if len(missing) == 1 else "them"
        raise TraceError(f"{where} needs {', '.join(map(repr, missing))}: add {them} to dummy_forward_args{by_name}")
    return params, values


def bind(params: list[inspect.Parameter], values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """(args, kwargs) that call forward with these values, by keyword where possible."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    rest = next((p.name for p in params if p.kind is p.VAR_POSITIONAL), None)
    by_position = bool(rest is not None and values.get(rest))
    for p in params:
        if p.name not in values:
            if by_position and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
                args.append(p.default)
            continue
        v = values[p.name]
        if p.kind is p.VAR_POSITIONAL:
            args.extend(v)
        elif p.kind is p.VAR_KEYWORD:
            kwargs.update(v)
        elif p.kind is p.POSITIONAL_ONLY or (by_position and p.kind is p.POSITIONAL_OR_KEYWORD):
            args.append(v)
        else:
            kwargs[p.name] = v
    return args, kwargs


def argument(p: inspect.Parameter, tree: Any, given: bool) -> Argument:
    """The Argument of one parameter; a default that is no literal is recorded by its importable name."""
    kinds = {p.VAR_POSITIONAL: "var_positional", p.VAR_KEYWORD: "var_keyword", p.KEYWORD_ONLY: "keyword"}
    has = p.default is not MISSING
    default = encode(p.default, _no_tensor, f"the default of forward argument {p.name!r}") if has else None
    return Argument(p.name, kinds.get(p.kind, "positional"), tree, given, default, has)


def _no_tensor(x: Any) -> Any:
    raise TraceError("forward has a tensor as a default argument; pass it in dummy_forward_args or make it a buffer")


def map_inputs(x: Any, f: Callable[[torch.Tensor, str], Any], path: str) -> Any:
    """A copy of an input with f(tensor, path) at its tensors; containers keep their kind."""
    kind = type(x)
    if isinstance(x, torch.Tensor):
        return f(x, path)
    if kind in (tuple, list):
        return kind([map_inputs(v, f, f"{path}_{i}") for i, v in enumerate(x)])
    if kind is dict:
        return {k: map_inputs(v, f, f"{path}_{k}") for k, v in x.items()}
    if isinstance(x, tuple) and hasattr(kind, "_fields"):
        return kind(*[map_inputs(v, f, f"{path}_{n}") for n, v in zip(kind._fields, x, strict=True)])
    if isinstance(x, Mapping) and all(isinstance(k, str) for k in x):
        return kind(**{k: map_inputs(v, f, f"{path}_{k}") for k, v in x.items()})
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        names = [d.name for d in dataclasses.fields(x) if d.init]
        return kind(**{n: map_inputs(getattr(x, n), f, f"{path}_{n}") for n in names})
    return x
