"""Guards and input checks: what passes, what does not, and the words of the errors.
Must not know the tracer."""

from __future__ import annotations

import warnings

import pytest
import torch

from autopar.errors import GuardError, LayoutError
from autopar.runtime.guards import check_divisible, check_input, guard

SAME = [
    (True, True),
    (3, 3),
    (3, 3.0),
    (float("nan"), float("nan")),
    ((1, 2), (1, 2)),
    ([1, 2], (1, 2)),
    (None, None),
    ("a", "a"),
    (torch.tensor([1, 2]), torch.tensor([1, 2])),
]
DIFFERENT = [
    (True, False),
    (3, 4),
    (1.0, float("nan")),
    ((1, 2), (1, 2, 3)),
    (None, 0),
    ("a", 1),
    (torch.tensor([1, 2]), torch.tensor([1, 3])),
    (torch.tensor([1, 2]), torch.tensor([1])),
]


@pytest.mark.parametrize("a,b", SAME)
def test_same(a, b):
    guard(a, b, "m.py:1", "x", "error")


@pytest.mark.parametrize("a,b", DIFFERENT)
def test_different(a, b):
    with pytest.raises(GuardError):
        guard(a, b, "m.py:1", "x", "error")


def test_message_has_the_line_and_both_values():
    with pytest.raises(GuardError, match=r"masking_utils.py:307: `padding_mask.all\(\)` is False, but was True when the model was traced"):
        guard(False, True, "masking_utils.py:307", "padding_mask.all()", "error")


def test_warn_once_and_off():
    with pytest.warns(UserWarning, match=r"m.py:7: `y` is 1, but was 2"):
        guard(1, 2, "m.py:7", "y", "warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard(1, 2, "m.py:7", "y", "warn")
        guard(1, 2, "m.py:8", "z", "off")
    with pytest.raises(LayoutError, match="unknown guards mode 'loud'"):
        guard(1, 2, "m.py:9", "z", "loud")


X = torch.ones(2, 3)
BAD_INPUTS = {
    "size": ((X, (2, 4), torch.float32), r"input 'x' has shape \(2, 3\); the code was generated for \(2, 4\).*constant_folding=False"),
    "rank": ((X, (2, 3, 1), torch.float32), r"shape \(2, 3\); the code was generated for \(2, 3, 1\)"),
    "any": ((X, (None, 4), torch.float32), r"for \(any, 4\)"),
    "dtype": ((X, None, torch.int64), r"input 'x' has dtype torch.float32; the code was generated for torch.int64"),
    "none": ((None, (2, 3), torch.float32), r"input 'x' is NoneType None; the code was generated for a tensor"),
    "list": (([1, 2], None, None), r"input 'x' is list \[1, 2\]"),
}


@pytest.mark.parametrize("args,message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(args, message):
    with pytest.raises(GuardError, match=message):
        check_input("x", *args)


def test_good_input():
    for shape in ((2, 3), (None, 3), (None, None), None):
        check_input("x", X, shape, torch.float32)
    check_input("x", X)


def test_divisible():
    check_divisible(6, 3, "the batch")
    with pytest.raises(LayoutError, match="the batch has size 6, which does not split evenly into 4 parts"):
        check_divisible(6, 4, "the batch")
