"""Where a ParallelModule's initial values come from: the weights given, the savedir, rank 0, or the module's own initialisation.
Must not know how a savedir is made; no rank ever holds more than its slices and one tensor.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.errors import LayoutError, SavedirError
from autopar.runtime.broadcast import Slices, Want, fetch, key
from autopar.runtime.groups import TIMEOUT, fail_together
from autopar.runtime.materialise import materialise
from autopar.runtime.module import ParallelModule, Reader
from autopar.runtime.placement import Placement
from autopar.runtime.reader import SafetensorsReader
from autopar.weights import BUFFERS, WEIGHTS

Pieces = dict[tuple[str, str], Tensor]  # (name, text of slices) -> that part of the whole tensor


def fill(
    module: ParallelModule,
    folder: Path,
    *,
    init_params: bool = True,
    weights: str | Path | Reader | None = None,
    original: Callable[[], nn.Module] | None = None,
    ask_rank0: bool = False,
    device: torch.device | None = None,
    timeout: float = TIMEOUT,
) -> ParallelModule:
    """Give every declared tensor of a module its initial value. NB: collective, but init_params may differ between ranks.

    init_params: False leaves parameters and the buffers of the state dict NaN (or zero), to be loaded later.
    weights: .safetensors files or a function (name, slices) -> tensor, instead of the weights in the folder.
    original: makes the module it was compiled from, whose own initialisation gives values to what was on the meta device.
    ask_rank0: nodes may lack the weights; ranks there receive their slices from rank 0.
    Raises SavedirError or LayoutError for tensors that nothing gives a value, on all ranks.
    """
    places = module.named_placements()
    state = {n for n, p in places.items() if p.kind == "param" or (p.kind == "buffer" and p.persistent)}
    others: dict[str, list[str]] = {}
    for alias, of in module.named_aliases().items():
        others.setdefault(of, []).append(alias)

    def sources() -> tuple[dict[str, Reader], Reader]:
        saved = [SafetensorsReader(f) for f in (folder / WEIGHTS, folder / BUFFERS) if f.exists()]
        readers: dict[str, Reader] = {}
        given = _given(weights, others) if weights is not None else None
        for name in places:
            if name in state and not init_params:
                readers[name] = _Empty(places[name])
            elif name in state and given is not None:
                readers[name] = _cast(given, places[name])
            else:
                found = next((r for r in saved if name in r), None)
                if found is not None:
                    readers[name] = found
        return readers, lambda name, slices: next(r for r in saved if name in r)(name, slices)

    readers, local = fail_together("load", sources, timeout)
    many = dist.is_initialized() and dist.get_world_size() > 1
    if ask_rank0 and many:
        with_values = [sorted(n for n in places if (folder / WEIGHTS).exists() and n in SafetensorsReader(folder / WEIGHTS))]
        dist.broadcast_object_list(with_values, src=0)
        wanted = [n for n in with_values[0] if n not in readers]
        pieces = fetch([w for n in wanted for w in _wants(n, places[n], module)] if dist.get_rank() else [], local)
        readers |= {n: _popper(pieces) for n in wanted}
    drawn = [(torch.get_rng_state(), _other_generators())]
    if original is not None and many:
        dist.broadcast_object_list(drawn, src=0)

    def finish() -> ParallelModule:
        missing = [n for n in places if n not in readers]
        if missing and original is None:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise SavedirError(
                f"{folder / WEIGHTS} has no numbers for {missing[0]!r}{more}: the module was on the meta device when it was "
                "compiled, or these are the weights of another one. Compile a module that has its weights, or name a checkpoint: "
                "autopar.runtime.launch.load(folder, weights='model.safetensors')"
            )
        if missing:
            pieces = _initialised(original(), {n: places[n] for n in missing}, module, *drawn[0])
            readers.update((n, _popper(pieces)) for n in missing)
        return module.load(lambda name, slices: readers[name](name, slices), device or module.mesh.device)

    return fail_together("load", finish, timeout)


def _initialised(original: nn.Module, places: Mapping[str, Placement], module: ParallelModule, drawn: Tensor, others: str) -> Pieces:
    """The slices of this rank after the original's own initialisation, which draws from rank 0's random state.

    A rank whose state was the same goes on where the initialisation ended, as plain PyTorch would; another keeps its own.
    others: digest of rank 0's other generators. Raises LayoutError where they are drawn from and this rank's differ.
    """
    pieces: Pieces = {}

    def keep(name: str, whole: Tensor) -> None:
        held = [whole]

        def read(slices: Slices) -> Tensor:
            pieces[name, key(slices)] = held[0][slices].clone()
            return pieces[name, key(slices)]

        places[name].shard(module.mesh, read)
        held.clear()  # NB: shard's recursive function is a circle of references, which would keep the whole until the next collection

    own, own_others = torch.get_rng_state(), _other_generators()
    torch.set_rng_state(drawn)
    try:
        materialise(original, keep, set(places))
    finally:
        if not torch.equal(own, drawn):
            torch.set_rng_state(own)
    if own_others not in (others, _other_generators()):
        raise LayoutError(
            f"the initialisation of {type(original).__name__} draws from Python's or NumPy's random numbers, and rank {module.mesh.rank} "
            "has other ones than rank 0; seed them alike on all ranks, or draw with torch"
        )
    return pieces


def _other_generators() -> str:
    """Digest of the states of Python's and NumPy's generators."""
    numpy = sys.modules.get("numpy")
    return hashlib.sha256(repr((random.getstate(), numpy and numpy.random.get_state()[1].tobytes())).encode()).hexdigest()


def _wants(name: str, place: Placement, module: ParallelModule) -> list[Want]:
    """What shard() will read."""
    wants: list[Want] = []

    def read(slices: Slices) -> Tensor:
        wants.append((name, slices))
        return torch.empty(place.shape, dtype=place.dtype, device="meta")[slices]

    place.shard(module.mesh, read)
    return wants


def _popper(pieces: Pieces) -> Reader:
    return lambda name, slices: pieces.pop((name, key(slices)))


class _Empty:
    """Values that show at once when they are used before something was loaded."""

    def __init__(self, place: Placement):
        self.place = place

    def __call__(self, name: str, slices: Slices) -> Tensor:
        shape = torch.empty(self.place.shape, device="meta")[slices].shape
        with suppress(TypeError):
            if self.place.dtype.is_floating_point or self.place.dtype.is_complex:
                return torch.full(shape, float("nan"), dtype=self.place.dtype)
        return torch.zeros(shape, dtype=self.place.dtype)


def _given(weights: str | Path | Reader, others: Mapping[str, list[str]]) -> Reader:
    """A reader of the user's weights, in which a tied tensor may go by any of its names."""
    if callable(weights) and not isinstance(weights, SafetensorsReader):
        return weights
    files = weights if isinstance(weights, SafetensorsReader) else SafetensorsReader(weights)

    def read(name: str, slices: Slices) -> Tensor:
        return files(next((n for n in (name, *others.get(name, ())) if n in files), name), slices)

    return read


def _cast(reader: Reader, place: Placement) -> Reader:
    """Checkpoints are often kept in another precision."""

    def read(name: str, slices: Slices) -> Tensor:
        t = reader(name, slices)
        return t.to(place.dtype) if t.is_floating_point() and place.dtype.is_floating_point else t

    return read
