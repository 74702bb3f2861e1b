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
from autopar.runtime.groups import TIMEOUT, alone, fail_together, init, rank_mesh
from autopar.runtime.module import ParallelModule
from autopar.runtime.reader import SafetensorsReader

WEIGHTS = "weights.safetensors"


def compile_once(build: Callable[[], Path], world: int, timeout: float = TIMEOUT) -> Path:
    """Run build() on rank 0 and return its folder on every rank. NB: collective.

    A run of one process needs no torchrun. Raises LayoutError outside of torchrun for more, for a world size that is not
    the configured one (before anything is compiled), and on every rank with rank 0's error where it fails.
    """
    if world == 1 and alone():
        return build()
    init(timeout)
    running = dist.get_world_size()
    if running != world:
        raise LayoutError(
            f"{running} {'processes are' if running > 1 else 'process is'} running, but runtime_ngpus is {world}; "
            f"launch {world} (torchrun --nproc_per_node {world} ...) or set runtime_ngpus={running}"
        )
    rank = dist.get_rank()
    # NB: absolute, for ranks that were started elsewhere
    folder = fail_together("compile", lambda: str(build().absolute()) if rank == 0 else "", timeout)
    box = [folder]
    dist.broadcast_object_list(box, src=0)
    return Path(box[0])


def load(
    folder: str | Path,
    *,
    units: int | None = None,
    device: torch.device | str | None = None,
    weights: str | Path | None = None,
    timeout: float = TIMEOUT,
) -> ParallelModule:
    """This rank's module from a savedir, with its slices of the initial weights, on its device. NB: collective.

    weights: read these .safetensors instead (a file or a folder of them, tensors under their original names).
    Raises LayoutError outside of torchrun or for a world that is no multiple of the plan's devices, SavedirError for a
    folder that is missing, half written or damaged; an error on one rank ends all ranks.
    """
    from autopar.codegen.load import load_file

    folder = Path(folder)
    if not alone():
        init(timeout)  # first, so that ranks can tell each other what is wrong
    axes = fail_together("read the generated code", lambda: _axes(folder), timeout)
    mesh = rank_mesh(axes, device=device, timeout=timeout)
    if units is not None and mesh.units != units:
        raise LayoutError(f"{mesh.units} scale units of {mesh.unit_size} devices are running, but the configuration says {units}")

    def fill() -> ParallelModule:
        module = load_file(folder, f"rank{mesh.device_index}.py").MODULE(mesh)
        reader = SafetensorsReader(weights or folder / WEIGHTS)
        if missing := [n for n in module.named_placements() if n not in reader]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise SavedirError(
                f"{weights or folder / WEIGHTS} has no numbers for {missing[0]!r}{more}: the module was on the meta device when it was "
                "compiled, or these are the weights of another one. Compile a module that has its weights, or name a checkpoint: "
                "autopar.runtime.launch.load(folder, weights='model.safetensors')"
            )
        return module.load(reader, mesh.device)

    return fail_together("load", fill, timeout)


def _axes(folder: Path) -> tuple[tuple[str, int], ...]:
    """The mesh of a complete folder."""
    from autopar.codegen.savedir import read_manifest

    if read_manifest(folder) is None:
        raise SavedirError(f"{folder} holds no complete generated code (no manifest.json); compile it first")
    try:
        return tuple(json.loads((folder / "plan.json").read_text())["mesh"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise SavedirError(f"cannot read {folder / 'plan.json'}: {e}; compile again with reuse='override'") from e
