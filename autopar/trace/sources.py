"""Sources: which line of the user's program is running, and what name that line gives its result.
Must not know tensors or ops; reads only frames and source text, and caches everything per instruction.
"""

from __future__ import annotations

import linecache
import os
import re
import sys
import sysconfig
from types import CodeType

import torch

from autopar.ir.graph import Source

_TORCH = os.path.dirname(torch.__file__) + os.sep
_AUTOPAR = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_SITE = sysconfig.get_paths()["purelib"] + os.sep

_TARGETS = re.compile(r"((?:self\.)?[A-Za-z_][\w.]*(?:\s*,\s*[A-Za-z_]\w*)*)\s*(?::[^=()]*)?=\s*\(*\s*$")
_AUGMENTED = re.compile(r"\s*(?:self\.)?([A-Za-z_]\w*)\s*(?:\*\*|//|>>|<<|[-+*/@|&^%])=")
_COMPOUND = re.compile(r"\s*(?:for|while|if|elif|else|with|try)\b.*:\s*(?=[A-Za-z_])")  # `for layer in layers: x = layer(x)`
_REST = re.compile(r"[\s)]*(?:,\s*)?(?:#.*)?$")

NOWHERE = Source("?", 0, "?", "")


def _foreign(path: str) -> bool:
    if path.startswith((_TORCH, _AUTOPAR, "<")):
        return True
    return path.startswith(_STDLIB) and not path.startswith(_SITE) and "site-packages" not in path


class Sources:
    """Answers `where()`: the innermost frame outside torch, autopar and the standard library, with name hints."""

    def __init__(self) -> None:
        self._foreign: dict[CodeType, bool] = {}
        self._positions: dict[CodeType, list[tuple[int | None, ...]]] = {}
        self._found: dict[tuple[CodeType, int], tuple[Source, tuple[str, ...]]] = {}

    def where(self, depth: int = 1) -> tuple[Source, tuple[str, ...]]:
        """(source, names the statement assigns the call's result to, () if the result is only part of an expression)."""
        frame = sys._getframe(depth)
        while frame is not None:
            code = frame.f_code
            foreign = self._foreign.get(code)
            if foreign is None:
                foreign = self._foreign[code] = _foreign(code.co_filename)
            if not foreign:
                key = (code, frame.f_lasti)
                found = self._found.get(key)
                if found is None:
                    found = self._found[key] = self._read(code, frame.f_lasti, frame.f_lineno)
                return found
            frame = frame.f_back
        return NOWHERE, ()

    def _read(self, code: CodeType, lasti: int, line: int) -> tuple[Source, tuple[str, ...]]:
        file = code.co_filename
        source = Source(file, line, code.co_name, linecache.getline(file, line).strip())
        positions = self._positions.get(code)
        if positions is None:
            positions = self._positions[code] = list(code.co_positions())
        start, end, col, end_col = positions[lasti // 2]
        if start is None or end is None or col is None or end_col is None:
            return source, ()
        # NB: columns are in UTF-8 bytes
        first = linecache.getline(file, start).encode()
        last = linecache.getline(file, end).encode()[end_col:].decode(errors="replace")
        return source, _hints(first[:col].decode(errors="replace"), first[col:].decode(errors="replace"), last)


def _hints(before: str, text: str, after: str) -> tuple[str, ...]:
    """Names for a call that begins after `before` and ends before `after`."""
    if not _REST.match(after):
        return ()
    if not before.strip():
        m = _AUGMENTED.match(text)
        return (m.group(1),) if m else ()
    m = _TARGETS.search(_COMPOUND.sub("", before, count=1))
    return tuple(n.strip().rpartition(".")[2] for n in m.group(1).split(",")) if m else ()
