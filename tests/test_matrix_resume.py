"""Resuming from a checkpoint: on any other layout to 1e-5, on the same one bit by bit, dropout and all. Everything with `-m slow`.
Must not know how it is run (matrix_resume.py); one layout into each other in small is in test_state.py.
"""

from __future__ import annotations

from itertools import product
from unittest import mock

import pytest
import torch

from autopar.runtime.state import checkpoint
from tests import matrix_resume
from tests.matrix import LAYOUTS, NAMES, OPTIMIZERS, TOLERANCE, ZEROS
from tests.matrix_resume import PAIRS, resume_pairs, resume_same, same_bits

pytestmark = pytest.mark.procs

ORDER = list(LAYOUTS)
# Each layout from the one before.
SOME = [(saved, loaded) for saved, loaded in PAIRS if (ORDER.index(loaded) - ORDER.index(saved)) % len(ORDER) == 1]
CELLS = list(product(ZEROS, OPTIMIZERS))


def check(found):
    for (saved, loaded), result in found.items():
        limit = 0 if saved == loaded else TOLERANCE
        assert result.error <= limit, f"{saved} -> {loaded}: error {result.error:.1e} in {result.where}"


def test_some_layouts_from_some_others():
    check(resume_pairs("mixed", "adamw", 0, SOME))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "optimizer", "turn"), matrix_resume.TURNS)
def test_any_layout_from_any_other(name, optimizer, turn):
    found = resume_pairs(name, optimizer, turn)
    assert len(found) == 36
    check(found)


def test_every_layout_has_every_mode():
    assert {(layout, mode) for t in range(5) for layout, mode in matrix_resume.zeros(t).items()} == set(product(LAYOUTS, ZEROS))
    assert {name for name, _, _ in matrix_resume.TURNS} == set(NAMES)


# One cell of each layout, so that every mode and optimizer is there.
DROPOUT = {layout: [(list(ZEROS)[(i + 2) % 5], list(OPTIMIZERS)[i % 2])] for i, layout in enumerate(LAYOUTS)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_layout_is_bitwise(layout):
    assert resume_same(layout, DROPOUT[layout]) == dict.fromkeys(DROPOUT[layout], "")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_layout_is_bitwise_in_every_cell(layout):
    assert resume_same(layout, CELLS) == dict.fromkeys(CELLS, "")


BREAKS = {
    "no random state": ("restore", lambda state: None),
    "no optimizer state": ("put_state", lambda optimizer, states: None),
    "no options of groups": ("put_options", lambda optimizer, options: None),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_what_is_broken_shows(broken):
    with mock.patch.object(checkpoint, *BREAKS[broken]):
        differs = resume_same("dp2", [("zero3", "adamw")])["zero3", "adamw"]
    print(broken, differs)
    assert differs


def test_same_bits():
    a = {"x": [torch.ones(2), 1], "y": (torch.zeros(()), "t")}
    b = {"x": [torch.ones(2), 1], "y": (torch.zeros(()), "t")}
    assert same_bits(a, b) == ""
    b["x"][0][1] += 1e-7
    assert same_bits(a, b) == "/x/0"
    assert same_bits({"x": [1]}, {"x": [1, 2]}) == "/x (length)"
    assert same_bits(torch.ones(1), torch.ones(1).double()) == "a tensor"
