"""Random streams for shards: ranks that hold different shards draw different numbers, ranks that hold the same data the same ones.
Must not know which ops draw, nor how exact mode is used (exact.py, functional_random.py); the flag for it is kept here.

All ranks of a unit keep the same state in the default generators. A stream is seeded by one number drawn from the CPU generator, so all of
them advance alike, two streams differ, and torch.utils.checkpoint, which restores that state, gets the same stream again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from autopar.runtime.axis import Axis
from autopar.runtime.mesh import RankMesh


class _Flag:
    """A switch that is true inside of its `with` (in all threads), and can be entered more than once."""

    def __init__(self) -> None:
        self._depth = 0

    def __bool__(self) -> bool:
        return self._depth > 0

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1


EXACT = _Flag()  # every rank draws for the whole tensor from the default stream and takes its shard


def exact_random() -> _Flag:
    """`with exact_random():` verification compares a split model with the whole one; random_streams then changes nothing."""
    return EXACT


def _seed(base: int, axes: tuple[Axis, ...]) -> int:
    place = ",".join(f"{a.name}={a.rank}" for a in sorted(axes, key=lambda a: a.name))
    return int.from_bytes(hashlib.blake2b(f"{base};{place}".encode(), digest_size=7).digest(), "big")


def _generators() -> tuple[torch.Generator, torch.Generator | None]:
    """The default generators of the CPU and, where CUDA is in use, of its current device."""
    return torch.default_generator, torch.cuda.default_generators[torch.cuda.current_device()] if torch.cuda.is_initialized() else None


@contextmanager
def random_streams(*axes: Axis) -> Iterator[None]:
    """Inside, ranks at different coordinates of these axes draw different numbers. Axes of one rank, and exact mode, change nothing.

    Afterwards the default generators (CPU, and the current CUDA device) stand where they stood, one number further, on all ranks alike.
    """
    axes = tuple(a for a in axes if a.size > 1)
    if not axes or EXACT:
        yield
        return
    cpu, cuda = _generators()
    base = int(torch.empty((), dtype=torch.int64).random_(generator=cpu))
    before = cpu.get_state()
    # NB: the CUDA generator need not advance; the next stream is seeded by another number all the same.
    cuda_before = cuda.get_state() if cuda is not None else None
    seed = _seed(base, axes)
    cpu.manual_seed(seed)
    if cuda is not None:
        cuda.manual_seed(seed)
    try:
        yield
    finally:
        cpu.set_state(before)
        if cuda is not None:
            cuda.set_state(cuda_before)


@contextmanager
def unit_stream(mesh: RankMesh) -> Iterator[None]:
    """Inside, each scale unit draws numbers of its own: it has a batch of its own. Unit 0 draws what a single process would.

    In the other units the default generators stand one number further afterwards, if anything was drawn; else where they stood.
    """
    if mesh.unit == 0 or EXACT:
        yield
        return
    found = [g for g in _generators() if g is not None]
    before = [g.get_state() for g in found]
    with random_streams(mesh.replicas):
        start = [g.get_state() for g in found]
        try:
            yield
        finally:
            same = all(torch.equal(g.get_state(), s) for g, s in zip(found, start, strict=True))
    if same:
        for g, state in zip(found, before, strict=True):
            g.set_state(state)
