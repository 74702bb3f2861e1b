"""Program: what every rank of a unit runs: local ops, conversions and calls, every value typed.
Must not know how it was derived (lower.py) nor how it is printed as Python (codegen).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autopar.ir.graph import Context, Guard, Param, Source
from autopar.ir.mesh import Mesh
from autopar.ir.types import AxisType, Type
from autopar.pas.plan import Plan


@dataclass(frozen=True)
class TypedValue:
    """A value of a lowered block. `origin` is the graph value it holds (id in the source block), in this type."""

    id: int
    origin: int
    name: str
    kind: str  # 'tensor' | 'scalar'
    shape: tuple[int, ...]  # global
    dtype: str
    grad: bool
    type: Type


@dataclass(frozen=True)
class Local:
    """An op every rank runs on its own data. args and kwargs hold local sizes; Refs are ids of this lowered block."""

    op: str  # id of the source op in the source block
    fn: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    choice: tuple[str, ...]  # per axis: factor name, 'I', 'R', 'P' or 'P:n'
    src: Source
    ctx: Context = Context()
    path: str = ""
    writes: tuple[tuple[int, int], ...] = ()
    divide: int = 1  # tensor outputs are divided by this afterwards (mean over a split factor)
    times: int = 1  # scalar outputs are multiplied by this (a size read from a sharded value)
    rng: tuple[str, ...] = ()  # axes along which ranks must draw different random numbers
    training: bool = False


@dataclass(frozen=True)
class Convert:
    """One single-axis conversion of the algebra. copy=True where the result is written in place afterwards."""

    value: int
    out: int
    axis: str
    src: AxisType
    dst: AxisType
    copy: bool = False


@dataclass(frozen=True)
class Invoke:
    """A call of another lowered block; id is the instance path relative to this block."""

    id: str
    block: str
    args: tuple[int, ...]
    out: tuple[int, ...]
    writes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class LoweredBlock:
    """One class of generated code."""

    name: str
    source: str  # name of the graph block
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: tuple[Param, ...]  # value ids of this lowered block
    values: tuple[TypedValue, ...]
    body: tuple[Local | Convert | Invoke | Guard, ...]
    recompute: bool = False
    instances: tuple[str, ...] = ()


@dataclass(frozen=True)
class Placement:
    """How a parameter, buffer or constant is held, by original name."""

    name: str
    type: Type


@dataclass(frozen=True)
class Program:
    """The lowered module of one scale unit; the same for all its ranks."""

    mesh: Mesh
    root: str
    blocks: dict[str, LoweredBlock]  # callees before callers
    placements: tuple[Placement, ...]
    output: Any  # the graph's output tree with Refs of the root lowered block
    plan: Plan

    def __str__(self) -> str:
        from autopar.lower.text import format_program

        return format_program(self)

    def placement(self, name: str) -> Type:
        return next(p.type for p in self.placements if p.name == name)
