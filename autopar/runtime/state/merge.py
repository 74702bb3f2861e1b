"""From the state dicts of all ranks to what the original module and optimizer load, and back from that to this rank's part.
Must not know how ranks hold tensors (layout.py). Merging runs in one process, without torch.distributed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autopar.errors import CheckpointError
from autopar.runtime.state.inventory import (
    Entry,
    check_groups,
    compare,
    cut_up,
    entries,
    groups,
    held,
    new_like,
    put_options,
    put_state,
    reducer_of,
    refresh,
)
from autopar.runtime.state.layout import Layout, assemble
from autopar.runtime.state.weights import Weights, source

FORMAT = 1
KINDS = ("sharded", "deduped")


def read_rank(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """One rank's state dict, from a file that torch.save wrote or as it is. Raises CheckpointError for anything else."""
    what = "the state dict"
    if isinstance(source, (str, Path)):
        what = str(source)
        if not Path(source).exists():
            raise CheckpointError(f"{source} does not exist; every rank's file is needed")
        try:
            source = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        except Exception as e:  # NB: torch raises RuntimeError, UnpicklingError, EOFError, ... for a damaged file
            raise CheckpointError(f"cannot read {what}: {type(e).__name__}: {e}; it is truncated, damaged, or no state dict") from e
    head = source.get("autopar") if isinstance(source, Mapping) else None
    if not isinstance(head, Mapping) or head.get("kind") not in KINDS:
        raise CheckpointError(
            f"{what} is not one rank's state dict (of sharded_state_dict or deduped_state_dict); use load_merged_state_dict for a whole one"
        )
    if head["format"] != FORMAT:
        raise CheckpointError(f"{what} has format {head['format']}; this version of autopar reads {FORMAT}")
    return source


def merge_state_dicts(
    parts: Sequence[str | Path | Mapping[str, Any]] | str | Path,
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """(module state dict, optimizer state dict or None) of the original module, from every rank's, or from a checkpoint folder.

    parts: for each rank what sharded_state_dict or deduped_state_dict returned, or the file that torch.save made of it; or the folder
    that save_checkpoint wrote. Raises CheckpointError where a rank is missing, a file is damaged, or they are of different saves.
    """
    if isinstance(parts, (str, Path)):
        from autopar.runtime.state.checkpoint import read_whole

        return read_whole(parts).state_dicts()
    return join_ranks([read_rank(p) for p in parts]).state_dicts()


@dataclass(frozen=True)
class Whole:
    """The state of all ranks put together. Every parameter and buffer under its first name."""

    model: dict[str, torch.Tensor]
    names: dict[str, list[str]]  # all of them
    params: list[str]  # in the order of the original module
    groups: list[dict[str, Any]] | None  # options and 'names'; None without an optimizer
    state: dict[str, dict[str, Any]]

    def state_dicts(self) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """Of the original module, and of torch's optimizer over its parameters."""
        model = {alias: self.model[name] for name, names in self.names.items() for alias in names}
        return model, None if self.groups is None else _to_torch(self.groups, self.state, self.params)


def join_ranks(read: list[Mapping[str, Any]]) -> Whole:
    """From what read_rank returned for every rank. Raises CheckpointError as merge_state_dicts does."""
    if not read:
        raise CheckpointError("there is nothing to merge; give one state dict per rank")
    heads = [r["autopar"] for r in read]
    for field in ("world", "kind"):
        if len({h[field] for h in heads}) > 1:
            raise CheckpointError(f"state dicts of different saves: {field} is {', '.join(sorted({str(h[field]) for h in heads}))}")
    world, ranks = heads[0]["world"], [h["rank"] for h in heads]
    missing = sorted(set(range(world)) - set(ranks))
    if missing or len(ranks) != world:
        twice = sorted({r for r in ranks if ranks.count(r) > 1})
        wrong = [f"those of rank {', '.join(map(str, missing))} are missing"] if missing else []
        wrong += [f"rank {', '.join(map(str, twice))} is there twice"] if twice else []
        raise CheckpointError(f"{world} ranks saved {world} state dicts, {len(read)} are given: {'; '.join(wrong)}")
    if len({tuple(r["names"]) for r in read}) > 1:
        raise CheckpointError("the ranks' state dicts are of different models: they name different parameters")
    read.sort(key=lambda r: r["autopar"]["rank"])
    layouts = [{n: Layout.from_data(d) for n, d in r["layout"].items()} for r in read]
    model: dict[str, torch.Tensor] = {}
    for name in read[0]["names"]:
        parts = [part for r, at in zip(read, layouts, strict=True) if name in r["model"] for part in at[name].cut(r["model"][name])]
        model[name] = assemble(name, layouts[0][name].shape, parts)
    return Whole(model, dict(read[0]["names"]), list(read[0]["order"]), *_join_optimizers(read, layouts))


def _join_optimizers(read: Sequence[Mapping[str, Any]], layouts: list[dict[str, Layout]]) -> tuple[list | None, dict]:
    """(groups, state) by name."""
    found = [r["optimizer"] for r in read]
    if any(o is None for o in found):
        if all(o is None for o in found):
            return None, {}
        raise CheckpointError(f"only the ranks {[i for i, o in enumerate(found) if o is not None]} saved an optimizer")
    tensors: dict[tuple[str, str], list] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for o, at in zip(found, layouts, strict=True):
        for s in o["state"]:
            layout = Layout(at[s["name"]].shape, at[s["name"]].runs, *s["range"])
            for key, t in s["tensors"].items():
                tensors.setdefault((s["name"], key), []).extend(layout.cut(t))
            for key, v in s["scalars"].items():
                scalars.setdefault(s["name"], {}).setdefault(key, v)
    state = {name: dict(values) for name, values in scalars.items()}
    for (name, key), parts in tensors.items():
        state.setdefault(name, {})[key] = assemble(f"{key} of {name}", layouts[0][name].shape, parts)
    return join_groups([o["groups"] for o in found], read[0]["order"]), state


def join_groups(found: Sequence[list[dict[str, Any]]], order: Sequence[str]) -> list[dict[str, Any]]:
    """The groups of all ranks, of which each may know only the parameters it updates."""
    if len({len(g) for g in found}) > 1:
        raise CheckpointError(f"the ranks' optimizers have different numbers of groups: {sorted({len(g) for g in found})}")
    out = []
    for same in zip(*found, strict=True):
        names = {n for g in same for n in g["names"]}
        out.append({**same[0], "names": [n for n in order if n in names]})
    return out


def _to_torch(found: list[dict[str, Any]], state: Mapping[str, dict[str, Any]], order: Sequence[str]) -> dict[str, Any]:
    """The form of torch.optim: parameters by number. One group counts frozen parameters too, as optimizer(module.parameters()) does."""
    listed = [order] if len(found) == 1 else [g["names"] for g in found]
    numbers = {n: i for i, n in enumerate(n for names in listed for n in names)}
    options = [{k: v for k, v in g.items() if k != "names"} for g in found]
    return {
        "state": {numbers[n]: state[n] for n in numbers if n in state},
        "param_groups": [{**o, "params": [numbers[n] for n in names]} for o, names in zip(options, listed, strict=True)],
    }


@torch.no_grad()
def load_merged_state_dict(
    module: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | str | Path,
    optimizer: Any = None,
    optim_state_dict: Mapping[str, Any] | None = None,
) -> None:
    """Fill this rank's part of the module (and optimizer) from whole state dicts of the original ones.

    state_dict: a mapping; or a safetensors file, a folder of them (Hugging Face form, with an index or not) or a checkpoint folder, of
    which only this rank's slices are read. Raises CheckpointError for missing or extra names and other shapes, before anything is changed.
    """
    reducer = reducer_of(module, optimizer)
    mine = entries(module, reducer)
    weights = source(state_dict)
    found = compare(weights.what, module, mine, weights.shapes)
    new = _optimizer_state(module, mine, optimizer, optim_state_dict) if optim_state_dict is not None else None
    fill(mine, found, weights)
    refresh(reducer)
    if new is not None:
        states, options = new
        put_options(optimizer, options)
        put_state(optimizer, states)


def fill(mine: Mapping[str, Entry], found: Mapping[str, str], weights: Weights) -> None:
    for e in mine.values():
        for box, view in e.layout.cut(e.tensor):
            view.copy_(weights.read(found[e.name], box.slices))


def _optimizer_state(module: nn.Module, mine: Mapping[str, Entry], optimizer: Any, saved: Mapping[str, Any]) -> tuple:
    if optimizer is None:
        raise CheckpointError("an optimizer's state dict is given, but no optimizer to load it into")
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= set(saved):
        raise CheckpointError("this is no optimizer state dict: it has no 'state' and 'param_groups'")
    own = _all_groups(optimizer, mine, module)
    names = _numbered(own, [e.name for e in mine.values() if e.param], saved["param_groups"])
    states = []
    for h in held(optimizer, mine, module):
        state: dict[str, Any] = {}
        for key, value in saved["state"].get(names.get(h.name), {}).items():
            if isinstance(value, torch.Tensor) and tuple(value.shape) == h.layout.shape and not (value.dim() == 0 and key == "step"):
                state[key] = new_like(h, value.dtype)
                for box, view in h.layout.cut(state[key]):
                    view.copy_(value[box.slices])
            elif isinstance(value, torch.Tensor) and value.numel() != 1:
                shapes = f"{tuple(value.shape)} in the optimizer state, the parameter is {h.layout.shape}"
                raise CheckpointError(f"{key!r} of {h.name} is {shapes}")
            else:
                state[key] = value.clone().reshape(()) if isinstance(value, torch.Tensor) else value
        states.append((h, state))
    options = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in saved["param_groups"]]
    named = [{**o, "names": g["names"]} for o, g in zip(options, own, strict=True)]
    check_groups(optimizer, mine, module, named)
    return states, named


def _all_groups(optimizer: Any, mine: Mapping[str, Entry], module: nn.Module) -> list[dict[str, Any]]:
    """The groups with all their parameters: with ZeRO this rank's name only those it updates. NB: collective."""
    own = groups(optimizer, mine, module)
    if not cut_up(optimizer) or not dist.is_initialized():
        return own
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, [{"names": g["names"]} for g in own])
    joined = join_groups(found, [e.name for e in mine.values()])
    return [{**g, "names": j["names"]} for g, j in zip(own, joined, strict=True)]


def _numbered(own: list[dict[str, Any]], order: Sequence[str], saved: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The number that each parameter has in the optimizer state dict."""
    if all("param_names" in g for g in saved):  # of an optimizer made over named_parameters()
        return {n: i for g in saved for i, n in zip(g["params"], g["param_names"], strict=True)}
    sizes = [len(g["params"]) for g in saved]
    whole = [[order]] if len(own) == 1 else []  # one group may count frozen parameters too
    for listed in ([g["names"] for g in own], *whole):
        if [len(names) for names in listed] == sizes:
            return {n: i for g, names in zip(saved, listed, strict=True) for i, n in zip(g["params"], names, strict=True)}
    raise CheckpointError(
        f"the optimizer state dict has groups of {sizes} parameters; this optimizer's are of {[len(g['names']) for g in own]}, "
        f"and the module has {len(order)} in all"
    )
