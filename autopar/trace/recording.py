"""Recording: the flat log of one traced run, before it is folded into blocks (build.py).
Must not know how it was recorded (tracer.py) nor what it is used for.
Value ids are positions in `values`; trees use ir.graph.Ref with these ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autopar.ir.graph import Argument, Context, Source, Tensor


@dataclass
class RecordedValue:
    """A tensor or run-time scalar met while tracing."""

    name: str  # hint: the user's local name, the input's name or the parameter's last name component
    kind: str  # 'tensor' | 'scalar'
    shape: tuple[int, ...]
    dtype: str
    grad: bool  # may carry a gradient (any floating input, any parameter that requires it, through ops under grad mode)
    storage: int  # same number: same memory
    origin: str  # 'op' | 'input' | 'param' | 'buffer' | 'constant'
    qualified: str = ""  # for param, buffer, constant: original name; constants are '<module path>.constant<n>'
    from_params: bool = False  # depends on a parameter's values


@dataclass
class RecordedOp:
    fn: str  # as in ir.graph.Op
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any  # tree of Ref
    src: Source
    ctx: Context
    writes: tuple[tuple[int, int], ...] = ()  # (old value, new version) of the written tensor and of each live alias of it
    effect: bool = False  # must be kept even if nobody uses its results
    training: bool = False


@dataclass
class RecordedGuard:
    value: Any  # Ref
    read: str
    expected: Any
    src: Source


@dataclass
class Enter:
    """A module call (or a torch.utils.checkpoint call) begins; the matching Exit follows."""

    path: str  # qualified module path; the enclosing module's path for recompute
    cls: str  # qualified class name
    recompute: bool = False
    inputs: tuple[tuple[int, str], ...] = ()  # value id -> forward's name for it; 'position_embeddings[0]' inside containers


@dataclass
class Exit:
    out: tuple[int | None, ...] = ()  # ids of the tensors that the module returned; None for one that is no value
    names: tuple[str, ...] = ()  # what the caller calls them, where it says; as many as out


@dataclass
class Recording:
    module: str  # qualified class name of the traced module
    values: list[RecordedValue]
    events: list[RecordedOp | RecordedGuard | Enter | Exit]  # the root module's own Enter/Exit included
    tensors: tuple[Tensor, ...]
    arguments: tuple[Argument, ...]
    inputs: tuple[int, ...]  # value ids of the tensor inputs, in the order of arguments
    output: Any
    folded: bool
    training: bool
    buffers_set: tuple[tuple[str, int], ...] = ()  # `self.buf = tensor`: (buffer name, value id) after the run
    warnings: tuple[str, ...] = ()
    constants: dict[str, Any] = field(default_factory=dict)
    branch: Source | None = None  # the line at which the other mode (train, eval) takes a path that is not recorded
