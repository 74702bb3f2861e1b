"""What a module and its optimizer hold on this rank, by original name: every tensor with its layout.
Must not know how any of it is saved. Works on ordinary modules, and on those that contain parallel modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autopar.errors import CheckpointError
from autopar.runtime.mesh import UNITS
from autopar.runtime.module import ParallelModule
from autopar.runtime.state.layout import Layout


@dataclass(frozen=True)
class Entry:
    """One parameter or buffer; tied ones count once."""

    name: str  # the first of its original names
    names: tuple[str, ...]  # all of them
    layout: Layout
    tensor: torch.Tensor  # this rank's part; flat where ZeRO-3 leaves only a range of it
    param: bool
    trained: bool
    first: bool  # no rank before this one holds the same part
    over: tuple[str, ...] = ()  # mesh axes along which all ranks hold the same
    module: ParallelModule | None = None


@dataclass(frozen=True)
class Held:
    """The optimizer's state of one parameter, or of a range of one."""

    name: str
    layout: Layout
    param: torch.Tensor  # what the optimizer updates
    state: Mapping[str, Any]
    piece: Any = None  # of a ParallelOptimizer


def parallel_modules(module: nn.Module) -> list[tuple[str, ParallelModule]]:
    return [(f"{path}." if path else "", m) for path, m in module.named_modules() if isinstance(m, ParallelModule)]


def entries(module: nn.Module, reducer: Any = None) -> dict[str, Entry]:
    """By original name, in the order of the original module. With ZeRO-3 the reducer knows what this rank holds of the parameters.

    Raises CheckpointError for a tensor that is not filled yet.
    """
    placed = {}
    for prefix, m in parallel_modules(module):
        for name, p in m.named_placements().items():
            placed[prefix + name] = (p, m)
    everything: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    params = {id(p) for p in module.parameters()}
    for name, t in module.state_dict(keep_vars=True).items():
        if isinstance(t, torch.Tensor):
            everything.setdefault(id(t), []).append(name)
            tensors[id(t)] = t
    freed = _freed(reducer)
    rank = dist.get_rank() if dist.is_initialized() else 0
    out = {}
    for key, names in everything.items():
        t = tensors[key].detach()
        p, m = next((placed[n] for n in names if n in placed), (None, None))
        shape, piece = next((freed[n] for n in names if n in freed), (None, None))
        if p is None:
            layout, over, first = Layout.whole(t.shape if shape is None else shape), (), rank == 0
        else:
            layout = Layout.of(p, m.mesh)
            over = tuple(n for i, n in enumerate(m.mesh.names) if not p.types[i].startswith("S") and m.mesh[n].size > 1)
            first = m.mesh.unit == 0 and all(m.mesh[n].rank == 0 for n in over)
            over = ((UNITS,) if m.mesh.units > 1 else ()) + over
        if piece is not None:
            layout, t, first, over = layout.range(piece.start, piece.stop), piece.param.detach(), True, ()
        elif shape is not None:
            layout, t, first, over = layout.range(0, 0), t.new_empty(0), False, ()
        out[names[0]] = Entry(names[0], tuple(names), layout, t, key in params, tensors[key].requires_grad, first, over, m)
    return out


def _freed(reducer: Any) -> dict[str, tuple[torch.Size, Any]]:
    """name -> (shape of the local parameter, this rank's Piece or None) where parameters are sharded over the replicas (ZeRO-3)."""
    out = {}
    for shard in getattr(reducer, "shards", {}).values():
        if not shard.gathered:
            pieces = {p.name: p for p in shard.pieces}
            out |= {i.name: (s, pieces.get(i.name)) for i, s in zip(shard.bucket.items, shard.bucket.shapes, strict=True)}
    return out


def reducer_of(module: nn.Module, optimizer: Any = None) -> Any:
    found = getattr(optimizer, "reducer", None) or getattr(module, "_grad_reducer", None)
    return found or next((r for _, m in parallel_modules(module) if (r := getattr(m, "_grad_reducer", None)) is not None), None)


def cut_up(optimizer: Any) -> bool:
    """With ZeRO: ranks that hold the same parameter update other parts of it."""
    return bool(getattr(getattr(optimizer, "reducer", None), "shards", None))


def held(optimizer: Any, params: Mapping[str, Entry], module: nn.Module) -> list[Held]:
    """The state of every parameter (or piece of one) that the optimizer updates on this rank.

    Raises CheckpointError for parameters that are not the module's.
    """
    by_name = {n: e for e in params.values() for n in e.names}
    if hasattr(optimizer, "named_pieces"):
        out = []
        for piece, state in optimizer.named_pieces():
            entry = by_name.get(piece.name)
            if entry is None:
                raise CheckpointError(f"the optimizer updates {piece.name!r}, which is no parameter of this {type(module).__name__}")
            layout = Layout(entry.layout.shape, entry.layout.runs, piece.start, piece.stop)
            out.append(Held(entry.name, layout, piece.param, state, piece))
        return out
    names = {id(p): n for n, p in module.named_parameters()}
    out = []
    masters = _masters(optimizer)
    for p in masters or (p for g in optimizer.param_groups for p in g["params"]):
        if id(p) not in names:
            raise CheckpointError(
                f"the optimizer updates a {tuple(p.shape)} parameter that is not this {type(module).__name__}'s; "
                f"build it from the module's parameters (autopar.build_optimizer does)"
            )
        entry = by_name[names[id(p)]]
        out.append(Held(entry.name, entry.layout, p, optimizer.state_of(p) if masters else optimizer.state.get(p, {})))
    return out


def _masters(optimizer: Any) -> Mapping[torch.Tensor, torch.Tensor]:
    """parameter -> its master, which is what the groups hold; empty where the optimizer has no masters."""
    return getattr(optimizer, "masters", None) or getattr(getattr(optimizer, "optimizer", None), "masters", {})


def groups(optimizer: Any, params: Mapping[str, Entry], module: nn.Module) -> list[dict[str, Any]]:
    """The options of the optimizer's groups, each with the 'names' of its parameters on this rank in module order."""
    if hasattr(optimizer, "named_groups"):
        found = optimizer.named_groups()
    else:
        masters = _masters(optimizer)
        ids = {id(masters.get(h.param, h.param)): h.name for h in held(optimizer, params, module)}
        found = [{**g, "names": [ids[id(p)] for p in g["params"] if id(p) in ids]} for g in optimizer.param_groups]
    order = {n: i for i, e in enumerate(params.values()) for n in e.names}
    first = {n: e.name for e in params.values() for n in e.names}
    out = []
    for g in found:
        options = {k: v for k, v in g.items() if k not in ("params", "param_names", "names")}
        out.append({**options, "names": [first[n] for n in sorted(set(g["names"]), key=order.__getitem__)]})
    return out


def split_state(h: Held) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors shaped like the parameter, scalars) of a parameter's state.

    Raises CheckpointError for anything else.
    """
    like, scalars = {}, {}
    for key, value in h.state.items():
        if isinstance(value, torch.Tensor) and value.shape == h.param.shape and not (value.dim() == 0 and key == "step"):
            like[key] = value.detach()
        elif isinstance(value, torch.Tensor) and value.numel() == 1:
            scalars[key] = value.detach().reshape(())
        elif value is None or isinstance(value, (bool, int, float, str)):
            scalars[key] = value
        else:
            what = f"a {tuple(value.shape)} tensor" if isinstance(value, torch.Tensor) else type(value).__name__
            raise CheckpointError(
                f"the optimizer keeps {key!r} of {h.name} as {what}; only tensors shaped like the parameter "
                f"{tuple(h.param.shape)}, and scalars, can be saved"
            )
    return like, scalars


def new_like(h: Held, dtype: torch.dtype) -> torch.Tensor:
    """An empty state tensor for this rank's part of a parameter."""
    return torch.empty(h.param.shape, dtype=dtype, device=h.param.device)


def put_state(optimizer: Any, found: list[tuple[Held, dict[str, Any]]]) -> None:
    """Make these the optimizer's state; a parameter with an empty one has none."""
    # NB: as torch does, counters stay on the CPU unless the optimizer's kernels read them on the device.
    on_device = any(g.get("capturable") or g.get("fused") for g in optimizer.param_groups)
    masters = _masters(optimizer)
    for h, state in found:
        where = h.param.device if on_device else torch.device("cpu")
        counter = {k for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim() == 0 and (h.param.dim() or k == "step")}
        state = {k: v.to(where) if k in counter else v for k, v in state.items()}
        optimizer.state.pop(masters.get(h.param, h.param), None)
        if h.piece is not None:
            optimizer.load_piece(h.piece, state)
        elif masters:
            optimizer.load_state_of(h.param, state)
        elif state:
            optimizer.state[h.param] = state


def check_groups(optimizer: Any, params: Mapping[str, Entry], module: nn.Module, saved: list[dict[str, Any]]) -> None:
    """Raises CheckpointError where the optimizer's groups hold other parameters than the saved ones.

    NB: with ZeRO this rank's groups name only the parameters of which it updates a piece; frozen ones may be in a group or not.
    """
    mine = groups(optimizer, params, module)
    here, there = {n: i for n, i in _where(mine).items() if params[n].trained}, _where(saved)
    moved = sorted(n for n in here if here[n] != there.get(n))
    if moved or len(mine) != len(saved):
        raise CheckpointError(
            f"the optimizer has {len(mine)} groups of parameters, the saved one {len(saved)}; "
            f"{_list(moved) or 'none'} of this rank are in another group, or in none"
        )


def put_options(optimizer: Any, saved: list[dict[str, Any]]) -> None:
    """Give each group the options it was saved with."""
    for group, options in zip(optimizer.param_groups, saved, strict=True):
        group.update({k: v for k, v in options.items() if k != "names"})


def _where(found: list[dict[str, Any]]) -> dict[str, int]:
    return {n: i for i, g in enumerate(found) for n in g["names"]}


def refresh(reducer: Any) -> None:
    """After the parameters were written: what the optimizer updates in their place follows."""
    for shard in getattr(reducer, "shards", {}).values():
        if shard.gathered:
            # NB: the same memory, but master weights look at the version of the piece.
            torch.autograd.graph.increment_version([p.param for p in shard.pieces])
        else:
            shard.free()  # the parameters gathered before are not those of the pieces any more


def compare(what: str, module: nn.Module, mine: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """For each entry the name it has among the saved ones.

    Raises CheckpointError naming what is missing, what is extra and what has another shape.
    """
    found = {e.name: n for e in mine.values() for n in reversed(e.names) if n in shapes}
    found |= {e.name: e.name for e in mine.values() if e.name in shapes}
    missing = [e.name for e in mine.values() if e.name not in found]
    extra = sorted(set(shapes) - {n for e in mine.values() for n in e.names})
    other = [
        f"{e.name} is {tuple(shapes[found[e.name]])} there and {e.layout.shape} here"
        for e in mine.values()
        if e.name in found and tuple(shapes[found[e.name]]) != e.layout.shape
    ]
    if not (missing or extra or other):
        return found
    kind = type(module).__name__
    if not found:
        raise CheckpointError(f"{what} is of another model: it has {_list(extra)}, but this {kind} has {_list(missing)}")
    parts = [f"it lacks {_list(missing)}"] if missing else []
    parts += [f"it has {_list(extra)}, unknown to the module"] if extra else []
    parts += [_list(other)] if other else []
    raise CheckpointError(f"{what} does not fit this {kind}: {'; '.join(parts)}")


def _list(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
