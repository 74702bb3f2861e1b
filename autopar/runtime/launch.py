"""launch: compile on one rank while the others wait, then load this rank's part of a savedir.
Must not know what compiling does (a function is handed in) nor anything of the compiler.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from autopar.errors import LayoutError, SavedirError
from autopar.runtime.groups import TIMEOUT, fail_together, init, rank_mesh
from autopar.runtime.module import ParallelModule
from autopar.runtime.reader import SafetensorsReader


def compile_once(build: Callable[[], Path], world: int, timeout: float = TIMEOUT) -> Path:
    """Run build() on rank 0 and return its folder on every rank. NB: collective.

    A run of one process needs no torchrun. Raises LayoutError outside of torchrun for more, for a world size that is not
    the configured one (before anything is compiled), and on every rank with rank 0's error where it fails.
    """
    if world == 1 and not dist.is_initialized() and not dist.is_torchelastic_launched():
        return build()
    init(timeout)
    if dist.get_world_size() != world:
        raise LayoutError(
            f"{dist.get_world_size()} processes are running, but runtime_ngpus is {world}; "
            f"launch {world} (torchrun --nproc_per_node {world} ...) or set runtime_ngpus={dist.get_world_size()}"
        )
    rank = dist.get_rank()
    folder = fail_together("compile", lambda: str(build()) if rank == 0 else "", timeout)
    box = [folder]
    dist.broadcast_object_list(box, src=0)
    return Path(box[0])


def load(
    folder: str | Path,
    *,
    units: int | None = None,
    device: torch.device | str | None = None,
    timeout: float = TIMEOUT,
) -> ParallelModule:
    """This rank's module from a savedir, with its slices of the initial weights, on its device. NB: collective.

    Raises LayoutError outside of torchrun or for a world that is no multiple of the plan's devices, SavedirError for a
    folder that is missing, half written or damaged; an error on one rank ends all ranks.
    """
    from autopar.codegen.load import load_file

    folder = Path(folder)

    def axes() -> tuple[tuple[str, int], ...]:
        if not (folder / "manifest.json").exists():
            raise SavedirError(f"{folder} holds no complete generated code (no manifest.json); compile it first")
        try:
            plan = json.loads((folder / "plan.json").read_text())
        except (OSError, json.JSONDecodeError) as e:
            raise SavedirError(f"cannot read {folder / 'plan.json'}: {e}; compile again with reuse='override'") from e
        return tuple(plan["mesh"].items())

    mesh = rank_mesh(axes(), device=device, timeout=timeout)
    if units is not None and mesh.units != units:
        raise LayoutError(f"{mesh.units} scale units of {mesh.unit_size} devices are running, but the configuration says {units}")

    def fill() -> ParallelModule:
        generated = load_file(folder, f"rank{mesh.device_index}.py")
        return generated.MODULE(mesh).load(SafetensorsReader(folder / "weights.safetensors"), mesh.device)

    return fail_together("load", fill, timeout)
