"""Mesh: the devices of one scale unit as a grid with named axes.
Must not know about processes or process groups (that is runtime/groups.py)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod

from autopar.errors import ConfigError


@dataclass(frozen=True)
class Mesh:
    """Named axes, outermost (slowest varying rank) first: ``Mesh((("dp", 2), ("tp", 4)))``.

    A mesh with no axes is one device. Raises ConfigError for a size below 1 or a repeated or non-identifier name.
    """

    axes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple((str(n), int(k)) for n, k in self.axes))
        for name, size in self.axes:
            if not name.isidentifier():
                raise ConfigError(f"mesh axis name {name!r} is not an identifier")
            if size < 1:
                raise ConfigError(f"mesh axis {name!r} has size {size}; it must be at least 1")
        if len(set(self.names)) != len(self.axes):
            raise ConfigError(f"mesh axis names repeat: {', '.join(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        return _columns(self.axes)[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        return _columns(self.axes)[1]

    @property
    def size(self) -> int:
        return prod(self.sizes)

    def index(self, name: str) -> int:
        if name not in self.names:
            raise ConfigError(f"the mesh has no axis {name!r}; its axes are {', '.join(self.names) or 'none'}")
        return self.names.index(name)

    def coords(self, device: int) -> tuple[int, ...]:
        """The coordinates of a device of the unit along each axis, row-major."""
        out = []
        for k in reversed(self.sizes):
            out.append(device % k)
            device //= k
        return tuple(reversed(out))

    def __str__(self) -> str:
        return "mesh(" + ", ".join(f"{n}={k}" for n, k in self.axes) + ")"

    @staticmethod
    def parse(text: str) -> Mesh:
        """``"dp=2,tp=4"`` -> Mesh. Raises ConfigError with the offending piece."""
        axes = []
        for piece in filter(None, (p.strip() for p in text.split(","))):
            name, eq, size = piece.partition("=")
            if not eq or not size.strip().isdigit():
                raise ConfigError(f"mesh piece {piece!r} is not of the form name=size, as in 'dp=2,tp=4'")
            axes.append((name.strip(), int(size)))
        return Mesh(tuple(axes))


@cache
def _columns(axes: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and sizes. NB: not kept in the Mesh, whose attributes tell plans and policies apart (codegen/identity.py)."""
    return tuple(n for n, _ in axes), tuple(k for _, k in axes)
