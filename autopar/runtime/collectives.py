"""The conversions between value types (design section 2): one autograd Function per row of the table, its backward the dual row.
Must not know about plans or modules. The only place where a backward of a communication is written.

Every function is a no-op along an axis of one rank, and calls no autograd Function where no gradient is wanted. The gradient of a value
has the dual type (R and P swap), so a backward is a conversion too, and being differentiable itself it also serves second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autopar.runtime.axis import Axis, Record, record

__all__ = [
    "Record",
    "i_to_p",
    "i_to_r",
    "i_to_s",
    "p_to_i",
    "p_to_r",
    "p_to_s",
    "r_to_i",
    "r_to_p",
    "r_to_s",
    "record",
    "s_to_i",
    "s_to_p",
    "s_to_r",
    "s_to_s",
]  # fmt: skip


Dim = int | tuple[int, int]  # a tensor dim; (dim, groups) where each of `groups` equal parts of it is sharded


def _inside(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a function of plain dims take (dim, groups) too: groups become a dim of their own around the call."""

    def grouped(x: Tensor, axis: Axis, *dims: Dim) -> Tensor:
        if all(isinstance(d, int) for d in dims):
            return run(x, axis, *dims)
        plain = [d if isinstance(d, int) else d[0] for d in dims]
        plain = [d % x.dim() for d in plain]
        # NB: from the last dim on, so that the dims still to be cut keep their numbers.
        cuts = sorted(((d, dim[1]) for d, dim in zip(plain, dims, strict=True) if not isinstance(dim, int)), reverse=True)
        for d, groups in cuts:
            x = x.unflatten(d, (groups, -1))
        shift = [d + sum(c <= d for c, _ in cuts) for d in plain]
        y = run(x, axis, *shift)
        for d, _ in reversed(cuts):
            y = y.flatten(d, d + 1)
        return y

    return grouped


# What a row does: one of these, or a method of Axis. All take (tensor, axis, *dims).


def _nothing(x: Tensor, axis: Axis) -> Tensor:
    return x


@_inside
def _slice(x: Tensor, axis: Axis, dim: Dim) -> Tensor:
    """This rank's slice, a view. Raises LayoutError where the dim does not split evenly."""
    n = axis.shard(x.shape[dim], f"dim {dim} of a {tuple(x.shape)} tensor")
    return x.narrow(dim, axis.rank * n, n)


@_inside
def _place(x: Tensor, axis: Axis, dim: Dim) -> Tensor:
    """The whole tensor, zero but for this rank's slice."""
    dim %= x.dim()
    out = x.new_zeros([n * axis.size if d == dim else n for d, n in enumerate(x.shape)])
    _slice(out, axis, dim).copy_(x)
    return out


def _keep_first(x: Tensor, axis: Axis) -> Tensor:
    return x if axis.rank == 0 else torch.zeros_like(x)


@_inside
def _exchange(x: Tensor, axis: Axis, src_dim: int, dst_dim: int) -> Tensor:
    return axis.all_to_all(x, split_dim=dst_dim, cat_dim=src_dim)


def _all_reduce(x: Tensor, axis: Axis) -> Tensor:
    return axis.all_reduce(x)


@_inside
def _reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return axis.reduce_scatter(x, dim)


@_inside
def _all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return axis.all_gather(x, dim)


class _Row(torch.autograd.Function):
    """One row: `run` is what happens, `dual` the conversion of the gradient. Both take (tensor, axis, *dims)."""

    run: Any
    dual: Any
    shares: bool  # whether the result may be (a view of) the tensor itself

    @classmethod
    def forward(cls, ctx: Any, x: Tensor, axis: Axis, *dims: Dim) -> Tensor:
        ctx.axis, ctx.dims = axis, dims
        out = cls.run(x, axis, *dims)
        # NB: a new result may be a view of the buffer that was received into, and autograd lets nobody write to a view made in here.
        return out if cls.shares else out.detach()

    @classmethod
    def backward(cls, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # NB: reversed, for s_to_s: what was cut is concatenated and the other way round.
        return cls.dual(grad, ctx.axis, *ctx.dims[::-1]), None, *(None for _ in ctx.dims)

    @classmethod
    def convert(cls, x: Tensor, axis: Axis, *dims: Dim) -> Tensor:
        if axis.size == 1:
            return x
        if x.requires_grad and torch.is_grad_enabled():
            return cls.apply(x, axis, *dims)
        return cls.run(x, axis, *dims)


def _row(name: str, run: Any, dual: Any) -> Any:
    """The conversion function of one row; `name` is what its nodes are called in an autograd graph."""
    shares = run in (_nothing, _slice, _keep_first)
    return type(name, (_Row,), {"run": staticmethod(run), "dual": staticmethod(dual), "shares": shares}).convert


def i_to_r(x: Tensor, axis: Axis) -> Tensor:
    """I -> R: nothing; backward all-reduce (P -> I)."""
    return _i_to_r(x, axis)


def p_to_i(x: Tensor, axis: Axis) -> Tensor:
    """P -> I: all-reduce; backward nothing (I -> R)."""
    return _p_to_i(x, axis)


def p_to_r(x: Tensor, axis: Axis) -> Tensor:
    """P -> R: all-reduce; backward all-reduce (P -> R)."""
    return _p_to_r(x, axis)


def p_to_s(x: Tensor, axis: Axis, dim: Dim) -> Tensor:
    """P -> S(dim): reduce-scatter; backward all-gather (S -> R)."""
    return _p_to_s(x, axis, dim)


def s_to_r(x: Tensor, axis: Axis, dim: Dim) -> Tensor:
    """S(dim) -> R: all-gather; backward reduce-scatter (P -> S)."""
    return _s_to_r(x, axis, dim)


def s_to_i(x: Tensor, axis: Axis, dim: Dim) -> Tensor:
    """S(dim) -> I: all-gather; backward slice (I -> S)."""
    return _s_to_i(x, axis, dim)


def i_to_s(x: Tensor, axis: Axis, dim: Dim) -> Tensor:
    """I -> S(dim): slice, a view; backward all-gather (S -> I)."""
    return _i_to_s(x, axis, dim)


def r_to_s(x: Tensor, axis: Axis, dim: Dim) -> Tensor:
    """R -> S(dim): slice, a view; backward place into zeros (S -> P)."""
    return _r_to_s(x, axis, dim)


def s_to_s(x: Tensor, axis: Axis, src_dim: int, dst_dim: Dim) -> Tensor:
    """S(src) -> S(dst): all-to-all; backward all-to-all (S(dst) -> S(src))."""
    return _s_to_s(x, axis, src_dim, dst_dim)


def r_to_i(x: Tensor, axis: Axis) -> Tensor:
    """R -> I: nothing; backward keep on the first rank, zero elsewhere (I -> P)."""
    return _r_to_i(x, axis)


def i_to_p(x: Tensor, axis: Axis) -> Tensor:
    """I -> P: keep on the first rank, zero elsewhere; backward nothing (R -> I)."""
    return _i_to_p(x, axis)


def r_to_p(x: Tensor, axis: Axis) -> Tensor:
    """R -> P: keep on the first rank, zero elsewhere; backward the same (R -> P)."""
    return _r_to_p(x, axis)


def s_to_p(x: Tensor, axis: Axis, dim: Dim) -> Tensor:
    """S(dim) -> P: place into zeros; backward slice (R -> S)."""
    return _s_to_p(x, axis, dim)


# name, forward, backward
_i_to_r = _row("IToR", _nothing, p_to_i)
_p_to_i = _row("PToI", _all_reduce, i_to_r)
_p_to_r = _row("PToR", _all_reduce, p_to_r)
_p_to_s = _row("PToS", _reduce_scatter, s_to_r)
_s_to_r = _row("SToR", _all_gather, p_to_s)
_s_to_i = _row("SToI", _all_gather, i_to_s)
_i_to_s = _row("IToS", _slice, s_to_i)
_r_to_s = _row("RToS", _slice, s_to_p)
_s_to_s = _row("SToS", _exchange, s_to_s)
_r_to_i = _row("RToI", _nothing, i_to_p)
_i_to_p = _row("IToP", _keep_first, r_to_i)
_r_to_p = _row("RToP", _keep_first, r_to_p)
_s_to_p = _row("SToP", _place, r_to_s)
