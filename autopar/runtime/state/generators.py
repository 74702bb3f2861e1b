"""The random states of this process: torch on CPU and CUDA, Python, NumPy. As data of tensors, numbers and texts only.
Must not know who saves them.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def random_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    out: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": [version, list(numbers), gauss]}
    if torch.cuda.is_initialized():
        out["cuda"] = torch.cuda.get_rng_state()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        out["numpy"] = [str(name), [int(k) for k in keys], *(x if isinstance(x, (int, float)) else x.item() for x in rest)]
    return out


def restore(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state:
        import numpy

        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
