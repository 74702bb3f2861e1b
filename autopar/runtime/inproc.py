"""All ranks of a mesh in one process: threads that take turns, each running to its next collective, so that runs are deterministic.
Must not know about torch.distributed: LocalComm is the other transport behind Axis.

One baton goes round: only the rank that holds it runs. Random state (torch, numpy, python) and the default dtype belong to the rank and are
swapped with the baton, so that a rank computes what it would compute alone in a process seeded with `seed`.
"""

from __future__ import annotations

import contextvars
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from autopar.errors import LayoutError
from autopar.runtime import axis as axis_module
from autopar.runtime.mesh import RankMesh

_STOP = object()


class _Stopped(BaseException):
    """Raised in the ranks that have to end because another one failed. NB: no Exception, so that no rank can swallow it."""


@dataclass
class _Call:
    """A rank waiting in a collective."""

    group: tuple[int, ...]  # world ranks
    axis: str
    name: str
    detail: tuple  # what all ranks of the group have to agree on
    tensors: tuple[torch.Tensor, ...]

    def __str__(self) -> str:
        return f"{self.name} on axis {self.axis!r} {' '.join(map(str, self.detail))}"


@dataclass
class _Rank:
    index: int
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    call: _Call | None = None
    count: int = 0  # collectives completed
    finished: bool = False
    result: Any = None
    state: tuple | None = None  # the random state while others run
    thread: threading.Thread | None = None


def _get_state() -> tuple:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    numpy = sys.modules.get("numpy")
    return (torch.get_rng_state(), cuda, random.getstate(), numpy and numpy.random.get_state(), torch.get_default_dtype())


def _set_state(state: tuple) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
    random.setstate(state[2])
    if state[3] is not None:
        sys.modules["numpy"].random.set_state(state[3])
    torch.set_default_dtype(state[4])


class World:
    """The ranks of one run, whose turn it is, and the first failure."""

    def __init__(self, size: int):
        self.ranks = [_Rank(i) for i in range(size)]
        self.over = threading.Event()
        self.error: BaseException | None = None
        self.running: int | None = None

    # -- turns: called by the thread that holds the baton

    def start(self) -> None:
        self._pass_on(-1)

    def collective(self, me: int, call: _Call) -> None:
        """Wait in a collective until all of its group have arrived; the last one to arrive carries it out."""
        self._check()
        rank = self.ranks[me]
        rank.call = call
        others = [self.ranks[r] for r in call.group]
        if all(r.call is not None and r.call.group == call.group for r in others):
            self._carry_out([r.call for r in others], call.group)
            for r in others:
                r.call = None
                r.count += 1
        rank.state = _get_state()
        self._pass_on(me)
        rank.baton.acquire()
        self._check()
        _set_state(rank.state)
        self.running = me

    def finish(self, me: int, result: Any) -> None:
        self._check()
        self.ranks[me].finished, self.ranks[me].result = True, result
        self._pass_on(me)

    def fail(self, error: BaseException) -> None:
        """End the run. The first error wins."""
        if self.error is None:
            self.error = error
        self.over.set()
        for r in self.ranks:
            r.baton.release()

    def _check(self) -> None:
        if self.error is not None:
            raise _Stopped

    def _pass_on(self, me: int) -> None:
        """Hand the baton to the next rank, in rank order after me, that can run."""
        n = len(self.ranks)
        for i in range(1, n + 1):
            r = self.ranks[(me + i) % n]
            if not r.finished and r.call is None:
                self.running = r.index
                r.baton.release()
                return
        self.running = None
        if all(r.finished for r in self.ranks):
            self.over.set()
        else:
            self.fail(LayoutError(f"deadlock between in-process ranks: no rank can go on\n{self.report()}"))

    def report(self) -> str:
        """One line per rank: what it is doing."""
        lines = []
        for r in self.ranks:
            if r.finished:
                what = "finished"
            elif r.call is not None:
                calls = {m: self.ranks[m].call for m in r.call.group}
                missing = [str(m) for m, c in calls.items() if c is None or c.group != r.call.group]
                what = f"waits in {r.call}" + (f" for rank {', '.join(missing)}" if missing else "")
            elif r.index == self.running:
                what = "is running" + _place(r.thread)
            else:
                what = "is ready to run"
            lines.append(f"  rank {r.index}: {what} (after {r.count} collectives)")
        return "\n".join(lines)

    def _carry_out(self, calls: list[_Call], group: tuple[int, ...]) -> None:
        first = calls[0]
        for rank, c in zip(group, calls, strict=True):
            if (c.name, c.axis, c.detail) != (first.name, first.axis, first.detail):
                self.fail(LayoutError(f"mismatched collectives: rank {group[0]} calls {first}, rank {rank} calls {c}\n{self.report()}"))
                raise _Stopped
        with torch.no_grad():
            _MOVES[first.name](calls)


def _place(thread: threading.Thread | None) -> str:
    """Where a thread is, outside of this package."""
    frame = sys._current_frames().get(thread.ident) if thread else None
    stack = traceback.extract_stack(frame) if frame else []
    inner = next((f for f in reversed(stack) if "autopar/runtime" not in f.filename), None)
    return f", at {inner.filename}:{inner.lineno} in {inner.name}" if inner else ""


def _all_reduce(calls: list[_Call]) -> None:
    op = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}[calls[0].detail[0]]
    total = calls[0].tensors[0].clone()
    for c in calls[1:]:
        op(total, c.tensors[0], out=total)
    for c in calls:
        c.tensors[0].copy_(total)


def _all_gather(calls: list[_Call]) -> None:
    for c in calls:
        for j, other in enumerate(calls):
            c.tensors[0][j].copy_(other.tensors[1])


def _reduce_scatter(calls: list[_Call]) -> None:
    for i, c in enumerate(calls):
        out = c.tensors[0]
        out.copy_(calls[0].tensors[1][i])
        for other in calls[1:]:
            out.add_(other.tensors[1][i])


def _all_to_all(calls: list[_Call]) -> None:
    for i, c in enumerate(calls):
        for j, other in enumerate(calls):
            c.tensors[0][j].copy_(other.tensors[1][i])


def _broadcast(calls: list[_Call]) -> None:
    src = calls[0].detail[0]
    for j, c in enumerate(calls):
        if j != src:
            c.tensors[0].copy_(calls[src].tensors[0])


_MOVES = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
}


class LocalComm:
    """The transport between in-process ranks (see Comm in axis.py)."""

    def __init__(self, world: World, me: int, group: tuple[int, ...], axis: str):
        self.world, self.me, self.group, self.axis = world, me, group, axis

    def _call(self, name: str, detail: tuple, *tensors: torch.Tensor) -> None:
        t = tensors[-1]
        detail = (*detail, tuple(t.shape), str(t.dtype).removeprefix("torch."))
        self.world.collective(self.me, _Call(self.group, self.axis, name, detail, tuple(x.detach() for x in tensors)))

    def all_reduce_(self, t: torch.Tensor, op: str) -> None:
        self._call("all_reduce", (op,), t)

    def all_gather_into(self, stacked: torch.Tensor, t: torch.Tensor) -> None:
        self._call("all_gather", (), stacked, t)

    def reduce_scatter_into(self, t: torch.Tensor, stacked: torch.Tensor) -> None:
        self._call("reduce_scatter", (), t, stacked)

    def all_to_all_into(self, out: torch.Tensor, stacked: torch.Tensor) -> None:
        self._call("all_to_all", (), out, stacked)

    def broadcast_(self, t: torch.Tensor, src: int) -> None:
        self._call("broadcast", (src,), t)


def run_ranks(
    mesh: Any,
    fn: Callable[[RankMesh, int], Any],
    timeout: float = 60.0,
    seed: int = 0,
    *,
    units: int = 1,
    device: str | torch.device = "cpu",
) -> list:
    """Call fn(axes, rank) once per rank of the mesh (times `units` scale units) and return the results in rank order.

    mesh: a Mesh, or pairs (name, size). Every rank starts with the random state that torch.manual_seed(seed) and random.seed(seed) give;
    the caller's random state is as before afterwards. Raises LayoutError for a deadlock, a mismatch or a timeout, with what every rank was
    doing; an exception in a rank is raised as it is, with a note that names the rank.
    """
    pairs = tuple(getattr(mesh, "axes", mesh))
    size = units
    for _, k in pairs:
        size *= k
    world = World(size)
    before = _get_state()
    # NB: the caller's numpy state is part of `before`; numpy.random.seed is cheap enough to call always.
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    start = _get_state()
    grad = torch.is_grad_enabled()

    def run(me: int) -> None:
        rank = world.ranks[me]
        rank.baton.acquire()
        if world.error is not None:
            return
        axis_module._current.rank = me
        _set_state(start)
        world.running = me
        try:

            def connect(name: str, groups: list[tuple[int, ...]]) -> LocalComm:
                return LocalComm(world, me, next(g for g in groups if me in g), name)

            axes = RankMesh(pairs, me, units, connect, torch.device(device))
            # NB: on CUDA the engine would run backwards on its own thread, one for all ranks: it would wait for itself.
            with torch.autograd.set_multithreading_enabled(False), torch.set_grad_enabled(grad):
                result = fn(axes, me)
            world.finish(me, result)
        except _Stopped:
            pass
        except BaseException as e:
            if not isinstance(e, LayoutError) or "rank " not in str(e):
                e.add_note(f"in rank {me} of {size} in-process ranks; the others:\n{_others(world, me)}")
            world.fail(e)

    try:
        for r in world.ranks:
            r.thread = threading.Thread(target=contextvars.copy_context().run, args=(run, r.index), name=f"rank {r.index}", daemon=True)
            r.thread.start()
        world.start()
        deadline = time.monotonic() + timeout
        if not world.over.wait(timeout):
            world.fail(LayoutError(f"in-process ranks did not end within {timeout:g} s\n{world.report()}"))
        for r in world.ranks:
            # A rank that is stuck outside of a collective cannot be stopped; its thread is a daemon and ends at its next collective.
            r.thread.join(max(0.0, min(deadline - time.monotonic(), 5.0)) if world.error else 5.0)
        _wait_for_the_end([r.thread for r in world.ranks if not r.thread.is_alive()])
    finally:
        if not world.over.is_set():  # the caller was interrupted
            world.fail(LayoutError("interrupted"))
        _set_state(before)
    if world.error is not None:
        raise world.error
    return [r.result for r in world.ranks]


def _wait_for_the_end(threads: list[threading.Thread], seconds: float = 1.0) -> None:
    """Until the system has no such threads any more (Linux), which is a little after Python is done with them.

    NB: a thread on its way out returns its buffers to MKL under a lock. A process forked in that moment (a worker of a data loader) has
    the lock held by nobody, and hangs in its first matrix product.
    """
    until = time.monotonic() + seconds
    for t in threads:
        while os.path.exists(f"/proc/self/task/{t.native_id}") and time.monotonic() < until:
            time.sleep(0.0005)


def _others(world: World, me: int) -> str:
    return "\n".join(line for i, line in enumerate(world.report().splitlines()) if i != me)
