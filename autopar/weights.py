"""weights: a module's initial values as safetensors files in a savedir, and whether they still are those of the module given.
Must not know graphs, plans or ranks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autopar.errors import SavedirError

WEIGHTS = "weights.safetensors"  # parameters and buffers of the state dict
BUFFERS = "buffers.safetensors"  # buffers that are not in it, and constants of the program
log = logging.getLogger("autopar")


def save_weights(module: nn.Module, state: Iterable[str], others: Iterable[str], constants: Mapping[str, Tensor], folder: Path) -> None:
    """Write the tensors of the state dict by name to one file, other buffers and the constants to another; none on the meta device."""
    found = tensors(module)
    save({n: found[n] for n in state if not found[n].is_meta}, folder / WEIGHTS)
    save({**{n: found[n] for n in others if not found[n].is_meta}, **constants}, folder / BUFFERS)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names."""
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return {n: t.detach() for n, t in named.items()}


def save(values: Mapping[str, Tensor], path: Path) -> None:
    # NB: safetensors refuses tensors that share memory; those, expanded and sliced ones are written out in full.
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, t in values.items():
        t = t.cpu().contiguous()
        storage = t.untyped_storage()
        if storage._cdata in seen or storage.nbytes() != t.numel() * t.element_size():
            t = t.clone()
        seen.add(t.untyped_storage()._cdata)
        plain[name] = t
    save_file(plain, str(path))


def refresh(module: nn.Module, folder: Path) -> None:
    """Make the saved values those of this module, where it has others. Values on the meta device stay as they were saved.

    Raises SavedirError where that cannot be written.
    """
    found = {n: t for n, t in tensors(module).items() if not t.is_meta}
    for path in (folder / WEIGHTS, folder / BUFFERS):
        with safe_open(path, "pt") as saved:
            names = list(saved.keys())
            if all(n not in found or _same(saved.get_tensor(n), found[n]) for n in names):
                continue
            values = {n: found[n] if n in found else saved.get_tensor(n) for n in names}
        tmp = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save(values, tmp)
            tmp.replace(path)
        except OSError as e:
            raise SavedirError(f"cannot write the initial weights to {path}: {e.strerror}; choose another gen_savedir") from e
        finally:
            tmp.unlink(missing_ok=True)
        log.info("%s: initial values of this module", path)


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bytes(a), _bytes(b.cpu()))


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)
