"""Loading a checkpoint of any save type into a module and its optimizer, and what the trainer needs to go on from it.
Must not know how checkpoints are found (retention.py) or written (saving.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from autopar.errors import CheckpointError, LayoutError
from autopar.runtime.groups import fail_together
from autopar.runtime.state import checkpoint, merge, ranks
from autopar.runtime.state.generators import restore
from autopar.train.merged import MERGED, Source, join, open_source, part

log = logging.getLogger("autopar")
_ANOTHER = ("another plan", "sharded in another way", "(optimizer state) as this rank holds it")  # in what ranks.py says


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint held for this rank, besides the module and optimizer that it was loaded into.

    status, lr_scheduler: those of the save; {} and None where no trainer has saved it. dataloader: this rank's state, or of a rank that
    read the same data; None where the number of scale units has changed. custom: this rank's; of a merged checkpoint and on another layout
    {key: [the value of every rank]}. head: step, epoch, val_loss, best_val_loss, and the layout that has saved.
    """

    status: dict[str, Any]
    lr_scheduler: dict[str, Any] | None
    dataloader: Any
    custom: dict[str, Any]
    same_layout: bool
    head: dict[str, Any]
    random: dict[str, Any] | None = None

    def restore_rng(self) -> None:
        """Take up the random states of the save (none of a merged one). NB: right before training goes on, after all that draws."""
        if self.random is not None:
            restore(self.random)


def load(path: Path, module: Any, optimizer: Any) -> Loaded:
    """See Checkpointer.load."""
    source = fail_together("open the checkpoint", lambda: open_source(path))
    if source.kind == "dcp":
        return _load_dcp(source, module, optimizer)
    if source.kind == "merged":
        return _load_merged(source, module, optimizer)
    return _load_own(source, module, optimizer)


def _here(module: Any) -> tuple[int, int, int]:
    """(rank, world, unit)"""
    facts = checkpoint.facts(module)
    return dist.get_rank() if dist.is_initialized() else 0, facts["world"], facts["unit"]


def _loaded(own: Mapping[str, Any], same: bool, random: dict[str, Any] | None) -> Loaded:
    return Loaded(own["status"], own["lr_scheduler"], own["dataloader"], own["custom"], same, own["head"], random)


def _elsewhere(joined: Mapping[str, Any], module: Any, random: dict[str, Any] | None = None) -> Loaded:
    """On another layout than the one that saved, from the state of all its ranks."""
    rank, world, unit = _here(module)
    head = joined["head"]
    as_many = world // unit == head["world"] // head["unit"] and joined["dataloader"] is not None
    # NB: the ranks of a unit read the same data, those of another one other data.
    loader = joined["dataloader"][rank // unit * head["unit"]] if as_many else None
    return _loaded({**joined, "dataloader": loader}, False, random)


def _load_dcp(source: Source, module: Any, optimizer: Any) -> Loaded:
    read = checkpoint.read_checkpoint(source.path, module, optimizer)
    if not read.local:
        log.warning("%s holds no state of a trainer: weights and optimizer are taken from it, steps are counted from 0", source.path)
        return Loaded({}, None, None, {}, False, dict(read.manifest), read.random)
    if checkpoint.same_layout(read.manifest, module):
        (own,) = read.local.values()
        return _loaded({**read.extra, **own}, True, read.random)
    owns = [{**read.extra, **read.local[r]} for r in sorted(read.local)]
    return _elsewhere({**join(owns), "status": owns[0]["status"]}, module, read.random)


def _load_merged(source: Source, module: Any, optimizer: Any) -> Loaded:
    state, optim = fail_together("read the checkpoint", source.state_dicts)
    if optim is None and optimizer is not None:
        raise CheckpointError(f"{source.path} was saved without an optimizer; load it without one")
    try:
        # NB: with ZeRO this is collective inside, after what may fail: names and shapes, which are the same on all ranks.
        merge_in = merge.load_merged_state_dict
        fail_together("load the checkpoint", lambda: merge_in(module, state, optimizer, None if optimizer is None else optim))
    except (CheckpointError, LayoutError) as e:
        raise _of(source, e) from e
    return _elsewhere(source.trainer, module)


def _load_own(source: Source, module: Any, optimizer: Any) -> Loaded:
    """Of a sharded or deduped one: this rank's file, on the layout that has saved it."""
    rank, world, unit = _here(module)
    there = source.manifest
    if (there["world"], there["unit"]) != (world, unit):
        raise CheckpointError(
            f"{source.path} is a {source.kind} checkpoint of {there['world']} ranks in scale units of {there['unit']}; "
            f"here are {world} in units of {unit}. {_merge_first(source)}"
        )
    state = fail_together("read the checkpoint", lambda: merge.read_rank(source.rank_files[rank]))
    try:
        if source.kind == "deduped":
            ranks.load_deduped_state_dict(module, state, optimizer)
        else:
            fail_together("load the checkpoint", lambda: ranks.load_sharded_state_dict(module, state, optimizer))
    except (CheckpointError, LayoutError) as e:  # NB: LayoutError where another rank has failed
        raise _of(source, e) from e
    own = part(join([state["trainer"]]), 0)
    return _loaded(own, True, state["random"])


def _of(source: Source, e: Exception) -> CheckpointError:
    text = str(e)
    if any(sign in text for sign in _ANOTHER):
        return CheckpointError(f"{source.path} is of another layout: {text.partition('; ')[0]}. {_merge_first(source)}")
    return CheckpointError(text.replace("the state dict", str(source.path), 1))


def _merge_first(source: Source) -> str:
    command = f"autopar checkpoint merge {source.path} {source.path.with_name(f'{source.path.name}-{MERGED}')}"
    return f"Merge it and resume from the file: `{command}` (save_type 'dcp' loads under any layout as it is)"
