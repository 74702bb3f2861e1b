"""Random legal plans of every sort of model, verified on all ranks in this process: outputs, every gradient and buffer.
Must not know what a plan does; `python tests/random_plans.py --count 330` runs as many as one likes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from random_plans import Case, Sweep, cases

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import sweep_models

SWEEP = Sweep()
MANY = list(cases(330))
FEW = list(cases(len(sweep_models.NAMES), start=11))
FEW = [Case(c.model, c.seed + n) for n, c in enumerate(FEW)]  # every mesh and kind, one plan per model


def run(case):
    pytest.importorskip("transformers") if case.model in sweep_models.HF else None
    SWEEP.run(case).check()


@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_few(case):
    run(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_hundreds(case):
    run(case)


def test_the_hundreds_are_of_many_graphs_and_meshes():
    assert len({c.model for c in MANY}) >= 8 and len({str(c.mesh) for c in MANY}) >= 6 and len({c.kind for c in MANY}) == 5
