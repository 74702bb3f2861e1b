"""Reads slices of weights from safetensors files.
Must not know modules or meshes: it is asked for a name and slices.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from autopar.errors import SavedirError, suggest


class SafetensorsReader:
    """reader(name, slices) -> tensor, on CPU, reading only those slices from disk.

    path: a .safetensors file, a folder of them, or several. Raises SavedirError for a missing or broken file and for an unknown name.
    """

    def __init__(self, path: str | Path | Iterable[str | Path]):
        paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(p) for p in path]
        files = [f for p in paths for f in (sorted(p.glob("*.safetensors")) if p.is_dir() else [p])]
        self.paths = paths
        self._files: dict[str, object] = {}
        if not files:
            raise SavedirError(f"no .safetensors file in {', '.join(map(str, paths))}")
        for f in files:
            try:
                handle = safe_open(f, framework="pt", device="cpu")
            except (OSError, SafetensorError) as e:
                raise SavedirError(f"cannot read weights from {f}: {e}") from e
            self._files.update((name, handle) for name in handle.keys())  # noqa: SIM118  not a dict

    def names(self) -> list[str]:
        return sorted(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __call__(self, name: str, slices: tuple[slice, ...] = ()) -> torch.Tensor:
        handle = self._files.get(name)
        if handle is None:
            raise SavedirError(f"no weights for {name!r} in {', '.join(map(str, self.paths))}: {suggest(name, self._files)}")
        if all(s == slice(None) for s in slices):
            return handle.get_tensor(name)
        return handle.get_slice(name)[tuple(slices)].contiguous()
