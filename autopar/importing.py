"""find: the object that a text names, 'package.module.Name', 'package.module:Name' or 'path/to/file.py:Name'; which part failed if none.
Must not know what is done with it, nor import torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from autopar.errors import ConfigError, one_line, suggest


def find(text: str, what: str) -> Any:
    """The object that `text` names. `what` is quoted in errors.

    Raises ConfigError that says which part does not exist or failed to import.
    """
    where, colon, name = text.rpartition(":")
    if colon:
        found: Any = _import(where, what)
        return _attributes(found, name.split("."), where, what)
    parts = text.split(".")
    if len(parts) < 2 or not all(parts):
        raise ConfigError(f"{what} is not of the form 'package.module.Name' or 'path/to/file.py:Name'")
    found, n = _import(parts[0], what), 1
    while n < len(parts):
        name = ".".join(parts[: n + 1])
        last = n + 1 == len(parts)
        if last and _has(found, parts[n], what):
            break
        try:
            found = _import_module(name, what)
        except _Missing:
            break
        n += 1
    return _attributes(found, parts[n:], ".".join(parts[:n]), what)


class _Missing(Exception):
    """There is no such module; its parent is there."""


def _has(found: Any, name: str, what: str) -> bool:
    try:
        return hasattr(found, name)
    except Exception as e:  # a module that imports its parts at first use
        raise _failed(f"{getattr(found, '__name__', found)}.{name}", what, e) from e


def _attributes(found: Any, names: list[str], where: str, what: str) -> Any:
    for name in names:
        if not _has(found, name, what):
            own = [n for n in dir(found) if not n.startswith("_")]
            kind = f"{where} was imported, but it" if isinstance(found, ModuleType) else f"{where}"
            raise ConfigError(f"{what}: {kind} has no {name!r}: {_nearest(name, own)}")
        found, where = getattr(found, name), f"{where}.{name}"
    return found


def _nearest(name: str, own: list[str]) -> str:
    hint = suggest(name, own).partition("Valid:")[0].strip()
    return hint or f"it has {', '.join(sorted(own)[:12]) or 'nothing'}"


def _import(where: str, what: str) -> ModuleType:
    """A module by its dotted name, or by the path of its file."""
    if where.endswith(".py") or os.sep in where:
        return _import_file(Path(where), what)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    parts = where.split(".")
    for i in range(1, len(parts) + 1):
        try:
            module = _import_module(".".join(parts[:i]), what)
        except _Missing:
            outer = ".".join(parts[: i - 1])
            missing = f"{outer} was imported, but it has no module {parts[i - 1]!r}" if outer else f"there is no module {parts[0]!r}"
            raise ConfigError(f"{what}: {missing} (searched {os.getcwd()} and the installed packages)") from None
    return module


def _import_module(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name != name:
            raise _failed(name, what, e) from e
        raise _Missing from None
    except (Exception, SystemExit) as e:
        raise _failed(name, what, e) from e


def _import_file(path: Path, what: str) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise ConfigError(f"{what}: there is no file {path}")
    name = path.stem
    known = sys.modules.get(name)
    if known is not None:
        if getattr(known, "__file__", None) and Path(known.__file__).resolve() == path:
            return known
        other = getattr(known, "__file__", None) or "built in"
        raise ConfigError(f"{what}: a module called {name!r} is loaded already ({other}); rename {path.name}")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as `python file.py` does
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        del sys.modules[name]
        raise _failed(path.name, what, e) from e
    return module


def _failed(name: str, what: str, e: BaseException) -> ConfigError:
    hint = "; name it as package.module, so that its package is known" if "no known parent package" in str(e) else ""
    return ConfigError(f"{what}: {name} failed to import: {one_line(e)}{hint}")
