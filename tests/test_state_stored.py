"""Tensors read out of checkpoint files without torch.load: the same numbers, and no more of the file than is wanted.
Must not know checkpoints as a whole."""

from __future__ import annotations

import io
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from autopar.runtime.state import stored
from autopar.runtime.state.stored import Stored, locate, read

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64)


def file_of(*values):
    """A file as DCP writes it, everything back to back after an odd number of other bytes, and where each is."""
    out, places = io.BytesIO(b"x" * 13), []
    out.seek(0, io.SEEK_END)
    for v in values:
        one = io.BytesIO()
        torch.save(v, one)
        places.append(SimpleNamespace(offset=out.tell(), length=len(one.getvalue())))
        out.write(one.getvalue())
    return out, places


class Counting(io.BytesIO):
    count = 0

    def readinto(self, buffer):
        n = super().readinto(buffer)
        self.count += n
        return n


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rectangle(dtype):
    g = torch.Generator().manual_seed(0)
    t = torch.randint(0, 2**7, (3, 4, 5), generator=g).to(dtype)
    file, places = file_of(torch.ones(2), t, torch.tensor(3).to(dtype), torch.empty(0, 4).to(dtype))
    found = [locate(file, at) for at in places]
    assert all(isinstance(f, Stored) for f in found) and found[1].shape == (3, 4, 5) and found[1].dtype == dtype
    spans = [[(a, b) for a in range(n) for b in range(a + 1, n + 1)] for n in t.shape]
    for box in product(*spans):
        want = t[tuple(slice(a, b) for a, b in box)]
        got = torch.zeros(want.shape, dtype=dtype)
        read(file, found[1], [a for a, _ in box], got)
        assert got.view(torch.uint8).equal(want.contiguous().view(torch.uint8)), box
    for target in (torch.zeros(5, 4, 3, dtype=dtype).permute(2, 1, 0), torch.zeros(3, 4, 10, dtype=dtype)[..., ::2]):
        read(file, found[1], (0, 0, 0), target)  # into a view that is not contiguous
        assert target.contiguous().view(torch.uint8).equal(t.view(torch.uint8))
    scalar = torch.zeros((), dtype=dtype)
    read(file, found[2], (), scalar)
    assert scalar.to(torch.float64 if not dtype.is_complex else dtype) == 3 or dtype == torch.bool
    read(file, found[3], (0, 0), torch.empty(0, 4, dtype=dtype))


def test_only_the_rows_that_are_wanted():
    t = torch.randn(64, 32)
    file, (at,) = file_of(t)
    found, target, counting = locate(file, at), torch.zeros(3, 7), Counting(file.getvalue())
    read(counting, found, (10, 4), target)
    assert target.equal(t[10:13, 4:11]) and counting.count == 3 * 32 * 4


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(4, 6).t(),
        torch.randn(8, 6)[2:5],
        torch.randn(4, 6)[:, ::2],
        torch.nn.Parameter(torch.randn(3)),
        torch.randn(3).expand(4, 3),
    ],
    ids=["transposed", "view of rows", "strided", "parameter", "expanded"],
)
def test_odd_tensors(value):
    file, (at,) = file_of(value)
    target = torch.zeros(value.shape)
    read(file, locate(file, at), [0] * value.dim(), target)
    assert target.equal(value.detach())


def test_alike_tensors_are_found_by_their_first_bytes(monkeypatch):
    """Equal numbers of bytes are not enough."""
    whole = torch.arange(24, dtype=torch.int32).view(4, 6)
    values = [torch.randn(4, 6), torch.randn(4, 6), torch.randn(6, 4), torch.randn(6, 4).t(), whole]
    file, places = file_of(*values, *values)
    parsed = []
    monkeypatch.setattr(stored, "locate", lambda f, at: parsed.append(at) or locate(f, at))
    find = stored.Locator()
    for value, at in zip(values * 2, places, strict=True):
        target = torch.zeros(value.shape, dtype=value.dtype)
        read(file, find(file, at), [0, 0], target)
        assert target.equal(value)
    assert 3 <= len(parsed) < len(places)


def test_a_file_that_ends_early():
    file, (at,) = file_of(torch.randn(1000))
    found = locate(file, at)
    with pytest.raises(EOFError, match="bytes too early"):
        read(io.BytesIO(file.getvalue()[:2000]), found, (0,), torch.zeros(1000))
    with pytest.raises(Exception, match=r"."):
        locate(io.BytesIO(file.getvalue()[:2000]), at)
