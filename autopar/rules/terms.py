"""Helpers for writing tables: notation terms from shapes, and axes and shards as arguments of emitted functions.
Must not know any op.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from autopar.ir.graph import AxisRef
from autopar.rules.recipe import Dims, Recipe, Split


def term(shape: Sequence[int], prefix: str = "d", *, kept: Iterable[int] = (), mark: str = "", names: dict[int, str] | None = None) -> str:
    """One name per dim, 'd0 d1^ d2'. Dims of size 1 are numbers; `kept` dims are not split; `mark` goes on the rest."""
    kept, names = set(kept), names or {}
    out = []
    for i, n in enumerate(shape):
        name = names.get(i, f"{prefix}{i}")
        out.append("1" if n == 1 else f"{name}^" if i in kept else f"{name}{mark}")
    return " ".join(out)


def aligned(shape: Sequence[int], out: Sequence[int], prefix: str = "d", mark: str = "") -> str:
    """The term of a tensor that broadcasts to `out`: names of the dims it lines up with from the right."""
    first = len(out) - len(shape)
    return " ".join("1" if n == 1 else f"{prefix}{first + i}{mark}" for i, n in enumerate(shape))


def axes_on(splits: Iterable[Split], recipe: Recipe, *names: str) -> tuple[AxisRef, ...]:
    """The axes that split one of the factors, outermost first."""
    return tuple(s.ref for s in splits if recipe.parse(s.factor)[0] in names)


def one_or_tuple(axes: tuple[AxisRef, ...]) -> Any:
    """`self.tp` reads better than `(self.tp,)`."""
    return axes[0] if len(axes) == 1 else axes


def shards(recipe: Recipe, splits: Iterable[Split], dims: Dims | None) -> tuple[tuple[Any, ...], ...]:
    """Where a rank's shard of a tensor lies, as ap functions take it: (dim, axis) or (dim, axis, groups)."""
    out: list[tuple[Any, ...]] = []
    for s in splits:
        name, groups = recipe.parse(s.factor)
        place = recipe.place(dims, name)
        if place is not None:
            outer = place[1] * groups
            out.append((place[0], s.ref) if outer == 1 else (place[0], s.ref, outer))
    return tuple(out)


def split_by(recipe: Recipe, splits: Iterable[Split], *names: str) -> int:
    """Into how many parts the splits cut the named factors together (all factors if none is named)."""
    n = 1
    for s in splits:
        if not names or recipe.parse(s.factor)[0] in names:
            n *= s.size
    return n
