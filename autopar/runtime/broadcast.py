"""Broadcast: generated files and initial weights for nodes that do not share rank 0's disk.
Must not know how the files were made. A node is what has one LOCAL_RANK 0.

Files go through the process group from rank 0 to the first rank of every node that cannot see rank 0's folder. A rank whose node was
sent no weights asks rank 0 for its slices.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.config import BroadcastStrategy
from autopar.errors import SavedirError
from autopar.runtime.groups import TIMEOUT, fail_together, holders, local_device
from autopar.weights import BUFFERS, WEIGHTS

MANIFEST = "manifest.json"
CHUNK = 64 << 20  # bytes of a file that travel at once
Slices = tuple[slice, ...]
Want = tuple[str, Slices]


def broadcast_files(source: Path, folder: Path, strategy: BroadcastStrategy, timeout: float = TIMEOUT) -> bool:
    """Bring rank 0's folder `source` to `folder` on every node that does not see it. NB: collective, all ranks.

    Returns whether this node's folder is a copy that was sent. Raises SavedirError on all ranks where a disk cannot be written.
    """
    rank = dist.get_rank()
    nodes = _first_ranks()
    seen = _sees(source, folder, timeout)
    takers = [r for r in nodes if r and not seen[r]]
    if not takers:
        return False
    group = _group((0, *takers))
    error: list[str] = []
    if rank == 0 or rank in takers:
        names = _chosen(source, strategy) if rank == 0 else []
        receiver = _Receiver(folder, strategy) if rank else None
        for name, size in _told([(n, (source / n).stat().st_size) for n in names], group):
            _one_file(source / name if rank == 0 else None, size, receiver, name, group)
        if receiver is not None:
            error = receiver.finish()

    def agree() -> None:
        if error:
            raise SavedirError(f"cannot write generated code to {folder} on {socket.gethostname()}: {error[0]}; choose another gen_savedir")

    fail_together("receive the generated code", agree, timeout)
    return _node_of(nodes, rank) in takers


def _first_ranks() -> list[int]:
    """The first rank of every node, in order."""
    local: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(local, int(os.environ.get("LOCAL_RANK", dist.get_rank())))
    return [r for r, k in enumerate(local) if k == 0]


def _node_of(nodes: Sequence[int], rank: int) -> int:
    """The first rank of a rank's node."""
    return max(r for r in (0, *nodes) if r <= rank)


def _sees(source: Path, folder: Path, timeout: float) -> list[bool]:
    """For every rank whether its folder is rank 0's: rank 0 puts a file there that nobody else can have."""
    box = [f".seen-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(box, src=0)
    mark = source / box[0]

    def put() -> None:
        if dist.get_rank() == 0:
            with suppress(OSError):  # a folder that cannot be written is sent; the others have their own
                mark.touch()

    fail_together("mark the generated code", put, timeout)
    seen: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(seen, (folder / box[0]).exists())
    if dist.get_rank() == 0:
        mark.unlink(missing_ok=True)
    return seen


_groups: dict[tuple[dist.ProcessGroup | None, tuple[int, ...]], dist.ProcessGroup] = {}
holders.append(_groups.clear)


def _group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    key = (dist.group.WORLD, ranks)
    if key not in _groups:
        _groups[key] = dist.new_group(list(ranks))
    return _groups[key]


def _chosen(source: Path, strategy: BroadcastStrategy) -> list[str]:
    """The files that a strategy sends; what runs last, so that a torn folder is not taken for a whole one."""
    names = sorted(p.name for p in source.iterdir() if p.is_file() and not p.name.startswith("."))
    if strategy is BroadcastStrategy.NO_WEIGHTS:
        names.remove(WEIGHTS) if WEIGHTS in names else None
    elif strategy is BroadcastStrategy.CODE:
        names = [n for n in names if n.endswith(".py") or n in (MANIFEST, "plan.json", BUFFERS)]
    return [*(n for n in names if n != MANIFEST), MANIFEST]


def _told(mine: list, group: dist.ProcessGroup) -> list:
    box = [mine]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def _device() -> torch.device:
    """Where tensors have to be to travel."""
    return local_device() if dist.get_backend() == "nccl" else torch.device("cpu")


def _one_file(path: Path | None, size: int, receiver: _Receiver | None, name: str, group: dist.ProcessGroup) -> None:
    """Send a file (path), or hand it to the receiver piece by piece."""
    file = path.open("rb") if path is not None else None
    try:
        for start in range(0, max(size, 1), CHUNK):
            n = min(CHUNK, size - start)
            if file is not None:
                data = torch.frombuffer(bytearray(file.read(n)), dtype=torch.uint8) if n else torch.empty(0, dtype=torch.uint8)
                data = data.to(_device())
            else:
                data = torch.empty(n, dtype=torch.uint8, device=_device())
            if n:
                dist.broadcast(data, src=0, group=group)
            if receiver is not None:
                receiver.take(name, data.cpu())
    finally:
        if file is not None:
            file.close()


class _Receiver:
    """Writes into a temporary folder beside the target and puts it in place at the end.

    NB: an error is kept until the end, so that this rank takes part in every broadcast.
    """

    def __init__(self, folder: Path, strategy: BroadcastStrategy):
        self.folder, self.strategy, self.error = folder, strategy, ""
        self.tmp = folder.with_name(f".{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}")
        self._try(lambda: (shutil.rmtree(self.tmp, ignore_errors=True), self.tmp.mkdir(parents=True)))

    def _try(self, fn: Callable[[], object]) -> None:
        try:
            if not self.error:
                fn()
        except OSError as e:
            self.error = e.strerror or str(e)

    def take(self, name: str, data: Tensor) -> None:
        def write() -> None:
            with (self.tmp / name).open("ab") as f:
                f.write(data.numpy().tobytes())

        self._try(write)

    def finish(self) -> list[str]:
        """The error, if there was one."""
        self._try(self._complete)
        shutil.rmtree(self.tmp, ignore_errors=True)
        return [self.error] if self.error else []

    def _complete(self) -> None:
        """Note in the manifest what was not sent, and swap the folder in."""
        path = self.tmp / MANIFEST
        manifest = json.loads(path.read_text())
        have = {p.name for p in self.tmp.iterdir()}
        if lacking := [n for n in manifest["files"] if n not in have]:
            manifest["not_sent"] = lacking
            manifest["files"] = {n: s for n, s in manifest["files"].items() if n in have}
            path.write_text(json.dumps(manifest, indent=2) + "\n")
        old = self.tmp.with_name(self.tmp.name.replace(".tmp-", ".old-"))
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(old)
        self.tmp.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)


def fetch(wants: Sequence[Want], read: Callable[[str, Slices], Tensor] | None) -> dict[tuple[str, str], Tensor]:
    """What rank 0 reads for each (name, slices) this rank wants, by (name, text of the slices). NB: collective; rank 0 wants nothing.

    Only one tensor is under way at a time.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    lists: list[list[Want]] = [[] for _ in range(world)]
    dist.all_gather_object(lists, [(n, _bounds(s)) for n, s in wants])
    out: dict[tuple[str, str], Tensor] = {}
    for r in range(1, world):
        for name, bounds in lists[r]:
            if rank == 0:
                assert read is not None
                data = read(name, tuple(slice(a, b) for a, b in bounds)).contiguous()
                dist.send_object_list([(data.dtype, tuple(data.shape))], dst=r)
                if data.numel():
                    dist.send(data.reshape(-1).view(torch.uint8).to(_device()), dst=r)
            elif rank == r:
                box: list = [None]
                dist.recv_object_list(box, src=0)
                dtype, shape = box[0]
                data = torch.empty(shape, dtype=dtype)
                if data.numel():
                    raw = torch.empty(data.numel() * data.element_size(), dtype=torch.uint8, device=_device())
                    dist.recv(raw, src=0)
                    data = raw.cpu().view(dtype).reshape(shape)
                out[name, key(tuple(slice(a, b) for a, b in bounds))] = data
    return out


def _bounds(slices: Slices) -> list[tuple[int | None, int | None]]:
    return [(s.start, s.stop) for s in slices]


def key(slices: Slices) -> str:
    """Slices as text (they are not hashable before Python 3.12)."""
    return str(_bounds(slices))
