"""Weights that a run starts from, read from files, and the floating types of parameters, buffers and inputs.
Must not know which modules are compiled, nor how.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.errors import ConfigError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "none": None}
Precision = str | Mapping[str, str] | None


def load_weights(module: nn.Module, path: str, where: str, prefix: str = "") -> None:
    """Load a state dict, or its entries that begin with prefix, into a module. Raises ConfigError for what is missing or too much."""
    prefix = f"{prefix.rstrip('.')}." if prefix else ""
    state = {k.removeprefix(prefix): v for k, v in _read_state(Path(path), where).items() if k.startswith(prefix)}
    if prefix and not state:
        raise ConfigError(f"{where} {prefix!r}: no entry of {path} begins with it")
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as e:  # shapes
        raise ConfigError(f"{where}: {path} does not fit {type(module).__qualname__}: {e}") from e
    same: dict[int, list[str]] = {}
    for name, t in module.state_dict(keep_vars=True).items():
        same.setdefault(id(t), []).append(name)
    tied = {n for names in same.values() if any(n in state for n in names) for n in names}
    wrong = [f"it has no {n}" for n in missing if n not in tied] + [f"the model has no {n}" for n in unexpected]
    if wrong:
        raise ConfigError(f"{where}: {path} does not fit {type(module).__qualname__}: {'; '.join(wrong[:5])}")


def _read_state(path: Path, where: str) -> dict[str, Tensor]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ConfigError(f"{where}: there is no {'.safetensors file in' if path.is_dir() else 'file'} {path}")
    try:
        if files[0].suffix == ".safetensors":
            from safetensors.torch import load_file

            return {k: v for f in files for k, v in load_file(f).items()}
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ConfigError(f"{where}: cannot read {path}: {e}") from e
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(f"{where}: {path} holds no state dict (a dict of names to tensors); save model.state_dict() there")
    return dict(state)


def dtype_of(precision: Precision, kind: str) -> torch.dtype | None:
    """The dtype of 'param', 'buffer' or 'input' tensors; None: as they are."""
    name = precision.get(kind) if isinstance(precision, Mapping) else precision
    return DTYPES[name or "none"]


def convert(model: nn.Module, precision: Precision, skip: Collection[int] = ()) -> nn.Module:
    """Parameters and buffers in the floating types that precision asks for, in place; those with an id in skip stay."""
    for kind, tensors in (("param", model.parameters()), ("buffer", model.buffers())):
        dtype = dtype_of(precision, kind)
        for t in tensors if dtype else ():
            if t.is_floating_point() and id(t) not in skip:
                t.data = t.data.to(dtype)
    return model


def cast(sample: Any, precision: Precision) -> Any:
    """A sample with its floating tensors in the input precision."""
    dtype = dtype_of(precision, "input")
    if dtype is None:
        return sample
    return pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, sample)
