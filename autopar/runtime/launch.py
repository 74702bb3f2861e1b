"""launch: compile on one rank while the others wait, bring the files to every node, then load this rank's part of a savedir.
Must not know what compiling does (a function is handed in) nor anything of the compiler.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from autopar.config import BroadcastStrategy, ComputeConfig
from autopar.errors import LayoutError, SavedirError
from autopar.runtime.broadcast import broadcast_files
from autopar.runtime.groups import TIMEOUT, alone, fail_together, holders, init, rank_mesh
from autopar.runtime.initial import fill
from autopar.runtime.mesh import RankMesh
from autopar.runtime.module import ParallelModule, Reader

T = TypeVar("T")
_unit: tuple[dist.ProcessGroup | None, int] = (None, 0)  # the run, and plan_ngpus of its modules
_meshes: dict[tuple, RankMesh] = {}


def compile_once(build: Callable[[], T], config: ComputeConfig, timeout: float = TIMEOUT) -> T:
    """Run build() on rank 0 and return what it returns on every rank. NB: collective.

    A run of one process needs no torchrun. Raises LayoutError outside of torchrun for more, for a world size that is not
    the configured one or another plan_ngpus than that of the modules before (before anything is compiled), and on every rank with
    rank 0's error where it fails.
    """
    world = config.runtime_ngpus
    if world == 1 and alone():
        return build()
    init(timeout)
    running = dist.get_world_size()
    if running != world:
        raise LayoutError(
            f"{running} {'processes are' if running > 1 else 'process is'} running, but runtime_ngpus is {world}; "
            f"launch {world} (torchrun --nproc_per_node {world} ...) or set runtime_ngpus={running}"
        )
    _check_unit(config.plan_ngpus)
    box = [fail_together("compile", lambda: build() if dist.get_rank() == 0 else None, timeout)]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _forget() -> None:
    global _unit
    _unit = (None, 0)
    _meshes.clear()


holders.append(_forget)


def leave() -> None:
    """End the processes' connection, once nobody talks any more, and let go of all that holds it."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _forget()
    gc.collect()  # NB: a group that is collected in a fork of this process waits for threads that are not there


def distribute(source: Path, folder: Path, strategy: BroadcastStrategy, timeout: float = TIMEOUT) -> None:
    """Bring rank 0's folder to this node's, where the strategy asks for it. NB: collective."""
    if strategy is not BroadcastStrategy.NONE and not alone():
        broadcast_files(source, folder, strategy, timeout)


def load(
    folder: str | Path,
    *,
    units: int | None = None,
    device: torch.device | str | None = None,
    weights: str | Path | Reader | None = None,
    timeout: float = TIMEOUT,
) -> ParallelModule:
    """This rank's module from a savedir, with its slices of the initial weights, on its device. NB: collective.

    weights: read these .safetensors instead (a file or a folder of them, tensors under their original names).
    Raises LayoutError outside of torchrun or for a world that is no multiple of the plan's devices, SavedirError for a
    folder that is missing, half written or damaged; an error on one rank ends all ranks.
    """
    return load_class(folder, units=units, device=device, weights=weights, timeout=timeout)()


def load_class(
    folder: str | Path,
    *,
    units: int | None = None,
    device: torch.device | str | None = None,
    config: ComputeConfig | None = None,
    timeout: float = TIMEOUT,
    **sources: Any,
) -> type[ParallelModule]:
    """The class of this rank's module: called, it makes one with its initial values; cls(init_params=False) leaves them to be loaded.

    sources: see initial.fill. NB: collective, and so is every call of the class.
    """
    folder = Path(folder)
    if not alone():
        init(timeout)  # first, so that ranks can tell each other what is wrong
    axes, manifest = fail_together("read the generated code", lambda: _read(folder), timeout)
    mesh = _mesh(axes, device, timeout)
    if units is not None and mesh.units != units:
        raise LayoutError(f"{mesh.units} scale units of {mesh.unit_size} devices are running, but the configuration says {units}")

    def define() -> type[ParallelModule]:
        from autopar.codegen.load import load_file

        generated = load_file(folder, f"rank{mesh.device_index}.py").MODULE
        return _class(generated, mesh, config, manifest, lambda m, init: fill(m, folder, **{**sources, **init}, timeout=timeout))

    return fail_together("read the generated code", define, timeout)


def _class(
    generated: type[ParallelModule],
    mesh: RankMesh,
    config: ComputeConfig | None,
    manifest: dict[str, Any],
    give_values: Callable[[nn.Module, dict[str, bool]], Any],
) -> type[ParallelModule]:
    inference = config is not None and config.inference_only

    def __init__(self: Any, init_params: bool | None = None) -> None:
        generated.__init__(self, mesh)
        self.compute_config = config
        give_values(self, {} if init_params is None else {"init_params": init_params})
        self.train(bool(manifest.get("graph", {}).get("training", True)))
        if inference:
            self.requires_grad_(False)

    body: dict[str, Any] = {"__init__": __init__, "__module__": generated.__module__, "__doc__": generated.__doc__}
    if inference:
        body["forward"] = torch.no_grad()(generated.forward)
    return type(generated)(generated.__name__, (generated,), body)


def _mesh(axes: tuple[tuple[str, int], ...], device: torch.device | str | None, timeout: float) -> RankMesh:
    """The mesh of this run; modules with the same axes share one, and its process groups."""
    global _unit
    size = prod(k for _, k in axes)
    if alone():
        return rank_mesh(axes, device=device, timeout=timeout)
    _check_unit(size)
    run = dist.group.WORLD
    for stale in [k for k in _meshes if k[0] is not run]:
        del _meshes[stale]
    key = (run, axes, None if device is None else str(device))
    if key not in _meshes:
        _meshes[key] = rank_mesh(axes, device=device, timeout=timeout)
    _unit = (run, size)
    return _meshes[key]


def _check_unit(size: int) -> None:
    """Raise LayoutError unless the modules of this run have all the same plan_ngpus."""
    run, known = _unit
    if run is not None and run is dist.group.WORLD and known != size:
        raise LayoutError(
            f"this module has plan_ngpus={size}, but another one of this run has plan_ngpus={known}; a rank belongs to one scale unit, so "
            f"all modules of a run need the same; leave a module that need not be split unparallelised"
        )


def _read(folder: Path) -> tuple[tuple[tuple[str, int], ...], dict[str, Any]]:
    """The mesh and the manifest of a complete folder."""
    from autopar.codegen.savedir import read_manifest

    manifest = read_manifest(folder)
    if manifest is None:
        many = "" if alone() else ", or, if this node does not share rank 0's disk, use broadcast_strategy='all'"
        raise SavedirError(f"{folder} holds no complete generated code (no manifest.json); compile it first{many}")
    try:
        return tuple(json.loads((folder / "plan.json").read_text())["mesh"].items()), manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise SavedirError(f"cannot read {folder / 'plan.json'}: {e}; compile again with reuse='override'") from e
