"""Writing one checkpoint: what every rank contributes, in each save type, and ranks that agree on whether it went well.
Must not know when checkpoints are taken, nor which are kept (retention.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from autopar.errors import CheckpointError
from autopar.runtime.axis import DistComm
from autopar.runtime.state import checkpoint, ranks
from autopar.runtime.state.disk import save_file
from autopar.runtime.state.generators import random_state
from autopar.runtime.state.merge import join_ranks, read_rank
from autopar.runtime.state.taking import Take, taken
from autopar.train.merged import KEEP, MERGED, join, merged_file, rank_file

T = TypeVar("T")
Write = Callable[[Path], None]
LIMIT = timedelta(hours=2)  # NB: ranks may have very different amounts to write; one that is killed is noticed at once


class LostContact(CheckpointError):
    """Ranks cannot agree on a save any more."""


class Meeting:
    """All ranks' say on whether something has gone well. Over gloo and a group of its own: a thread may use it beside training."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world
        self._comm = DistComm(dist.new_group(backend="gloo", timeout=LIMIT)) if world > 1 else None

    @property
    def group(self) -> Any:
        return self._comm.group if self._comm is not None else None

    def gather(self, value: Any) -> list[Any]:
        """Everybody's. NB: collective."""
        if self.group is None:
            return [value]
        out: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(out, value, group=self.group)
        except RuntimeError as e:
            raise LostContact(f"lost contact with the other ranks: {str(e).partition(chr(10))[0]}") from e
        return out

    def together(self, what: str, fn: Callable[[], T]) -> T:
        """fn() on all ranks; its result, or on all of them the same CheckpointError if one fails. NB: collective."""
        result, error = None, None
        try:
            result = fn()
        except LostContact:
            raise
        except Exception as e:
            error = e
        said = self.gather(None if error is None else describe(error))
        failed: dict[str, list[int]] = {}
        for r, text in enumerate(said):
            if text is not None:
                failed.setdefault(text, []).append(r)
        if failed:
            everywhere = len(failed) == 1 and len(next(iter(failed.values()))) == self.world
            parts = [t if everywhere else f"rank {', '.join(map(str, r))}: {t}" for t, r in failed.items()]
            raise CheckpointError(f"cannot {what}: {'; '.join(parts)}") from error
        return result


def describe(e: BaseException) -> str:
    if isinstance(e, CheckpointError):
        return str(e)
    if isinstance(e, OSError) and e.strerror:
        return f"{e.strerror}{f': {e.filename}' if e.filename else ''}"
    return f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"


def frozen(parts: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """key -> (what it is, value): the values as they will be loaded, which training does not change any more. Raises CheckpointError."""
    return {key: checkpoint.loadable(what, value) for key, (what, value) in parts.items()}


def plain(value: Any) -> Any:
    """Settings as data: what is neither a number nor a text becomes its text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def collect(kind: str, module: Any, optimizer: Any, own: dict[str, Any], take: Take, meeting: Meeting) -> tuple[Write, int]:
    """(what writes this rank's part into a folder, collectively; bytes of the tensors in it). NB: collective.

    own: what only this rank knows. Each tensor is taken once, here, so that what is written is the state of this moment.
    """
    if kind == "dcp":
        extra, local = {k: own[k] for k in KEEP}, {k: own[k] for k in ("status", "dataloader", "custom")}
        plan = meeting.together("collect the state", lambda: checkpoint.collect(module, optimizer, extra, local, take))
        return lambda tmp: checkpoint.write(tmp, plan, meeting.group), sum(map(_size, (t for _, t in plan.tensors.values())))
    form = "deduped" if kind == "merged" else kind
    state = meeting.together("collect the state", lambda: ranks.collect(module, optimizer, form))
    if kind != "sharded":
        state = ranks.dedupe(state)
    state = meeting.together("copy the state", lambda: taken(state, take))
    size = sum(map(_size, _tensors(state)))
    if kind == "merged":
        return lambda tmp: _write_merged(tmp, {**state, "trainer": own}, meeting), size
    drawn = random_state()
    return lambda tmp: save_file(tmp / rank_file(meeting.rank), {**state, "trainer": own, "random": drawn}), size


def expected(kind: str, world: int) -> list[str]:
    """Files that have to be there once all ranks have written."""
    # NB: every rank writes into DCP's at least its random states.
    return [MERGED] if kind == "merged" else [f"__{r}_0.distcp" if kind == "dcp" else rank_file(r) for r in range(world)]


def _write_merged(tmp: Path, state: dict[str, Any], meeting: Meeting) -> None:
    """NB: every rank but the first lays its part aside as a file, so that only that one ever holds the whole."""
    rank = meeting.rank
    parts = [tmp / f"part{r}.pt" for r in range(1, meeting.world)]

    def merge() -> None:
        if rank == 0:
            read = [state, *map(read_rank, parts)]
            save_file(tmp / MERGED, merged_file(join_ranks(read), join([r["trainer"] for r in read])))
            for p in parts:
                p.unlink()

    meeting.together("write the parts", lambda: save_file(parts[rank - 1], state) if rank else None)
    merge()


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    found = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [t for v in found for t in _tensors(v)]


def _size(t: torch.Tensor) -> int:
    return t.numel() * t.itemsize
