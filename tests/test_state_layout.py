"""Where shards and flat ranges lie in the whole tensor: every rectangle against the whole tensor itself.
Knows no module and no file.
"""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch

from autopar.errors import CheckpointError
from autopar.runtime.mesh import RankMesh
from autopar.runtime.placement import Placement
from autopar.runtime.state.layout import Box, Layout, assemble, rectangles

MESH = (("dp", 2), ("tp", 3))


def mesh(rank, units=1):
    return RankMesh(MESH, rank, units, lambda label, groups: object(), torch.device("cpu"))


PLACED = [
    ((6, 4), ("R", "S(0)")),
    ((6, 12), ("S(0)", "S(1)")),
    ((12,), ("S(0,1)", "S(0,0)")),
    ((12,), ("S(0)", "S(0,1)")),
    ((18, 2), ("I", "S(0/3)")),
    ((4, 6, 5), ("S(0/2)", "S(1/2)")),
    ((2, 3, 4), ("S(2)", "I")),
    ((5,), ("I", "R")),
    ((), ("I", "I")),
    ((0, 3), ("I", "I")),
]


@pytest.mark.parametrize(("shape", "types"), PLACED, ids=str)
@pytest.mark.parametrize("ways", [1, 2, 5])
def test_ranges_of_shards(shape, types, ways):
    """Flat ranges of each rank's shard, cut in `ways`: each rectangle holds what the whole has there, together they are the whole."""
    whole = torch.arange(prod(shape)).view(shape)
    p = Placement("w", shape, whole.dtype, types)
    found = []
    for rank in range(6):
        layout = Layout.of(p, mesh(rank))
        local = p.shard(mesh(rank), lambda at: whole[at].clone())
        assert layout.local_shape == local.shape == p.local_shape(mesh(rank))
        n = local.numel()
        for i in range(ways):
            start, stop = i * n // ways, (i + 1) * n // ways
            part = layout.range(start, stop)
            assert Layout.from_data(part.to_data()) == part
            flat = local.reshape(-1)[start:stop].clone()
            cut = part.cut(local if part.complete else flat)
            assert [box for box, _ in cut] == part.boxes()
            for box, view in cut:
                assert torch.equal(whole[box.slices], view), (rank, i, box)
                assert view.numel() == box.volume
                if view.numel() and not part.complete:
                    assert view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr(), "a view, to be filled in place"
            found += cut
    assert torch.equal(assemble("w", shape, found), whole)


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4), (2, 1, 3, 2), ()])
def test_rectangles_are_few(shape):
    whole = torch.arange(prod(shape)).view(shape)
    for start, stop in product(range(prod(shape) + 1), repeat=2):
        found = list(rectangles(shape, start, stop))
        assert len(found) <= max(1, 2 * len(shape) - 1)
        entries = [e for box, _ in found for e in whole[box.slices].flatten().tolist()]
        assert entries == list(range(start, stop))
        assert all(whole[box.slices].flatten()[0] == at for box, at in found)


def test_meet():
    a = Box((2, 0), (3, 4))
    assert a.meet(Box((4, 3), (9, 9))) == Box((4, 3), (1, 1))
    assert a.meet(Box((5, 0), (1, 1))) is None
    assert Box((), ()).meet(Box((), ())) == Box((), ())


def test_gaps_are_refused():
    with pytest.raises(CheckpointError, match=r"parts of w hold 2 of the 4 entries of \(4,\); are all ranks' files there"):
        assemble("w", (4,), [(Box((0,), (2,)), torch.zeros(2)), (Box((0,), (2,)), torch.zeros(2))])
