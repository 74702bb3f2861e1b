"""fill: a dataclass from nested dicts by its type hints: unknown keys, wrong types, names from a list, numbers too small.
Must not know which dataclasses there are, nor where the values came from (it is told a text to quote).
"""

from __future__ import annotations

import ast
import difflib
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from autopar.errors import ConfigError, suggest

Origins = Mapping[str, str]  # dotted key -> 'config.yaml:12' or 'command line'
_WORDS = {"true": True, "false": False, "null": None}
_FAILED = object()


@dataclass(frozen=True)
class AtLeast:
    """Of a number, in Annotated[int, AtLeast(1)]."""

    least: float


def fill(hint: Any, value: Any, where: str = "", origins: Origins | None = None) -> Any:
    """`value` as the type that `hint` describes. Dataclasses may be given as dicts; one that is given as such is checked and copied.

    Texts are read as Python literals where no text is expected. Raises ConfigError with the dotted key, and where it was set.
    """
    origins = origins or {}
    made = _convert(hint, value, where, origins)
    if made is _FAILED:
        raise ConfigError(f"{located(where, origins)} is {value!r:.80}; it must be {describe(hint)}")
    return made


def guess(text: str) -> Any:
    """A text as the Python literal it spells, true, false and null included; else the text."""
    if text in _WORDS:
        return _WORDS[text]
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def located(where: str, origins: Origins) -> str:
    """'model.type (config.yaml:12)': with where it, or the nearest part around it, was set."""
    parts = where.split(".")
    known = (origins.get(".".join(parts[:n])) for n in range(len(parts), -1, -1))
    origin = next((o for o in known if o), "")
    return (where or "the configuration") + (f" ({origin})" if origin else "")


def _convert(hint: Any, value: Any, where: str, origins: Origins) -> Any:
    """The value as the hint says, or _FAILED. Raises for what is wrong inside of it."""
    kind = get_origin(hint)
    if hint is Any:
        return value
    if kind is Annotated:
        inner, *limits = get_args(hint)
        made = _convert(inner, value, where, origins)
        for limit in limits:
            if made is not _FAILED and not made >= limit.least:
                return _FAILED
        return made
    if kind in (Union, types.UnionType):
        return _union(get_args(hint), value, where, origins)
    if is_dataclass(hint):
        return _dataclass(hint, value, where, origins)
    if kind is Literal:
        if isinstance(value, str) and value not in get_args(hint):
            raise ConfigError(f"{located(where, origins)}: unknown name {value!r:.60}: {suggest(value, get_args(hint))}")
        return value if isinstance(value, str) else _FAILED
    if kind is dict or kind is list:
        return _container(hint, _literal(value), where, origins)
    if hint is Callable or kind is get_origin(Callable[..., Any]):
        return value if callable(value) else _FAILED
    if hint is str:
        return value if isinstance(value, str) else _FAILED
    return _scalar(hint, _literal(value))


def _literal(value: Any) -> Any:
    return guess(value) if isinstance(value, str) else value


def _scalar(hint: Any, value: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int and number and value == value // 1:
        return int(value)
    if hint is float and number:
        return float(value)
    if hint is bool and isinstance(value, bool):
        return value
    return value if hint is type(None) and value is None else _FAILED


def _union(hints: tuple[Any, ...], value: Any, where: str, origins: Origins) -> Any:
    """The first alternative that fits; of several dataclasses the one that knows most of the keys."""
    if type(None) in hints and (value is None or (isinstance(value, str) and value in ("null", "None"))):
        return None
    exact = [h for h in hints if isinstance(h, type) and type(value) is h]  # NB: True is an int as well
    classes = [h for h in hints if is_dataclass(h)]
    if classes and (isinstance(_literal(value), Mapping) or is_dataclass(value)):
        keys = [] if is_dataclass(value) else [str(k) for k in _literal(value)]
        best = max(classes, key=lambda c: (isinstance(value, c), sum(_nearness(k, c) for k in keys)))
        return _convert(best, value, where, origins)
    names = [h for h in hints if get_origin(h) is Literal]
    others = [h for h in hints if h not in names and h is not type(None)]
    for h in exact + others:
        if (made := _convert(h, value, where, origins)) is not _FAILED:
            return made
    return next((_convert(h, value, where, origins) for h in names), _FAILED)


def _nearness(key: str, cls: Any) -> float:
    """1 for a field of the class, less for what is only like one."""
    return max(difflib.SequenceMatcher(None, key, f.name).ratio() for f in fields(cls))


def _dataclass(cls: Any, value: Any, where: str, origins: Origins) -> Any:
    if isinstance(value, cls):
        value = {f.name: getattr(value, f.name) for f in fields(cls)}
    value = _literal(value)
    if not isinstance(value, Mapping):
        return _FAILED
    hints = get_type_hints(cls, include_extras=True)
    known = [f.name for f in fields(cls)]
    for key in value:
        if key not in known:
            raise ConfigError(f"{located(_join(where, key), origins)}: unknown key {key!r}: {suggest(key, known)}")
    made = {k: fill(hints[k], v, _join(where, k), origins) for k, v in value.items()}
    try:
        return cls(**made)
    except ConfigError as e:  # a check of the class itself
        raise ConfigError(f"{located(where, origins)}: {e}") from e


def _container(hint: Any, value: Any, where: str, origins: Origins) -> Any:
    inner = get_args(hint) or (Any,)
    if get_origin(hint) is list:
        if not isinstance(value, (list, tuple)):
            return _FAILED
        return [fill(inner[0], v, _join(where, i), origins) for i, v in enumerate(value)]
    if not isinstance(value, Mapping):
        return _FAILED
    out = {}
    for k, v in value.items():
        key = fill(inner[0], str(k) if inner[0] is str else k, _join(where, k), origins)
        out[key] = fill(inner[1], v, _join(where, k), origins)
    return out


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def describe(hint: Any) -> str:
    """A type as words: 'a whole number of at least 1, or null'."""
    kind = get_origin(hint)
    if kind is Annotated:
        inner, *limits = get_args(hint)
        return describe(inner) + "".join(f" of at least {limit.least:g}" for limit in limits)
    if kind in (Union, types.UnionType):
        parts = [describe(h) for h in get_args(hint)]
        name = describe(Callable)
        parts = [p for p in parts if p != "a text"] if name in parts else parts
        return ", ".join(parts[:-1]) + (" or " if len(parts) > 1 else "") + parts[-1]
    if kind is Literal:
        return " / ".join(get_args(hint))
    if kind is dict:
        keys = get_args(hint)[0]
        return "a dict" if keys is str else f"a dict by {describe(keys)}"
    if kind is list:
        return "a list"
    if is_dataclass(hint):
        return "a dict of settings"
    if hint is Callable or kind is get_origin(Callable[..., Any]):
        return "the name of a class or function"
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(hint, "any value")
