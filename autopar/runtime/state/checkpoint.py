"""Checkpoints: a folder through torch.distributed.checkpoint, written aside and renamed, that loads under any plan and world size.
Must not know how tensors are stored (planner.py) nor how they are split (layout.py).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from autopar.errors import CheckpointError
from autopar.runtime.groups import fail_together
from autopar.runtime.state import folder as files
from autopar.runtime.state import planner
from autopar.runtime.state.disk import Writer
from autopar.runtime.state.generators import random_state, restore
from autopar.runtime.state.inventory import (
    Entry,
    Held,
    check_groups,
    compare,
    cut_up,
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
from autopar.runtime.state.merge import Whole, join_groups
from autopar.runtime.state.taking import Take, as_is, taken, written_here
from autopar.runtime.state.weights import Weights

MODEL, STATE = "model.", "optimizer.state."
KIND = "dcp"


def _world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def save_checkpoint(folder: str | Path, module: nn.Module, optimizer: Any = None, extra: Any = None) -> None:
    """Write the module, optimizer, random states and `extra` (numbers, texts, tensors, lists and dicts of them; rank 0's). NB: collective.

    All ranks give the same folder, on a disk they share. It appears when it is complete: a save that is killed leaves the checkpoint that
    was there before. Raises CheckpointError where the state cannot be saved or loaded again.
    """
    folder = Path(folder).absolute()
    rank, _ = _world()

    def prepare() -> planner.SavePlanner:
        if rank == 0:
            files.start(folder)
        return collect(module, optimizer, extra)

    plan = fail_together("prepare the checkpoint", prepare)
    tmp = files.aside(folder, "saving")
    write(tmp, plan, what=f"save {folder}")
    fail_together("finish the checkpoint", lambda: files.finish(tmp, folder, facts(module)) if rank == 0 else None)


def facts(module: nn.Module, kind: str = KIND) -> dict[str, Any]:
    """What a manifest says of the layout that has saved."""
    mesh = next((m.mesh for _, m in parallel_modules(module)), None)
    axes = "" if mesh is None else ",".join(f"{n}={k}" for n, k in zip(mesh.names, mesh.sizes, strict=True))
    return {"kind": kind, "world": _world()[1], "unit": 1 if mesh is None else mesh.unit_size, "mesh": axes}


def collect(module: nn.Module, optimizer: Any, extra: Any, local: Any = None, take: Take = as_is) -> planner.SavePlanner:
    """What this rank writes: its part of the tensors, each taken by `take`; `extra` of rank 0, and `local` of every rank."""
    rank, world = _world()
    mine = entries(module, reducer_of(module, optimizer))
    here = written_here(mine, rank, world)
    # NB: buffers may differ between units (running statistics); all are taken from the first rank that holds them.
    found = [(MODEL + e.name, e.layout, e.tensor) for e in mine.values() if (e.name in here if e.param else e.first)]
    objects: dict[str, Any] = {f"random.{rank}": random_state()}
    if optimizer is not None:
        zero = cut_up(optimizer)
        scalars = {}
        for h in held(optimizer, mine, module):
            like, scalars[h.name] = split_state(h)
            if zero or h.name in here:
                found += [(f"{STATE}{h.name}.{key}", h.layout, t) for key, t in like.items()]
        objects[f"optimizer.{rank}"] = taken({"groups": groups(optimizer, mine, module), "scalars": scalars}, take)
        loadable("the options of the optimizer's groups", objects[f"optimizer.{rank}"]["groups"])
    if local is not None:
        objects[f"local.{rank}"] = loadable("the state of this rank", local)
    if rank == 0:
        objects["extra"] = loadable("`extra`", extra)
        objects["module"] = {"names": {e.name: list(e.names) for e in mine.values()}, "params": [e.name for e in mine.values() if e.param]}
    return planner.SavePlanner({name: (layout, take(t)) for name, layout, t in found}, objects)


def loadable(what: str, value: Any) -> Any:
    """A copy of the value, as it will be loaded. Raises CheckpointError where it cannot be."""
    written = io.BytesIO()
    try:
        torch.save(value, written)
        written.seek(0)
        return torch.load(written, weights_only=True)
    except Exception as e:  # NB: whatever pickling raises
        reason = str(e).splitlines()[0][:200]
        raise CheckpointError(
            f"{what} cannot be loaded again without running code ({reason}); give numbers, texts, tensors, and lists and dicts of them"
        ) from e


def write(tmp: Path, plan: planner.SavePlanner, group: Any = None, what: str = "") -> None:
    """Every rank's files, and DCP's metadata. NB: collective, over the group."""
    alone = _world()[1] == 1
    _dcp(lambda: dcp.save({}, storage_writer=Writer(tmp), planner=plan, process_group=group, no_dist=alone), what)


def write_whole(tmp: Path, whole: Whole, objects: Mapping[str, Any]) -> None:
    """A whole state, in one process. objects: what else is in the checkpoint, by name."""
    tensors = {MODEL + n: (Layout.whole(t.shape), t) for n, t in whole.model.items()}
    objects = {"module": {"names": whole.names, "params": whole.params}, "extra": None, **objects}
    if whole.groups is not None:
        scalars = {}
        for name, state in whole.state.items():
            layout = Layout.whole(whole.model[name].shape)
            like, scalars[name] = split_state(Held(name, layout, whole.model[name], state))
            tensors |= {f"{STATE}{name}.{key}": (layout, t) for key, t in like.items()}
        objects["optimizer.0"] = {"groups": whole.groups, "scalars": scalars}
    plan = planner.SavePlanner(tensors, objects)
    _dcp(lambda: dcp.save({}, storage_writer=Writer(tmp), planner=plan, no_dist=True), f"save {tmp}")


def _dcp(run: Callable[[], Any], what: str) -> None:
    """NB: DCP's CheckpointException is a BaseException that holds one error per rank."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is wanted
            run()
    except CheckpointException as e:
        causes = {str(x[0]) or type(x[0]).__name__: r for r, x in e.failures.items()}
        text = "; ".join(f"rank {r}: {t}" for t, r in causes.items())
        raise CheckpointError(f"cannot {what}: {text}" if what else text) from e


def open_checkpoint(folder: str | Path) -> tuple[Path, dict[str, Any], dcp.Metadata]:
    """The folder, its manifest and DCP's metadata. Raises CheckpointError where it is not complete, or of another kind."""
    path, manifest = files.open_folder(folder)
    kind = manifest.get("kind", KIND)
    if kind != KIND:
        raise CheckpointError(f"{path} is a {kind} checkpoint; `autopar checkpoint convert {path} OUT --to dcp` makes one that loads here")
    return path, manifest, planner.read_metadata(path)


@dataclass(frozen=True)
class Read:
    """What a checkpoint holds besides the module and optimizer that it was loaded into."""

    extra: Any
    local: dict[int, Any]  # by rank; on the layout that saved only this rank's
    random: dict[str, Any] | None
    manifest: dict[str, Any]


@torch.no_grad()
def load_checkpoint(folder: str | Path, module: nn.Module, optimizer: Any = None, *, random: bool = True) -> Any:
    """Fill the module (and optimizer) from a checkpoint that any plan and world size has written, and return its `extra`. NB: collective.

    random: restore the random states. On the layout that saved them each rank gets its own; on another one, those of the unit's first rank.
    Raises CheckpointError, before anything is changed, where the checkpoint is incomplete or of another model.
    """
    found = read_checkpoint(folder, module, optimizer)
    if random and found.random is not None:
        restore(found.random)
    return found.extra


@torch.no_grad()
def read_checkpoint(folder: str | Path, module: nn.Module, optimizer: Any = None) -> Read:
    """As load_checkpoint, but leaves the random states alone."""
    rank, world = _world()
    reducer = reducer_of(module, optimizer)

    def prepare() -> tuple:
        path, manifest, metadata = open_checkpoint(folder)
        mine = entries(module, reducer)
        found = compare(str(path), module, mine, planner.shapes_of(metadata, MODEL))
        tensors = {MODEL + found[e.name]: e.layout.cut(e.tensor) for e in mine.values()}
        drawn = f"random.{_source_rank(module, manifest, rank)}"
        local = f"local.{rank}" if same_layout(manifest, module) else "local."
        there = sorted(planner.objects_of(metadata))
        objects = [n for n in there if n in ("extra", drawn) or n.startswith(local) or (optimizer and n.startswith("optimizer."))]
        values = planner.read_objects(path, metadata, objects)
        new = _optimizer(optimizer, module, mine, found, metadata, values, tensors) if optimizer is not None else None
        locals_ = {int(n.partition(".")[2]): v for n, v in values.items() if n.startswith("local.")}
        return path, metadata, planner.ReadPlanner(tensors), Read(values["extra"], locals_, values.get(drawn), manifest), new

    path, metadata, plan, out, new = fail_together("open the checkpoint", prepare)
    _dcp(lambda: dcp.load({}, storage_reader=planner.Reader(path, metadata), planner=plan, no_dist=world == 1), f"load {path}")
    refresh(reducer)
    if new is not None:
        options, states = new
        put_options(optimizer, options)
        put_state(optimizer, states)
    return out


def same_layout(manifest: Mapping[str, Any], module: nn.Module) -> bool:
    """As many ranks, in as large units, as have saved."""
    here = facts(module)
    return (manifest["world"], manifest["unit"]) == (here["world"], here["unit"])


def _source_rank(module: nn.Module, manifest: dict[str, Any], rank: int) -> int:
    """The rank whose random state this one takes."""
    if same_layout(manifest, module):
        return rank
    unit, units = facts(module)["unit"], manifest["world"] // manifest["unit"]
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


def read_whole(folder: str | Path) -> Whole:
    """All of a checkpoint folder's tensors, in one process."""
    path, _, metadata = open_checkpoint(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, m in metadata.state_dict_metadata.items():
        if isinstance(m, planner.TensorStorageMetadata):
            tensors[name] = torch.empty(m.size, dtype=m.properties.dtype)
    plan = planner.ReadPlanner({n: Layout.whole(t.shape).cut(t) for n, t in tensors.items()})
    objects = read_objects(path, lambda n: n == "module" or n.startswith("optimizer."))
    _dcp(lambda: dcp.load({}, storage_reader=planner.Reader(path, metadata), planner=plan, no_dist=True), f"load {path}")
    module = objects.pop("module")
    model = {name: tensors[MODEL + name] for name in module["names"]}
    if not objects:
        return Whole(model, module["names"], module["params"], None, {})
    state: dict[str, dict[str, Any]] = {}
    for saved in objects.values():
        for name, scalars in saved["scalars"].items():
            if scalars:
                state.setdefault(name, {}).update(scalars)
    for full, t in tensors.items():
        if full.startswith(STATE):
            name, _, key = full.removeprefix(STATE).rpartition(".")
            state.setdefault(name, {})[key] = t
    found = join_groups([o["groups"] for o in objects.values()], module["params"])
    return Whole(model, module["names"], module["params"], found, state)


def read_objects(folder: str | Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    """What is in a checkpoint folder besides tensors, in one process."""
    path, _, metadata = open_checkpoint(folder)
    return planner.read_objects(path, metadata, sorted(filter(wanted, planner.objects_of(metadata))))
