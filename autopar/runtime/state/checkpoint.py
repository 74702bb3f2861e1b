"""Checkpoints: a folder through torch.distributed.checkpoint, written aside and renamed, that loads under any plan and world size.
Must not know how tensors are stored (planner.py) nor how they are split (layout.py).

In the folder: DCP's files, and autopar.json, written last: the size of every file. A folder without it is no checkpoint.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from autopar.errors import CheckpointError
from autopar.runtime.groups import fail_together
from autopar.runtime.state import planner
from autopar.runtime.state.generators import random_state, restore
from autopar.runtime.state.inventory import (
    Entry,
    Held,
    check_groups,
    compare,
    entries,
    groups,
    held,
    new_like,
    parallel_modules,
    put_options,
    put_state,
    reducer_of,
    refresh,
    split_state,
)
from autopar.runtime.state.layout import Layout
from autopar.runtime.state.merge import join_groups, to_torch
from autopar.runtime.state.weights import Weights

log = logging.getLogger("autopar")
FORMAT = 1
MANIFEST = "autopar.json"
MODEL, STATE = "model.", "optimizer.state."


def _world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _aside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def save_checkpoint(folder: str | Path, module: nn.Module, optimizer: Any = None, extra: Any = None) -> None:
    """Write the module, optimizer, random states and `extra` (numbers, texts, tensors, lists and dicts of them; rank 0's). NB: collective.

    All ranks give the same folder, on a disk they share. It appears when it is complete: a save that is killed leaves the checkpoint that
    was there before. Raises CheckpointError where the state cannot be saved or loaded again.
    """
    folder = Path(folder).absolute()
    rank, world = _world()
    tmp = _aside(folder, "saving")

    def collect() -> planner.SavePlanner:
        if rank == 0:
            if folder.exists() and not (folder / MANIFEST).exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise CheckpointError(f"{folder} exists and is no complete checkpoint; save to another folder, or remove it first")
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
        return _collect(module, optimizer, extra, rank)

    plan = fail_together("prepare the checkpoint", collect)
    _dcp(lambda: dcp.save({}, storage_writer=dcp.FileSystemWriter(tmp), planner=plan, no_dist=world == 1), f"save {folder}")

    def finish() -> None:
        if rank == 0:
            unit = next((m.mesh.unit_size for _, m in parallel_modules(module)), 1)
            sizes = {f.name: f.stat().st_size for f in sorted(tmp.iterdir())}
            _write(tmp / MANIFEST, json.dumps({"format": FORMAT, "world": world, "unit": unit, "files": sizes}, indent=1))
            _swap(tmp, folder)

    fail_together("finish the checkpoint", finish)


def _collect(module: nn.Module, optimizer: Any, extra: Any, rank: int) -> planner.SavePlanner:
    mine = entries(module, reducer_of(module, optimizer))
    # NB: buffers may differ between units (running statistics); all are taken from the first rank that holds them.
    tensors = {MODEL + e.name: (e.layout, e.tensor) for e in mine.values() if e.param or e.first}
    objects: dict[str, Any] = {f"random.{rank}": random_state()}
    if optimizer is not None:
        scalars = {}
        for h in held(optimizer, mine, module):
            like, scalars[h.name] = split_state(h)
            tensors |= {f"{STATE}{h.name}.{key}": (h.layout, t) for key, t in like.items()}
        objects[f"optimizer.{rank}"] = {"groups": groups(optimizer, mine, module), "scalars": scalars}
        _check_loadable("the options of the optimizer's groups", objects[f"optimizer.{rank}"]["groups"])
    if rank == 0:
        objects["extra"] = extra
        objects["module"] = {"names": {e.name: list(e.names) for e in mine.values()}, "params": [e.name for e in mine.values() if e.param]}
        _check_loadable("`extra`", extra)
    return planner.SavePlanner(tensors, objects)


def _check_loadable(what: str, value: Any) -> None:
    written = io.BytesIO()
    try:
        torch.save(value, written)
        written.seek(0)
        torch.load(written, weights_only=True)
    except Exception as e:  # NB: whatever pickling raises
        reason = str(e).splitlines()[0][:200]
        raise CheckpointError(
            f"{what} cannot be loaded again without running code ({reason}); give numbers, texts, tensors, and lists and dicts of them"
        ) from e


def _write(file: Path, text: str) -> None:
    with file.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _swap(tmp: Path, folder: Path) -> None:
    """Put a complete folder in its place. NB: at every moment one complete checkpoint is in `folder` or `.previous`."""
    previous = _aside(folder, "previous")
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    tmp.rename(folder)
    fd = os.open(folder.parent, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    shutil.rmtree(previous, ignore_errors=True)


def _dcp(run: Callable[[], Any], what: str) -> None:
    """NB: DCP's CheckpointException is a BaseException that holds one error per rank."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is wanted
            run()
    except CheckpointException as e:
        causes = {str(x[0]) or type(x[0]).__name__: r for r, x in e.failures.items()}
        text = "; ".join(f"rank {r}: {t}" for t, r in causes.items())
        raise CheckpointError(f"cannot {what}: {text}") from e


def open_checkpoint(folder: str | Path) -> tuple[Path, dict[str, Any], dcp.Metadata]:
    """The folder (or the previous one, where a save was killed while it took its place), its manifest and DCP's metadata.

    Raises CheckpointError where it is not complete.
    """
    folder = Path(folder).absolute()
    if not folder.exists():
        previous = _aside(folder, "previous")
        if not (previous / MANIFEST).exists():
            raise CheckpointError(f"there is no checkpoint {folder}")
        log.warning("%s was being replaced when its save was killed; loading the checkpoint before that", folder)
        folder = previous
    if not (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder} is no complete checkpoint: it has no {MANIFEST}, which is written last; its save did not end")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes, form = dict(manifest["files"]), manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"cannot read {folder / MANIFEST}: {type(e).__name__}: {e}; it is truncated or damaged") from e
    if form != FORMAT:
        raise CheckpointError(f"{folder} has format {form}; this version of autopar reads {FORMAT}")
    for name, size in sizes.items():
        if not (folder / name).exists():
            raise CheckpointError(f"{folder} is not complete: {name} is missing{_whose(name)}")
        there = (folder / name).stat().st_size
        if there != size:
            raise CheckpointError(f"{folder / name} is damaged: it has {there} bytes, {size} were written{_whose(name)}")
    return folder, manifest, planner.read_metadata(folder)


def _whose(file: str) -> str:
    rank = file.removeprefix("__").partition("_")[0]
    return f" (the file of rank {rank})" if rank.isdigit() else ""


@torch.no_grad()
def load_checkpoint(folder: str | Path, module: nn.Module, optimizer: Any = None, *, random: bool = True) -> Any:
    """Fill the module (and optimizer) from a checkpoint that any plan and world size has written, and return its `extra`. NB: collective.

    random: restore the random states. On the layout that saved them each rank gets its own; on another one, those of the unit's first rank.
    Raises CheckpointError, before anything is changed, where the checkpoint is incomplete or of another model.
    """
    rank, world = _world()
    reducer = reducer_of(module, optimizer)

    def prepare() -> tuple:
        path, manifest, metadata = open_checkpoint(folder)
        mine = entries(module, reducer)
        found = compare(str(path), module, mine, planner.shapes_of(metadata, MODEL))
        tensors = {MODEL + found[e.name]: e.layout.cut(e.tensor) for e in mine.values()}
        wanted = f"random.{_source_rank(module, manifest, rank, world)}"
        objects = sorted(n for n in planner.objects_of(metadata) if n in ("extra", wanted) or (optimizer and n.startswith("optimizer.")))
        values = planner.read_objects(path, metadata, objects)
        new = _optimizer(optimizer, module, mine, found, metadata, values, tensors) if optimizer is not None else None
        return path, metadata, planner.ReadPlanner(tensors), values.get(wanted), new, values["extra"]

    path, metadata, plan, drawn, new, extra = fail_together("open the checkpoint", prepare)
    _dcp(lambda: dcp.load({}, storage_reader=planner.Reader(path, metadata), planner=plan, no_dist=world == 1), f"load {path}")
    refresh(reducer)
    if new is not None:
        options, states = new
        put_options(optimizer, options)
        put_state(optimizer, states)
    if random and drawn is not None:
        restore(drawn)
    return extra


def _source_rank(module: nn.Module, manifest: dict[str, Any], rank: int, world: int) -> int:
    """The rank whose random state this one takes."""
    unit = next((m.mesh.unit_size for _, m in parallel_modules(module)), 1)
    if (manifest["world"], manifest["unit"]) == (world, unit):
        return rank
    units = manifest["world"] // manifest["unit"]
    return (rank // unit) % units * manifest["unit"]


def _targets(h: Held, name: str, metadata: dcp.Metadata, tensors: dict[str, planner.Parts]) -> dict[str, torch.Tensor]:
    """Empty state tensors for what was saved of a parameter, entered into `tensors` to be read."""
    state = {}
    prefix = f"{STATE}{name}."
    for full, shape in planner.shapes_of(metadata, prefix).items():
        if "." in full:
            continue  # NB: of a parameter below this name
        if shape != h.layout.shape:
            raise CheckpointError(f"{full!r} of {name} was saved as {shape}; the parameter is {h.layout.shape}")
        state[full] = new_like(h, metadata.state_dict_metadata[prefix + full].properties.dtype)
        tensors[prefix + full] = h.layout.cut(state[full])
    return state


def _optimizer(
    optimizer: Any,
    module: nn.Module,
    mine: Mapping[str, Entry],
    found: Mapping[str, str],
    metadata: dcp.Metadata,
    objects: Mapping[str, Any],
    tensors: dict[str, planner.Parts],
) -> tuple[list[dict[str, Any]], list[tuple[Held, dict[str, Any]]]]:
    """(options of the groups, new state of each piece), whose empty tensors are entered into `tensors` to be read."""
    saved = [v for n, v in sorted(objects.items()) if n.startswith("optimizer.")]
    if not saved:
        raise CheckpointError("the checkpoint was saved without an optimizer; load it without one")
    scalars: dict[str, dict[str, Any]] = {}
    for one in saved:
        for name, values in one["scalars"].items():
            scalars.setdefault(name, {}).update(values)
    here = {there: name for name, there in found.items()}
    order = [e.name for e in mine.values() if e.param]
    options = join_groups([[{**g, "names": [here[n] for n in g["names"]]} for g in one["groups"]] for one in saved], order)
    check_groups(optimizer, mine, module, options)
    states = []
    for h in held(optimizer, mine, module):
        state = _targets(h, found[h.name], metadata, tensors)
        states.append((h, {**state, **_copies(scalars.get(found[h.name], {}))}))
    return options, states


def _copies(values: dict[str, Any]) -> dict[str, Any]:
    # NB: two pieces of one parameter may not count in the same tensor.
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def weights_of(folder: str | Path) -> Weights:
    """The weights in a checkpoint by name and slice, for one rank alone."""
    path, _, metadata = open_checkpoint(folder)
    return Weights(str(path), planner.shapes_of(metadata, MODEL), lambda name, at: planner.read_slice(path, metadata, MODEL + name, at))


def read_merged(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """What merge_state_dicts returns, from a checkpoint folder, in one process."""
    path, _, metadata = open_checkpoint(folder)
    whole: dict[str, torch.Tensor] = {}
    for name, m in metadata.state_dict_metadata.items():
        if isinstance(m, planner.TensorStorageMetadata):
            whole[name] = torch.empty(m.size, dtype=m.properties.dtype)
    objects = sorted(n for n in planner.objects_of(metadata) if n == "module" or n.startswith("optimizer."))
    plan = planner.ReadPlanner({n: Layout.whole(t.shape).cut(t) for n, t in whole.items()})
    values = planner.read_objects(path, metadata, objects)
    _dcp(lambda: dcp.load({}, storage_reader=planner.Reader(path, metadata), planner=plan, no_dist=True), f"load {path}")
    module = values.pop("module")
    model = {alias: whole[MODEL + name] for name, names in module["names"].items() for alias in names}
    if not values:
        return model, None
    state: dict[str, dict[str, Any]] = {}
    for saved in values.values():
        for name, scalars in saved["scalars"].items():
            if scalars:
                state.setdefault(name, {}).update(scalars)
    for full, t in whole.items():
        if full.startswith(STATE):
            name, _, key = full.removeprefix(STATE).rpartition(".")
            state.setdefault(name, {})[key] = t
    return model, to_torch(join_groups([o["groups"] for o in values.values()], module["params"]), state, module["params"])
