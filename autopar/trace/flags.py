"""Flags: who reads module.training while a trace runs, and whether that read can make the two modes differ.
Must not know what the modes then do: modes.py compares them.

While a trace runs, nn.Module.training is a property that notes the reader's line and gives the plain bool.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import linecache
import os
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import CodeType, FrameType
from typing import Any

import torch

from autopar.ir.graph import Source
from autopar.trace.names import name_of
from autopar.trace.recording import Enter, Exit, RecordedOp, Recording
from autopar.trace.sources import Sources

_MODULES = os.path.dirname(torch.nn.modules.__file__) + os.sep
_SAFE = (ast.Name, ast.Attribute, ast.Constant, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.expr_context, ast.operator, ast.unaryop,
         ast.cmpop, ast.boolop)  # fmt: skip
_LITERALS = (bool, int, float, str, type(None))
# torch functions whose training flag rules/training.py makes the module's own
KNOWN = frozenset(
    f"torch.nn.functional.{n}"
    for n in "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout rrelu batch_norm instance_norm".split()  # noqa: SIM905
)
ATTENTION = "torch.nn.functional.scaled_dot_product_attention"
_ABSENT = object()


@dataclass
class Read:
    """One line that reads the flag."""

    path: str  # module path
    source: Source


@dataclass
class Flags:
    """The reads of one trace. `reads` may lead to another path in the other mode; `handed` are functions of the user's
    program that give the flag to a torch function whose other mode is known."""

    sources: Sources
    training: bool  # mode of the traced module
    reads: list[Read] = field(default_factory=list)
    handed: set[tuple[str, str]] = field(default_factory=set)
    certain: Read | None = None  # traced in eval mode: a layer of torch.nn that certainly does something else in training
    _sites: dict[tuple[CodeType, int], _Site] = field(default_factory=dict)
    _known: set[tuple[str, Source]] = field(default_factory=set)

    def read(self, module: torch.nn.Module, path: str, frame: FrameType) -> None:
        """Python code reads module.training."""
        if module.__dict__["training"] is not self.training:
            return  # a part that is in the other mode already (frozen layers) stays as it is
        code = frame.f_code
        if code.co_filename.startswith(_MODULES):  # torch's own layers: rules/training.py knows them in training mode
            if not self.training and not _indifferent(module):
                self.certain = self.certain or Read(path, self.sources.where(3)[0])
            return
        site = self._sites.get((code, frame.f_lasti))
        if site is None:
            site = self._sites[code, frame.f_lasti] = _Site.of(code, frame.f_lasti)
        if site.indifferent(frame):
            return
        if self.training and site.hands_over(frame):
            self.handed.add((code.co_filename, code.co_name))
            return
        source, _ = self.sources.where(3)
        if (path, source) not in self._known:
            self._known.add((path, source))
            self.reads.append(Read(path, source))


def _indifferent(module: torch.nn.Module) -> bool:
    """Whether a layer of torch.nn does the same in both modes."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return module.p == 0
    if isinstance(module, (torch.nn.MultiheadAttention, torch.nn.RNNBase)):
        return module.dropout == 0
    if isinstance(module, torch.nn.modules.batchnorm._NormBase):
        return not module.track_running_stats and module.running_mean is None
    return not isinstance(module, torch.nn.RReLU)


@dataclass
class _Site:
    """An expression `m.training` in the user's source, with the expression around it. Nothing is known if `node` is None."""

    node: ast.expr | None = None
    parents: dict[ast.AST, ast.AST] = field(default_factory=dict)

    @classmethod
    def of(cls, code: CodeType, lasti: int) -> _Site:
        line, end_line, col, end_col = list(code.co_positions())[lasti // 2]
        lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :]
        if line is None or end_line is None or col is None or not lines:
            return cls()
        try:
            text = "".join(inspect.getblock(lines))
            tree = ast.parse(textwrap.dedent(text))
        except (SyntaxError, ValueError, IndentationError):
            return cls()
        indent = len(text) - len(text.lstrip(" "))
        parents = {c: p for p in ast.walk(tree) for c in ast.iter_child_nodes(p)}
        at = (line - code.co_firstlineno + 1, end_line - code.co_firstlineno + 1, col - indent, (end_col or 0) - indent)
        for n in parents:
            if isinstance(n, ast.Attribute) and n.attr == "training" and (n.lineno, n.end_lineno, n.col_offset, n.end_col_offset) == at:
                return cls(n, parents)
        return cls()

    @cached_property
    def around(self) -> tuple[ast.expr | None, ast.AST | None]:
        """The read itself or `not` of it, and what that is part of."""
        node = self.node
        up = self.parents.get(node) if node is not None else None
        while isinstance(up, ast.UnaryOp) and isinstance(up.op, ast.Not):
            node, up = up, self.parents.get(up)
        return node, up

    @cached_property
    def _others(self) -> list[Any]:
        """Compiled expressions that decide whether the read matters: the rest of an and/or, both results of an if-else."""
        node, up = self.around
        if isinstance(up, ast.BoolOp):
            return [c for v in up.values if v is not node and (c := _compiled(v))]
        if isinstance(up, ast.IfExp) and up.test is node:
            found = [_compiled(up.body), _compiled(up.orelse)]
            return found if all(found) else []
        return []

    def indifferent(self, frame: FrameType) -> bool:
        """Whether this time the flag makes no difference: `self.training and False`, `0.0 if not self.training else 0.0`."""
        if not self._others:
            return False
        _, up = self.around
        found = [_evaluate(c, frame) for c in self._others]
        if isinstance(up, ast.BoolOp):
            decides = isinstance(up.op, ast.Or)
            return any(type(v) in _LITERALS and bool(v) is decides for v in found)
        a, b = found
        return type(a) in _LITERALS and type(b) in _LITERALS and a == b and isinstance(a, bool) == isinstance(b, bool)

    @cached_property
    def _callee(self) -> Any:
        node, up = self.around
        if node is not self.node:
            return None
        call = self.parents.get(up) if isinstance(up, ast.keyword) else up
        return _compiled(call.func) if isinstance(call, ast.Call) and call.func is not node else None

    def hands_over(self, frame: FrameType) -> bool:
        """Whether the flag is an argument of a torch function whose other mode is known."""
        if self._callee is None:
            return False
        fn = _evaluate(self._callee, frame)
        return getattr(fn, "__module__", None) == "torch.nn.functional" and name_of(fn) in KNOWN


def _compiled(node: ast.expr) -> Any:
    """Code of an expression that has no effects; None for others."""
    if not all(isinstance(n, _SAFE) for n in ast.walk(node)):
        return None
    return compile(ast.Expression(node), "<flag>", "eval")


def _evaluate(code: Any, frame: FrameType) -> Any:
    """The value of an expression where the flag is read; the class object where it has none."""
    try:
        return eval(code, frame.f_globals, frame.f_locals)
    except Exception:
        return _ABSENT


def doubtful(rec: Recording, handed: set[tuple[str, str]]) -> Source | None:
    """The first op whose training flag is guessed from its source line, though no code around it reads one.

    handed: functions of the user's program seen to give the flag to a torch function.
    """
    if not rec.training:
        return None
    stack = [""]
    for e in rec.events:
        if isinstance(e, Enter):
            stack.append(stack[-1] if e.recompute else e.cls)
        elif isinstance(e, Exit):
            stack.pop()
        elif isinstance(e, RecordedOp) and (e.fn in KNOWN or e.fn == ATTENTION) and not stack[-1].startswith("torch.nn."):
            dropped = e.fn in KNOWN or (e.args[4] if len(e.args) > 4 else e.kwargs.get("dropout_p", 0.0)) != 0.0
            if dropped and (e.src.file, e.src.function) not in handed and _depends(e):
                return e.src
    return None


def _depends(e: RecordedOp) -> bool:
    from autopar.rules.training import at_run_time  # NB: here, because all of rules comes with it

    args, kwargs = at_run_time(e)  # type: ignore[arg-type]
    return args is not e.args or kwargs is not e.kwargs


def refuse(rec: Recording, src: Source) -> Recording:
    """The recording for its own mode only."""
    other = "eval" if rec.training else "training"
    note = f"{src}: `{src.text}`: {other} mode takes another path; generated code refuses that mode"
    return replace(rec, branch=src, warnings=(*rec.warnings, note))


@contextlib.contextmanager
def watched(tracer: Any) -> Iterator[None]:
    """While active every read of a module's training flag is noted by tracer.read_flag(module, frame)."""

    def get(self: torch.nn.Module) -> bool:
        try:
            value = self.__dict__["training"]
        except KeyError:
            raise AttributeError("training") from None
        if not tracer.off:
            tracer.read_flag(self, sys._getframe(1))
        return value

    def put(self: torch.nn.Module, value: bool) -> None:
        self.__dict__["training"] = value

    before = torch.nn.Module.__dict__.get("training", _ABSENT)
    torch.nn.Module.training = property(get, put)  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is _ABSENT:
            del torch.nn.Module.training
        else:
            torch.nn.Module.training = before  # type: ignore[assignment]
