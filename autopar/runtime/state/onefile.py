"""save_weights: the whole weights as one safetensors file; each rank writes its own slices, no rank ever holds the full model.
Must not know the file's format (weights.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from autopar.runtime.groups import fail_together
from autopar.runtime.state.inventory import entries, reducer_of
from autopar.runtime.state.weights import create, opened, write_file


@torch.no_grad()
def save_weights(weights: nn.Module | Mapping[str, torch.Tensor], path: str | Path) -> None:
    """One safetensors file under original names, as Hugging Face's; tied weights are in it once. It appears when it is complete.

    weights: a merged state dict, or a module, to which every rank contributes (all give the same path, on a disk they share).
    """
    path = Path(path).absolute()
    tmp = path.with_name(f".{path.name}.saving")
    if isinstance(weights, Mapping):
        write_file(tmp, weights)
        tmp.replace(path)
        return
    mine = entries(weights, reducer_of(weights))
    declared = {e.name: (e.layout.shape, e.tensor.dtype) for e in mine.values()}
    rank = dist.get_rank() if dist.is_initialized() else 0
    fail_together("create the file", lambda: create(tmp, declared) if rank == 0 else None)

    def write() -> None:
        views = opened(tmp, declared)
        for e in mine.values():
            if e.first:
                for box, view in e.layout.cut(e.tensor):
                    views[e.name][box.slices].copy_(view)

    fail_together("write the weights", write)
    fail_together("finish the file", lambda: tmp.replace(path) if rank == 0 else None)
