"""Sample calls of every op with a rule, for the prover. Each module of this package has a list SAMPLES.
Must not know how the ops are split.

    Sample("torch.nn.functional.linear", T(8, 12), T(16, 12), bias=T(16), splits="*0 k n")

T(...) stands for a random float64 tensor (values= a kind below), Scalar(n) for a run-time scalar. `splits` names the factors
that must be legal: give it where a rule could be too careful without anybody noticing; splits="" says none. grad=False: torch
has no derivative for the op.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from autopar.rules.oneop import Constant, OneOp, Scalar, _map, one_op

__all__ = ["Sample", "Scalar", "T", "samples"]


@dataclass(frozen=True, init=False)
class T:
    """A random tensor to be made: values 'normal', 'positive' (0.5 to 1.5), 'unit' (-0.9 to 0.9), 'above' (1), 'bool', 'complex',
    or an int n: integers 0..n-1, or a function of a normal tensor. grad=False: it carries no gradient."""

    shape: tuple[int, ...]
    values: str | int | Callable[[torch.Tensor], torch.Tensor]
    grad: bool

    def __init__(self, *shape: int, values: str | int | Callable[[torch.Tensor], torch.Tensor] = "normal", grad: bool = True) -> None:
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "grad", grad)

    def __repr__(self) -> str:
        kind = getattr(self.values, "__name__", repr(self.values))
        return f"T({', '.join(map(str, self.shape))}" + (f", values={kind})" if self.values != "normal" else ")")

    def make(self, rng: torch.Generator) -> torch.Tensor:
        if callable(self.values):
            return self.values(torch.randn(self.shape, dtype=torch.float64, generator=rng))
        if isinstance(self.values, int):
            return torch.randint(self.values, self.shape, generator=rng)
        if self.values == "complex":
            return torch.complex(*(torch.randn(self.shape, dtype=torch.float64, generator=rng) for _ in range(2)))
        if self.values == "bool":
            return torch.rand(self.shape, generator=rng) > 0.5
        if self.values == "normal":
            return torch.randn(self.shape, dtype=torch.float64, generator=rng)
        low, high = {"positive": (0.5, 1.5), "unit": (-0.9, 0.9), "above": (1.1, 2.0)}[self.values]
        return low + (high - low) * torch.rand(self.shape, dtype=torch.float64, generator=rng)


def made(x: T, rng: torch.Generator, grad: bool) -> torch.Tensor | Constant:
    return x.make(rng) if x.grad and grad else Constant(x.make(rng))


@dataclass(frozen=True, init=False)
class Sample:
    """One call. `splits`: the legal factors, in the recipe's order; None: not stated."""

    fn: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    splits: str | None
    grad: bool

    def __init__(self, fn: str, *args: Any, splits: str | None = None, grad: bool = True, **kwargs: Any) -> None:
        for name, value in (("fn", fn), ("args", args), ("kwargs", kwargs), ("splits", splits), ("grad", grad)):
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        parts = [*map(repr, self.args), *(f"{k}={v!r}" for k, v in self.kwargs.items())]
        return f"{self.fn}({', '.join(parts)})"

    def make(self, seed: int = 0) -> OneOp:
        rng = torch.Generator().manual_seed(seed)
        args, kwargs = _map((self.args, self.kwargs), lambda x: made(x, rng, self.grad) if isinstance(x, T) else x)
        return one_op(self.fn, *args, **kwargs)


def samples() -> Iterator[Sample]:
    """The samples of all modules here."""
    for m in pkgutil.iter_modules(__path__):
        yield from import_module(f"{__name__}.{m.name}").SAMPLES
