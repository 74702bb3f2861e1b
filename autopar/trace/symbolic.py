"""Symbolic scalars: an int and a float that remember which traced value they are.
Must not know tensors; a scalar asks its tracer to record arithmetic (`scalar_op`) and reads (`scalar_guard`).

They behave as plain numbers everywhere. Arithmetic between them is recorded; a comparison, and every use that
turns one into a plain number (int(), range(), hash()), becomes a guard, so that nothing is specialised silently.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any


class SInt(int):
    """An int read from a tensor's shape (or computed from one) while tracing."""

    tracer: Any
    vid: int

    def __reduce__(self) -> Any:
        return int, (plain(self),)

    def __deepcopy__(self, memo: Any) -> SInt:
        return self


class SFloat(float):
    """A float computed from a SInt while tracing."""

    __slots__ = ("tracer", "vid")

    tracer: Any
    vid: int

    def __reduce__(self) -> Any:
        return float, (plain(self),)

    def __deepcopy__(self, memo: Any) -> SFloat:
        return self


SCALARS = (SInt, SFloat)


def make(value: int | float, tracer: Any, vid: int) -> SInt | SFloat:
    """The symbolic form of a number that is value `vid` of the tracer."""
    out = SInt.__new__(SInt, value) if isinstance(value, int) else SFloat.__new__(SFloat, value)
    out.tracer, out.vid = tracer, vid
    return out


def plain(x: Any) -> Any:
    """The number without its provenance; other objects unchanged."""
    if type(x) is SInt:
        return int.__add__(x, 0)
    if type(x) is SFloat:
        return float.__add__(x, 0.0)
    return x


def guard(x: Any) -> Any:
    """The plain number, with a guard that it is the same at run time."""
    if type(x) in SCALARS and x.tracer.live:
        x.tracer.scalar_guard(x)
    return plain(x)


def apply(fn: str, f: Callable[..., Any], *operands: Any) -> Any:
    """f of the operands, recorded as op `fn` if any of them is symbolic and its trace still runs."""
    value = f(*[plain(o) for o in operands])
    tracer = next((o.tracer for o in operands if type(o) in SCALARS and o.tracer.live), None)
    if tracer is None or type(value) not in (int, float, bool):
        return value
    return tracer.scalar_op(fn, operands, value)


def _binary(name: str, reverse: bool) -> Callable[[Any, Any], Any]:
    f = getattr(operator, name)

    def method(self: Any, other: Any) -> Any:
        if isinstance(other, (int, float)):
            return apply(f"operator.{name}", f, other, self) if reverse else apply(f"operator.{name}", f, self, other)
        if isinstance(other, (list, tuple, str, bytes)) and name == "mul":
            return other * guard(self)
        return NotImplemented

    return method


def _compare(name: str) -> Callable[[Any, Any], Any]:
    f = getattr(operator, name)

    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        if not self.tracer.live:
            return f(plain(self), plain(other))
        return self.tracer.scalar_compare(f"operator.{name}", self, other, f(plain(self), plain(other)))

    return method


def _unary(fn: str, f: Callable[[Any], Any]) -> Callable[..., Any]:
    def method(self: Any, *extra: Any) -> Any:
        return apply(fn, f, self, *extra)

    return method


for _cls in SCALARS:
    for _n in ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow"):
        setattr(_cls, f"__{_n}__", _binary(_n, False))
        setattr(_cls, f"__r{_n}__", _binary(_n, True))
    for _n in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(_cls, f"__{_n}__", _compare(_n))
    _cls.__neg__ = _unary("operator.neg", operator.neg)  # type: ignore[method-assign]
    _cls.__abs__ = _unary("operator.abs", operator.abs)  # type: ignore[method-assign]
    _cls.__floor__ = _unary("math.floor", math.floor)  # type: ignore[attr-defined]
    _cls.__ceil__ = _unary("math.ceil", math.ceil)  # type: ignore[attr-defined]
    _cls.__trunc__ = _unary("math.trunc", math.trunc)  # type: ignore[attr-defined]
    _cls.__round__ = _unary("builtins.round", round)  # type: ignore[attr-defined]
    _cls.__divmod__ = lambda self, other: (self // other, self % other)  # type: ignore[method-assign]
    _cls.__rdivmod__ = lambda self, other: (other // self, other % self)  # type: ignore[method-assign]
    # NB: int(), float() and C code that asks must get plain numbers, so these specialise; bool() does too
    _cls.__int__ = lambda self: int(guard(self))  # type: ignore[method-assign]
    _cls.__float__ = lambda self: float(guard(self))  # type: ignore[method-assign]
    _cls.__bool__ = lambda self: self != 0  # type: ignore[method-assign]
    _cls.__hash__ = lambda self: hash(guard(self))  # type: ignore[method-assign]
    _cls.__repr__ = lambda self: repr(plain(self))  # type: ignore[method-assign]
    _cls.__str__ = lambda self: str(plain(self))  # type: ignore[method-assign]
    _cls.__format__ = lambda self, spec: format(plain(self), spec)  # type: ignore[method-assign]
for _n in ("lshift", "rshift"):
    setattr(SInt, f"__{_n}__", _binary(_n, False))
SInt.__and__ = SInt.__rand__ = lambda self, other: guard(self) & guard(other)  # type: ignore[method-assign]
SInt.__or__ = SInt.__ror__ = lambda self, other: guard(self) | guard(other)  # type: ignore[method-assign]
SInt.bit_length = lambda self: int.bit_length(guard(self))  # type: ignore[method-assign]
