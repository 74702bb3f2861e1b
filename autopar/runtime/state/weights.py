"""Whole weights by name and slice: from a mapping, a checkpoint, safetensors files and folders of them; and saved as one file.
Must not know optimizers, nor how weights are split.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from autopar.errors import CheckpointError

INDEX = "model.safetensors.index.json"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class Weights:
    """read(name, slices) -> tensor, and what there is to read."""

    what: str
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str, tuple[slice, ...]], torch.Tensor]


def source(given: Mapping[str, torch.Tensor] | str | Path) -> Weights:
    """Raises CheckpointError for files that are missing or damaged."""
    if isinstance(given, Mapping):
        if isinstance(given.get("autopar"), Mapping):
            kind = given["autopar"].get("kind")
            if kind == "merged":
                raise CheckpointError("this is a merged checkpoint; give its ['model']")
            raise CheckpointError(f"this is one rank's {kind} state dict; use load_{kind}_state_dict, or merge those of all ranks")
        shapes = {n: tuple(t.shape) for n, t in given.items() if isinstance(t, torch.Tensor)}
        return Weights("the state dict", shapes, lambda name, at: given[name][at])
    path = Path(given)
    if (path / "autopar.json").exists():
        from autopar.runtime.state.checkpoint import weights_of

        return weights_of(path)
    return _files(path, _listed(path))


def _listed(path: Path) -> dict[Path, set[str] | None]:
    """The files to read, each with the names it should hold where an index says so."""
    if path.is_file() and path.suffix != ".json":
        return {path: None}
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a .safetensors file or a folder of them")
    index = path if path.is_file() else path / INDEX
    if not index.is_file():
        found = sorted(path.glob("*.safetensors.index.json"))
        if len(found) > 1:
            raise CheckpointError(f"{path} holds {len(found)} indices: {', '.join(f.name for f in found)}; give the one that is meant")
        index = found[0] if found else index
    if index.is_file():
        try:
            where = json.loads(index.read_text())["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"cannot read the index {index}: {type(e).__name__}: {e}") from e
        out: dict[Path, set[str] | None] = {}
        for name, file in where.items():
            out.setdefault(index.parent / file, set()).add(name)
        return out
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds no .safetensors file")
    return dict.fromkeys(files)


def _files(path: Path, listed: Mapping[Path, set[str] | None]) -> Weights:
    where: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file, wanted in listed.items():
        try:
            handle = safe_open(file, framework="pt", device="cpu")
        except FileNotFoundError as e:
            raise CheckpointError(f"{file} is missing; {path} lists it") from e
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"cannot read {file}: {e}; it is truncated or damaged") from e
        names = set(handle.keys())
        if wanted is not None and not wanted <= names:
            raise CheckpointError(f"{file} lacks {', '.join(sorted(wanted - names)[:6])}, which the index says it holds")
        for name in names if wanted is None else wanted:
            where[name] = handle
            shapes[name] = tuple(handle.get_slice(name).get_shape())

    def read(name: str, at: tuple[slice, ...]) -> torch.Tensor:
        if not at:
            return where[name].get_tensor(name)
        return where[name].get_slice(name)[at]

    return Weights(str(path), shapes, read)


def write_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Whole tensors as one safetensors file; of one under several names (tied weights) the first is kept, as Hugging Face does."""
    kept = {id(t): n for n, t in reversed(tensors.items())}
    first = {n: tensors[n] for n in tensors if kept[id(tensors[n])] == n}
    views = create(path, {n: (tuple(t.shape), t.dtype) for n, t in first.items()})
    for name, t in first.items():
        views[name].copy_(t.detach())


def create(path: Path, declared: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, torch.Tensor]:
    """A safetensors file of zeros and its tensors, mapped from it, so that several processes can each write their slices."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    # NB: the widest first, so that each begins at a multiple of its item size.
    for name, (shape, dtype) in sorted(declared.items(), key=lambda item: -item[1][1].itemsize):
        if dtype not in DTYPES:
            raise CheckpointError(f"{name} is {dtype}, which safetensors files cannot hold")
        stop = at + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)
    return opened(path, declared)


def opened(path: Path, declared: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, torch.Tensor]:
    """The tensors of a file that create() made, mapped from it; writing to them writes to the file."""
    with path.open("rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(start - 8))
    flat = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
    out = {}
    for name, (shape, dtype) in declared.items():
        a, b = header[name]["data_offsets"]
        out[name] = flat[start + a : start + b].view(dtype).view(shape) if b > a else torch.empty(shape, dtype=dtype)
    return out
