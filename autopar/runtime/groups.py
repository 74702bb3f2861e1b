"""The processes of a run: who am I (torchrun's variables), the process groups of a mesh, and failing together.
Must not know modules. The only file that starts torch.distributed.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import timedelta
from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from autopar.errors import LayoutError
from autopar.runtime.axis import DistComm
from autopar.runtime.mesh import RankMesh

T = TypeVar("T")
TIMEOUT = 600.0  # seconds that a collective may take, and that ranks wait for each other
holders: list[Callable[[], object]] = []  # how those who keep groups for the whole run let go of them
_ours = False  # whether torch.distributed was started here
_LAUNCH = "torchrun --nproc_per_node {n} your_script.py"


def init(timeout: float = TIMEOUT) -> torch.device:
    """Join the other processes (once; later calls change nothing) and return this rank's device.

    NCCL with one CUDA device per local rank; gloo with CUDA tensors where ranks have to share devices; gloo on CPU without CUDA.
    Raises LayoutError outside of torchrun.
    """
    if not dist.is_initialized():
        missing = [v for v in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if v not in os.environ]
        if missing:
            raise LayoutError(
                f"this is not a process of a distributed run: {', '.join(missing)} not set. Launch with "
                f"`{_LAUNCH.format(n='N')}`; without processes, parallelize(..., load_module=False) compiles only and "
                "autopar.verify runs all ranks in one process."
            )
        device = local_device()
        own = device.type == "cuda" and _local_world() <= torch.cuda.device_count()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        limit = timedelta(seconds=timeout)
        if own:
            dist.init_process_group("nccl", timeout=limit, device_id=device, **_meeting_place(limit))
        else:
            dist.init_process_group("gloo", timeout=limit, **_meeting_place(limit))
        global _ours
        _ours = True
    return local_device()


def _meeting_place(limit: timedelta) -> dict[str, Any]:
    """Where the processes meet: under torchrun a part of its store of this attempt's own.

    NB: torchrun keeps its store when it starts all processes again (--max-restarts); with what the killed ones have left there, the new
    ones would wait for them.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=False, timeout=limit)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"autopar/attempt {attempt}", store), "rank": rank, "world_size": world}


@atexit.register
def _end() -> None:
    """Before Python ends, end the threads of gloo: one that lets go of a tensor while Python ends aborts the process.

    NB: it is the last reference to a group that ends its threads, which wait for what is under way; after an error, or where a rank
    leaves in the middle of a step, that may never come.
    """
    if hasattr(sys, "last_value"):
        return
    if _ours and dist.is_initialized() and dist.get_backend() == "gloo":  # NB: NCCL may wait for ranks that do not come
        dist.destroy_process_group()

    def let_go() -> None:
        for forget in holders:
            forget()
        for comm in list(DistComm.made):
            comm.group = None

    thread = threading.Thread(target=let_go, daemon=True)
    thread.start()
    thread.join(2.0)


def alone() -> bool:
    """Whether this is a process of its own, not one of a distributed run."""
    return not dist.is_initialized() and "RANK" not in os.environ


def local_device() -> torch.device:
    """The CUDA device of this local rank, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if dist.is_initialized() and dist.get_backend() == "gloo" and torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) % torch.cuda.device_count())


def _local_world() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def rank_mesh(
    axes: Sequence[tuple[str, int]],
    *,
    device: torch.device | str | None = None,
    timeout: float = TIMEOUT,
) -> RankMesh:
    """This process's place on the mesh; the world is as many scale units as fit. NB: collective.

    A mesh of one device in a process of its own needs no torchrun. Raises LayoutError where the world size is not a multiple of the mesh's.
    """
    axes = tuple(getattr(axes, "axes", axes))
    unit = prod(k for _, k in axes)
    if unit == 1 and alone():
        return RankMesh(axes, 0, 1, _no_peers, torch.device(device) if device else local_device())
    here = init(timeout)
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % unit:
        shape = ", ".join(f"{n}={k}" for n, k in axes)
        raise LayoutError(
            f"the generated code is for {unit} devices ({shape}), but {world} processes are running; the number has to be a multiple: "
            f"`{_LAUNCH.format(n=unit)}`, or generate the code again with plan_ngpus={world}"
        )
    made: dict[tuple[tuple[int, ...], ...], DistComm] = {}
    limit = timedelta(seconds=timeout)

    def connect(label: str, groups: list[tuple[int, ...]]) -> DistComm:
        key = tuple(groups)
        if key not in made:
            # NB: every rank creates every group of this kind, in the same order; new_group asks for it.
            for ranks in groups:
                group = dist.group.WORLD if len(ranks) == world else dist.new_group(list(ranks), timeout=limit)
                if rank in ranks:
                    made[key] = DistComm(group)
        return made[key]

    return RankMesh(axes, rank, world // unit, connect, torch.device(device) if device else here)


def _no_peers(label: str, groups: list[tuple[int, ...]]) -> DistComm:
    raise AssertionError("a mesh of one device has no groups")


_rounds: defaultdict[str, int] = defaultdict(int)


def fail_together(what: str, fn: Callable[[], T], timeout: float = TIMEOUT) -> T:
    """Run fn on every rank and return its result once all have succeeded.

    Where one raises, that rank raises its own error and the others LayoutError with the rank and its error; where one is not done within
    the timeout, the others raise LayoutError naming it. fn may do local work of any length on any rank (rank 0 compiles, the others wait).
    A single process just calls fn.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return fn()
    rank, world = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    _rounds[what] += 1
    prefix = f"autopar/{what}/{_rounds[what]}"
    deadline = time.monotonic() + timeout
    try:
        result = fn()
    except BaseException as e:
        text = "".join(traceback.format_exception_only(e)).strip()
        where = next((f"{f.filename}:{f.lineno}" for f in reversed(traceback.extract_tb(e.__traceback__))), "?")
        store.compare_set(f"{prefix}/error", "", f"rank {rank} failed to {what}: {text} (at {where})")
        _leave(store, prefix, rank, world, deadline)
        raise
    store.set(f"{prefix}/done/{rank}", "1")
    store.add(f"{prefix}/count", 1)
    pause = 0.002
    while not store.check([f"{prefix}/error"]):
        if store.add(f"{prefix}/count", 0) == world:
            return result
        if time.monotonic() > deadline:
            late = [r for r in range(world) if not store.check([f"{prefix}/done/{r}"])]
            text = f"rank {', '.join(map(str, late))} did not {what} within {timeout:g} s"
            store.compare_set(f"{prefix}/error", "", text)  # so that a late rank ends too
            raise LayoutError(text)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.2)
    error = store.get(f"{prefix}/error").decode()
    _leave(store, prefix, rank, world, deadline)
    raise LayoutError(error)


def _leave(store: dist.Store, prefix: str, rank: int, world: int, deadline: float) -> None:
    """Rank 0 may hold the store: it stays until the others have read the error, at most a few seconds."""
    try:
        store.add(f"{prefix}/read", 1)
        until = min(deadline, time.monotonic() + 5.0)
        while rank == 0 and store.add(f"{prefix}/read", 0) < world and time.monotonic() < until:
            time.sleep(0.02)
    except RuntimeError:
        pass  # the store is gone: so are the others
