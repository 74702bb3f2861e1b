"""verify: what it finds wrong, and what it must not: rounding of a model that computes in less than float32.
Must not know how ranks are run.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autopar
from autopar import ComputeConfig
from autopar.verification import TOLERANCE

HALF = (torch.bfloat16, torch.float16)


class Autocast(nn.Module):
    """Its products are in half precision; what it returns, and every gradient, is float32 all the same."""

    def __init__(self, dtype):
        super().__init__()
        self.up, self.down, self.dtype = nn.Linear(8, 16), nn.Linear(16, 8), dtype

    def forward(self, x):
        with torch.autocast("cpu", self.dtype):
            h = self.up(x)
            with torch.autocast("cpu", enabled=False):
                return self.down(h.to(x.dtype)).sum()


class Casts(Autocast):
    def forward(self, x):
        return self.down(self.up(x).to(self.dtype).square().to(x.dtype)).sum()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cls", [Autocast, Casts])
def test_half_precision_inside_is_compared_by_its_own_tolerance(cls, dtype):
    torch.manual_seed(0)
    report = autopar.verify(cls(dtype), {"x": torch.randn(4, 6, 8)}, "tp", ComputeConfig(2)).check()
    assert {d.tolerance for d in report.differences} == {TOLERANCE[dtype]}


def test_autocast_leaves_float64_alone_and_so_it_is_exact():
    report = autopar.verify(Autocast(torch.bfloat16).double(), {"x": torch.randn(4, 6, 8).double()}, "tp", ComputeConfig(2)).check()
    assert {d.tolerance for d in report.differences} == {1e-12}


def test_float32_and_a_tolerance_of_ones_own():
    module = nn.Linear(8, 8)
    for given, used in ((None, 1e-5), (1e-3, 1e-3)):
        report = autopar.verify(module, {"input": torch.randn(4, 8)}, "tp", ComputeConfig(2), tolerance=given).check()
        assert {d.tolerance for d in report.differences} == {used}
