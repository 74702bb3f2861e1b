"""origins: what code and values are made of, as texts and digests that are the same in every process.
Must not know modules' trees, configurations or folders (identity.py).

The source of a class or function is its own and that of everything it reaches: base classes, helper functions, constants of its
module. Of installed packages the version and the file count, torch and the standard library do not.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Mapping
from enum import Enum
from functools import cache, cached_property, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

HASHED = 1 << 22  # elements: larger tensors count by shape only
BUDGET = 20000  # objects of a value that are looked at: the rest counts by class
_PATHS = sysconfig.get_paths()
_SITE = tuple({_PATHS["purelib"], _PATHS["platlib"]})
LITERALS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(...))


# ---- source -------------------------------------------------------------------------------------------------


class Walk:
    """Everything some code reaches: qualified name -> digest of its source. Each thing is visited once."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._seen: dict[int, Any] = {}  # holds what it has seen, so that ids stay taken
        self._packages: set[str] = set()

    def knows(self, op: str) -> bool:
        """Whether a registered op ('[apply:]package.module:name') may be called by this code."""
        module, _, qual = op.removeprefix("apply:").partition(":")
        return f"{module}.{qual}" in self.found or module.partition(".")[0] in self._packages or not qual

    def visit(self, x: Any) -> None:
        """A class or function of a user's, with all it reaches; of a package the version and the file."""
        if id(x) in self._seen:
            return
        self._seen[id(x)] = x
        if isinstance(x, partial):
            self.visit(x.func)
            return
        if isinstance(x, MethodType):
            x = x.__func__
        given = x
        x = inspect.unwrap(x) if callable(x) else x
        module = getattr(x, "__module__", None)
        owner = sys.modules.get(module) if isinstance(module, str) else None
        kind = _kind(owner)
        if kind == "system" or not isinstance(x, (type, FunctionType)):
            return
        if kind == "package":
            self._package(owner)
            for base in x.__mro__[1:] if isinstance(x, type) else ():
                self.visit(base)
            return
        name = f"{module}.{x.__qualname__}"
        self.found[name] = digest(source_of(x)) if name not in self.found else digest(self.found[name] + source_of(x))
        if isinstance(x, type):
            for base in x.__mro__[1:]:
                self.visit(base)
            for member in vars(x).values():
                for f in (member, getattr(member, "__func__", None), getattr(member, "fget", None), getattr(member, "func", None)):
                    if isinstance(f, FunctionType):
                        self._reached(f)
        else:
            self._reached(given)

    def _package(self, owner: ModuleType) -> None:
        top = owner.__name__.partition(".")[0]
        self._packages.add(top)
        version = getattr(sys.modules.get(top), "__version__", None)
        self.found[top] = str(version) if version else "unknown version"
        self.found[owner.__name__] = _file_digest(owner.__file__ or "")

    def _reached(self, f: Any) -> None:
        """What the code of a function names: globals, attributes of modules, values it closes over; of a decorated one the wrapper too."""
        if not isinstance(f, FunctionType):
            return
        inner = f.__dict__.get("__wrapped__")
        if inner is not None and _kind(sys.modules.get(f.__globals__.get("__name__", ""))) == "user":
            self.found[f"{f.__module__}.{f.__qualname__} as decorated"] = digest(_bytecode(f.__code__))
        self._reached(inner)
        names = _names(f.__code__)
        for n in names:
            if n in f.__globals__:
                self._global(f.__module__, n, f.__globals__[n], names)
        for n, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            self._global(f"{f.__module__}.{f.__qualname__}", n, _content(cell), names)

    def _global(self, where: str, name: str, x: Any, names: tuple[str, ...]) -> None:
        if isinstance(x, ModuleType):
            if _kind(x) == "user":
                for n in names:
                    if hasattr(x, n) and not isinstance(getattr(x, n), ModuleType):
                        self._global(x.__name__, n, getattr(x, n), names)
        elif isinstance(x, (type, FunctionType, MethodType)):
            self.visit(x)
        elif not name.startswith("__") and not isinstance(x, torch.nn.Module):
            self.found[f"{where}.{name}"] = digest(text(x, self))


def _names(code: CodeType) -> tuple[str, ...]:
    """Every name a function and those inside it use."""
    found = dict.fromkeys(code.co_names)
    for c in code.co_consts:
        if isinstance(c, CodeType):
            found.update(dict.fromkeys(_names(c)))
    return tuple(found)


def _kind(module: ModuleType | None) -> str:
    """'user', 'package' (installed), or 'system': torch, autopar, the standard library, builtins."""
    if module is None:
        return "user"
    if module.__name__.partition(".")[0] in ("torch", "autopar"):
        return "system"
    file = getattr(module, "__file__", None)
    if file is None:
        return "user" if module.__name__ == "__main__" or not hasattr(module, "__spec__") or module.__spec__ is None else "system"
    if file.startswith(_SITE):
        return "package"
    return "system" if file.startswith(_PATHS["stdlib"]) and "site-packages" not in file else "user"


@cache
def _file_digest(file: str) -> str:
    try:
        return digest(Path(file).read_bytes())
    except OSError:
        return "unreadable"


def source_of(x: Any) -> str:
    """The text of a class or function; where there is none, its bytecode."""
    try:
        return inspect.getsource(x)
    except (OSError, TypeError, SyntaxError):
        pass
    if isinstance(x, type):
        return "\n".join(f"{k} {source_of(v) if isinstance(v, FunctionType) else ''}" for k, v in vars(x).items())
    code = getattr(x, "__code__", None)
    return _bytecode(code) if code is not None else getattr(x, "__qualname__", type(x).__qualname__)


def _bytecode(code: CodeType) -> str:
    consts = [_bytecode(c) if isinstance(c, CodeType) else text(c) for c in code.co_consts]  # NB: the repr of a frozenset varies
    return f"{code.co_code.hex()} {consts} {code.co_names} {code.co_varnames}"


# ---- values -------------------------------------------------------------------------------------------------


def text(x: Any, walk: Walk | None = None) -> str:
    """A value as text that is the same in every process: functions by their source, objects by their fields, tensors by their numbers."""
    return _Text(walk).of(x, ())


class _Text:
    def __init__(self, walk: Walk | None) -> None:
        self.walk, self.left = walk, BUDGET

    def of(self, x: Any, seen: tuple[int, ...]) -> str:
        if isinstance(x, (*LITERALS, Enum)):
            return repr(x)
        self.left -= 1
        if id(x) in seen or self.left < 0 or isinstance(x, torch.nn.Module):
            return type(x).__qualname__
        seen = (*seen, id(x))
        many = lambda values: ", ".join(self.of(v, seen) for v in values)  # noqa: E731
        if isinstance(x, torch.Tensor):
            return self.tensor(x)
        if isinstance(x, Mapping):
            return "{" + ", ".join(f"{self.of(k, seen)}: {self.of(v, seen)}" for k, v in x.items()) + "}"
        if isinstance(x, (set, frozenset)):
            return "{" + ", ".join(sorted(self.of(v, seen) for v in x)) + "}"
        if isinstance(x, (list, tuple)):
            return f"({many(x)})"
        if isinstance(x, partial):
            return f"partial({many((x.func, x.args, x.keywords))})"
        if isinstance(x, MethodType):
            return f"{self.of(x.__func__, seen)} of {self.of(x.__self__, seen)}"
        if isinstance(x, (type, FunctionType)):
            if self.walk is not None:
                self.walk.visit(x)
            if isinstance(x, type):
                return f"{x.__module__}.{x.__qualname__}"
            return f"{x.__module__}.{x.__qualname__} {digest(source_of(x))} ({many(map(_content, x.__closure__ or ()))})"
        if isinstance(x, ModuleType):
            return x.__name__
        if hasattr(x, "tobytes") and hasattr(x, "dtype"):
            return f"{x.dtype}{list(x.shape)} {digest(x.tobytes())}"
        if self.walk is not None:
            self.walk.visit(type(x))
        if getattr(x, "__dict__", None):
            return f"{type(x).__qualname__}{self.of(fields_of(x), seen)}"
        try:
            return re.sub(r" at 0x[0-9a-f]+", "", repr(x))
        except Exception:
            return type(x).__qualname__

    @staticmethod
    def tensor(x: torch.Tensor) -> str:
        if x.is_meta or not 0 < x.numel() <= HASHED or x.layout is not torch.strided:
            return tensor_type(x)
        with torch.no_grad():
            return f"{tensor_type(x)} {digest(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())}"


def fields_of(x: Any) -> dict[str, Any]:
    """The fields of an object by name, but for what differs without a difference.

    NB: hashes of texts differ between processes; the value of a cached property is there once somebody has asked for it.
    """
    cached = {n for c in type(x).__mro__ for n, v in vars(c).items() if isinstance(v, cached_property)}
    return {k: v for k, v in sorted(vars(x).items()) if "hash" not in k and k not in cached}


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def tensor_type(t: torch.Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"


def digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode(errors="replace") if isinstance(content, str) else content).hexdigest()[:16]
