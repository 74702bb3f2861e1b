"""Components from a configuration: an object from a type's name and arguments, with __type, __value_type and literals in texts.
Must not know which components there are, nor import torch.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from autopar.errors import AutoparError, ConfigError, suggest
from autopar.importing import find
from autopar.train.fill import guess

TYPE, CAST, VALUE = "__type", "__value_type", "value"


def locate(name: str | Callable[..., Any], where: str) -> Callable[..., Any]:
    """The class or function that a setting names. Raises ConfigError with the setting, and which part of the name failed."""
    found = find(name, f"{where} {name!r}") if isinstance(name, str) else name
    if not callable(found):
        raise ConfigError(f"{where} {name!r} is {found!r:.60}; it must be a class or function")
    return found


def create(make: Callable[..., Any], args: Mapping[str, Any], where: str, *first: Any, **given: Any) -> Any:
    """make(*first, **args, **given), with the arguments of the configuration resolved. `given` wins.

    Raises ConfigError for arguments that do not fit; an error inside of the component says which one it was.
    """
    own = {k: resolve(v, f"{where}.{k}") for k, v in args.items()}
    check_call(make, own, where, first, given)
    try:
        return make(*first, **{**own, **given})
    except AutoparError:
        raise
    except Exception as e:
        e.add_note(f"while making {where.rpartition('.')[0] or where} ({_name(make)})")
        raise


def resolve(value: Any, where: str) -> Any:
    """A value of the configuration as the object it stands for: texts are read as literals; see docs/configuration.md."""
    if isinstance(value, str):
        return guess(value)
    if isinstance(value, (list, tuple)):
        return type(value)(resolve(v, f"{where}.{i}") for i, v in enumerate(value))
    if not isinstance(value, Mapping):
        return value
    if TYPE in value:
        make = locate(value[TYPE], f"{where}.{TYPE}")
        return create(make, {k: v for k, v in value.items() if k != TYPE}, where)
    if CAST in value:
        return _cast(value, where)
    return {k: resolve(v, f"{where}.{k}") for k, v in value.items()}


def _cast(value: Mapping[str, Any], where: str) -> Any:
    """{__value_type: str, value: 1} -> '1'. `import`: the object that the value names."""
    if set(value) != {CAST, VALUE}:
        raise ConfigError(f"{where} has the keys {', '.join(map(str, value))}; a cast has {CAST} and {VALUE}, and no others")
    kind, given = value[CAST], value[VALUE]
    if kind == "import":
        return find(str(given), f"{where} {given!r}")
    if kind == "bool" and isinstance(given, str):
        given = guess(given)  # NB: bool('false') is True
    cast = getattr(builtins, kind, None) if isinstance(kind, str) and "." not in kind else None
    cast = cast if cast is not None else locate(kind, f"{where}.{CAST}")
    try:
        return cast(given)
    except Exception as e:
        raise ConfigError(f"{where}: {kind}({given!r:.60}) failed: {e}") from e


def check_call(make: Callable[..., Any], own: Mapping[str, Any], where: str, first: tuple[Any, ...], given: Mapping[str, Any]) -> None:
    """Raise ConfigError where make(*first, **own, **given) cannot be called, naming the nearest argument."""
    try:
        signature = inspect.signature(make)
    except (ValueError, TypeError):
        return  # a builtin that does not tell
    takes = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)][len(first) :]
    rest = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for key in (k for k in {**own, **given} if k not in takes and not rest):
        valid = suggest(key, [n for n in takes if n not in given]) if takes else "it takes none"
        raise ConfigError(f"{where}.{key}: {_name(make)} has no argument {key!r}: {valid}")
    try:
        signature.bind(*first, **{**own, **given})
    except TypeError as e:
        raise ConfigError(f"{where}: {_name(make)}: {e}") from e


def _name(make: Callable[..., Any]) -> str:
    return getattr(make, "__qualname__", None) or type(make).__qualname__
