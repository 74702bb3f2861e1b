"""load: generated files as Python modules, fresh for every rank that asks.
Must not know what is in them beyond model.py and rank<r>.py.
"""

from __future__ import annotations

import itertools
import linecache
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from autopar.errors import SavedirError, suggest

_count = itertools.count()


def load_module_class(source: str | Path | Mapping[str, str], name: str | None = None, file: str = "model.py") -> type:
    """Execute generated code as a fresh module and return one of its classes; without a name the root, which is the last.

    source: the folder, or the texts by file name as `emit` returns them. Tracebacks show the generated lines.
    Raises SavedirError if the file or the class is missing.
    """
    module = load_file(source, file)
    own = [k for k, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__]
    if name is None and own:
        return getattr(module, own[-1])
    if name not in own:
        raise SavedirError(f"{module.__file__} has no class {name!r}: {suggest(name, own)}")
    return getattr(module, name)


def load_file(source: str | Path | Mapping[str, str], file: str = "model.py") -> ModuleType:
    """Execute one generated file in a fresh package, in which `from . import model` gives a fresh model.py too."""
    package = ModuleType(f"autopar_generated_{next(_count)}")
    package.__path__ = []
    sys.modules[package.__name__] = package
    if file != "model.py":
        _execute(source, "model.py", package)
    return _execute(source, file, package)


def _execute(source: str | Path | Mapping[str, str], file: str, package: ModuleType) -> ModuleType:
    if isinstance(source, Mapping):
        if file not in source:
            raise SavedirError(f"there is no generated file {file!r}: {suggest(file, source)}")
        text, path = source[file], f"<{package.__name__}/{file}>"
    else:
        path = str(Path(source) / file)
        try:
            text = Path(path).read_text()
        except OSError as e:
            raise SavedirError(f"cannot read generated code {path}: {e.strerror}") from e
    short = file.removesuffix(".py")
    module = ModuleType(f"{package.__name__}.{short}")
    module.__file__, module.__package__ = path, package.__name__
    try:
        code = compile(text, path, "exec")
    except (SyntaxError, ValueError) as e:
        where = f"{path}:{getattr(e, 'lineno', None) or 1}"
        raise SavedirError(f"generated code {where} does not parse: {e}; undo the edit or compile again with reuse='override'") from e
    # NB: without a modification time the entry survives linecache.checkcache, so tracebacks of texts show their lines.
    linecache.cache[path] = (len(text), None, text.splitlines(True), path)
    sys.modules[module.__name__] = module
    setattr(package, short, module)
    exec(code, module.__dict__)
    return module
