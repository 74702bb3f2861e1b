"""State of single ranks: sharded (all that a rank holds) and deduplicated (each part on the first rank that holds it) state dicts; and
weights made the same on all replicas.
Must not know files: the dicts hold tensors, numbers and texts only, so that torch.save and torch.load(weights_only=True) do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autopar.errors import CheckpointError
from autopar.runtime.axis import DistComm
from autopar.runtime.groups import fail_together
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
from autopar.runtime.state.merge import FORMAT
from autopar.runtime.state.taking import alone

State = dict[str, Any]
Key = tuple[str, str, Layout]  # parameter, '' or the key of its optimizer state, which part


def _rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sharded_state_dict(module: nn.Module, optimizer: Any = None) -> State:
    """Everything this rank holds, under original names: what load_sharded_state_dict takes back on the same rank of the same layout,
    and merge_state_dicts from all ranks. Tensors are the live ones, as in module.state_dict().
    """
    return collect(module, optimizer, "sharded")


def deduped_state_dict(module: nn.Module, optimizer: Any = None) -> State:
    """As sharded_state_dict, but what several ranks hold is only in the first one's. NB: collective."""
    state = dedupe(collect(module, optimizer, "deduped"))
    return {**state, "model": {n: alone(t) for n, t in state["model"].items()}}


def dedupe(state: State) -> State:
    """Without what an earlier rank has. NB: collective."""
    own = _owners(list(_keys(state)))
    rank, optimizer = state["autopar"]["rank"], state["optimizer"]
    model = {n: t for n, t in state["model"].items() if own[_model_key(state, n)] == rank}
    if optimizer is not None:
        optimizer = {**optimizer, "state": [s for s in optimizer["state"] if own[_state_key(state, s)] == rank]}
    return {**state, "model": model, "optimizer": optimizer}


def collect(module: nn.Module, optimizer: Any, kind: str) -> State:
    """What this rank holds, in the form of sharded_state_dict."""
    rank, world = _rank_and_world()
    mine = entries(module, reducer_of(module, optimizer))
    state: State = {
        "autopar": {"format": FORMAT, "kind": kind, "rank": rank, "world": world},
        "model": {e.name: e.tensor for e in mine.values()},
        "layout": {e.name: e.layout.to_data() for e in mine.values()},
        "names": {e.name: list(e.names) for e in mine.values()},
        "order": [e.name for e in mine.values() if e.param],
        "optimizer": None,
    }
    if optimizer is not None:
        found = []
        for h in held(optimizer, mine, module):
            like, scalars = split_state(h)
            found.append({"name": h.name, "range": [h.layout.start, h.layout.stop], "tensors": like, "scalars": scalars})
        state["optimizer"] = {"groups": groups(optimizer, mine, module), "state": found}
    return state


def _layout(state: Mapping[str, Any], name: str) -> Layout:
    return Layout.from_data(state["layout"][name])


def _model_key(state: Mapping[str, Any], name: str) -> Key:
    return name, "", _layout(state, name)


def _state_key(state: Mapping[str, Any], s: Mapping[str, Any]) -> Key:
    at = _layout(state, s["name"])
    return s["name"], "state", Layout(at.shape, at.runs, *s["range"])


def _keys(state: Mapping[str, Any]) -> list[Key]:
    found = [_model_key(state, n) for n in state["model"]]
    return found + [_state_key(state, s) for s in (state["optimizer"] or {"state": ()})["state"]]


def _gather(thing: Any) -> list[Any]:
    if _rank_and_world()[1] == 1:
        return [thing]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, thing)
    return out


def _owners(keys: Sequence[Key]) -> dict[Key, int]:
    """The first rank that holds each part."""
    out: dict[Key, int] = {}
    for rank, theirs in enumerate(_gather(keys)):
        for key in theirs:
            out.setdefault(key, rank)
    return out


def _check(state: Mapping[str, Any], kind: str, other: str) -> None:
    head = state.get("autopar") if isinstance(state, Mapping) else None
    if not isinstance(head, Mapping):
        raise CheckpointError(f"this is no {kind} state dict; use load_merged_state_dict for the original module's")
    rank, world = _rank_and_world()
    if head["kind"] != kind:
        raise CheckpointError(f"this is a {head['kind']} state dict, not a {kind} one; use {other}")
    if (head["rank"], head["world"]) != (rank, world):
        raise CheckpointError(
            f"this is the state of rank {head['rank']} of {head['world']}, loaded on rank {rank} of {world}; "
            f"merge the state dicts of all ranks (merge_state_dicts), or use load_checkpoint for another layout"
        )


def _compare(module: nn.Module, mine: Mapping[str, Entry], state: Mapping[str, Any]) -> None:
    compare("the state dict", module, mine, {n: tuple(d["shape"]) for n, d in state["layout"].items()})
    moved = [e.name for e in mine.values() if e.layout != _layout(state, e.name)]
    if moved:
        raise CheckpointError(
            f"the state dict is of another plan: this rank holds another part of {', '.join(moved[:6])}; "
            f"merge the state dicts of all ranks (merge_state_dicts), or use load_checkpoint for another layout"
        )


@torch.no_grad()
def load_sharded_state_dict(module: nn.Module, state_dict: Mapping[str, Any], optimizer: Any = None) -> None:
    """Take back what sharded_state_dict returned on this rank. The optimizer's state is loaded where an optimizer is given.

    Raises CheckpointError for the state of another rank, plan or model, and for a deduplicated one.
    """
    _check(state_dict, "sharded", "load_deduped_state_dict")
    _load(module, optimizer, state_dict, state_dict["model"], (state_dict["optimizer"] or {}).get("state"))


@torch.no_grad()
def load_deduped_state_dict(module: nn.Module, state_dict: Mapping[str, Any], optimizer: Any = None) -> None:
    """Take back what deduped_state_dict returned on this rank; the rest comes from the ranks that have it. NB: collective.

    Raises CheckpointError, on all ranks, as load_sharded_state_dict does.
    """

    def prepare() -> list[Held]:
        _check(state_dict, "deduped", "load_sharded_state_dict")
        mine = entries(module, reducer_of(module, optimizer))
        _compare(module, mine, state_dict)
        return _pieces(module, optimizer, mine, state_dict)

    pieces = fail_together("check the state dict", prepare)
    have: dict[Key, Any] = {_model_key(state_dict, n): t for n, t in state_dict["model"].items()}
    have |= {_state_key(state_dict, s): s for s in (state_dict["optimizer"] or {"state": ()})["state"]}
    want = {_model_key(state_dict, n): n for n in state_dict["layout"]}
    parts = {(h.name, "state", h.layout): h for h in pieces}
    got = _exchange(have, [*want, *parts])
    model = {n: got[key] for key, n in want.items()}
    _load(module, optimizer, state_dict, model, [got[key] for key in parts] if optimizer is not None else None)


def _pieces(module: nn.Module, optimizer: Any, mine: Mapping[str, Entry], state: Mapping[str, Any]) -> list[Held]:
    if optimizer is None:
        return []
    if state["optimizer"] is None:
        raise CheckpointError("the state dict was made without an optimizer; load it without one")
    return held(optimizer, mine, module)


def _load(module: nn.Module, optimizer: Any, state: Mapping[str, Any], model: Mapping[str, torch.Tensor], saved: Any) -> None:
    reducer = reducer_of(module, optimizer)
    mine = entries(module, reducer)
    _compare(module, mine, state)
    pieces = _pieces(module, optimizer, mine, state)
    if optimizer is not None:
        ranges = {(s["name"], *s["range"]): s for s in saved}
        lost = [h.name for h in pieces if (h.name, h.layout.start, h.layout.stop) not in ranges]
        if lost or len(pieces) != len(saved):
            raise CheckpointError(
                f"the optimizer's state was sharded in another way (ZeRO settings): this rank updates other parts of "
                f"{', '.join(lost[:6]) or 'the parameters'}; use merge_state_dicts, or load_checkpoint"
            )
        check_groups(optimizer, mine, module, state["optimizer"]["groups"])
        put_options(optimizer, state["optimizer"]["groups"])
        found = []
        for h in pieces:
            s = ranges[h.name, h.layout.start, h.layout.stop]
            new: dict[str, Any] = {}
            for key, t in s["tensors"].items():
                new[key] = new_like(h, t.dtype)
                new[key].copy_(t.reshape(h.param.shape))
            new |= {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s["scalars"].items()}
            found.append((h, new))
        put_state(optimizer, found)
    for e in mine.values():
        e.tensor.copy_(model[e.name])
    refresh(reducer)


def _exchange(have: Mapping[Key, Any], want: Sequence[Key]) -> dict[Key, Any]:
    """What other ranks have of what is wanted here: tensors, and optimizer states with tensors. NB: collective."""
    out = {key: have[key] for key in want if key in have}
    rank, world = _rank_and_world()
    if world == 1:
        return _complete(out, want)
    described = {key: _describe(value) for key, value in have.items()}
    offers = _gather(described)
    missing = [key for key in want if key not in out]
    wishes = _gather([(key, next((r for r, o in enumerate(offers) if key in o), None)) for key in missing])
    fail_together("find all parts of the state dict", lambda: [_lost(k) for k, r in wishes[rank] if r is None])
    comm = DistComm()
    device = torch.device("cpu") if comm.staged else torch.device("cuda", torch.cuda.current_device())
    ops, kept = [], []
    # NB: each pair of ranks meets in the same order of (receiver, key), and all are posted at once.
    for receiver, keys in enumerate(wishes):
        for key, sender in keys:
            if sender == rank:
                for t in _tensors(have[key]):
                    kept.append(t.detach().to(device).contiguous())
                    ops.append(dist.P2POp(dist.isend, kept[-1], receiver))
            elif receiver == rank:
                out[key] = offers[sender][key].make(device)
                ops += [dist.P2POp(dist.irecv, t, sender) for t in _tensors(out[key])]
    for work in dist.batch_isend_irecv(ops) if ops else ():
        work.wait()
    return _complete(out, want)


def _lost(key: Key) -> None:
    what = f"{key[0]}{' (optimizer state)' if key[1] else ''}"
    raise CheckpointError(f"no rank has {what} as this rank holds it; are all ranks' of one save?")


def _complete(out: dict[Key, Any], want: Sequence[Key]) -> dict[Key, Any]:
    for key in want:
        if key not in out:
            _lost(key)
    return out


class _Described:
    """Shapes and dtypes of a value, from which another rank makes room for it."""

    def __init__(self, shapes: list[tuple], state: dict[str, Any] | None):
        self.shapes, self.state = shapes, state

    def make(self, device: torch.device) -> Any:
        new = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.shapes]
        return new[0] if self.state is None else {**self.state, "tensors": dict(zip(self.state["tensors"], new, strict=True))}


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value["tensors"].values())


def _describe(value: Any) -> _Described:
    shapes = [(tuple(t.shape), t.dtype) for t in _tensors(value)]
    return _Described(shapes, None if isinstance(value, torch.Tensor) else {**value, "tensors": list(value["tensors"])})


@torch.no_grad()
def broadcast_weights(module: nn.Module, optimizer: Any = None) -> None:
    """Give every rank the parameters and buffers of the first rank that holds the same part, for example after only that one has
    loaded them. NB: collective. With ZeRO give the optimizer, so that what it updates follows.
    """
    reducer = reducer_of(module, optimizer)
    mine = entries(module, reducer)
    world = _rank_and_world()[1]
    # NB: the groups of all modules in one order, so that all ranks create them alike.
    for _, m in parallel_modules(module):
        for names in sorted({e.over for e in mine.values() if e.module is m and e.over}):
            m.mesh.join(names)
    if any(not e.layout.complete for e in mine.values()):
        raise CheckpointError("with ZeRO-3 no rank holds whole parameters; broadcast the weights before the optimizer is built")
    comm = DistComm() if world > 1 else None
    for e in mine.values():
        if e.module is None:
            if comm is not None:
                t = e.tensor.contiguous()
                comm.broadcast_(t, 0)
                e.tensor.copy_(t)
        elif e.over:
            e.tensor.copy_(e.module.mesh.join(e.over).broadcast(e.tensor, 0))
    refresh(reducer)
