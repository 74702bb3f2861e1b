"""Ranks in step with each other: what they must agree on before a step, and how all of them end, with the cause, when one fails.
Must not know what a step computes (step.py).

A rank that fails tells the others through the store that torch.distributed was started with. A thread on each rank looks there
four times a second; a rank that waits in a collective of the failed one then stops waiting and raises the cause. A rank that is killed
cannot tell: whoever loses contact calls the roll, and the threads of those who live answer.
"""

from __future__ import annotations

import atexit
import json
import logging
import re
import threading
import time
import traceback
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from autopar.errors import AutoparError, StepError
from autopar.runtime import axis as axis_module
from autopar.runtime.axis import Axis, DistComm
from autopar.runtime.groups import TIMEOUT
from autopar.runtime.mesh import UNITS, RankMesh

log = logging.getLogger("autopar")
POLL = 0.25  # seconds between two looks at the store
GRACE = 1.0  # seconds in which a rank may fail by itself, as another one did, before it is told
ANSWER = 2.0  # seconds to answer the roll
_TRANSPORT = re.compile(r"gloo/transport|NCCL|ProcessGroup")
_INSIDE = re.compile(r"torch/distributed/|autopar/runtime/(axis|pending)\.py")
_KINDS = ("train_step", "infer_step")


def control(mesh: RankMesh, names: Sequence[str] | None = None) -> Axis:
    """The ranks along these mesh axes (all of the run by default), as an Axis for small tensors on the CPU. NB: collective at first."""
    names = (UNITS, *mesh.names) if names is None else tuple(names)
    axis = mesh.join(names)
    if not isinstance(axis.comm, DistComm) or axis.comm.staged:
        return axis
    known = mesh.__dict__.setdefault("_control", {})
    if names not in known:
        for ranks in mesh.groups(names):
            group = dist.new_group(list(ranks), backend="gloo", timeout=timedelta(seconds=TIMEOUT))
            if mesh.rank in ranks:
                known[names] = Axis(axis.name, axis.size, axis.rank, DistComm(group), mesh.rank)
    return known[names]


def gather(axis: Axis, numbers: Sequence[int]) -> list[list[int]]:
    """The whole numbers of every rank of a control axis."""
    mine = torch.tensor(numbers)
    if not isinstance(axis.comm, DistComm):
        return axis.stack(mine).tolist()
    if axis_module._recorders:
        axis_module._note("all_gather", axis, mine)
    rows = torch.empty((axis.size, len(mine)), dtype=mine.dtype)
    # NB: below torch.distributed's functions, which cost three times what they do here.
    axis_module.wait(axis.comm.group.allgather([list(rows.unbind())], [mine]))
    return rows.tolist()


def listed(ranks: Sequence[int], most: int = 8) -> str:
    """'rank 3', 'ranks 0, 1 and 5 more'."""
    shown = ", ".join(map(str, ranks[:most])) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


@dataclass(frozen=True)
class Fault:
    """What one rank has found out, for others to read."""

    rank: int  # who says so
    group: tuple[int, int]  # first and last rank that it concerns
    kind: str  # 'train_step' | 'infer_step'
    step: int  # training steps begun, this one included
    text: str


class Turn:
    """One call of train_step or infer_step on this rank."""

    def __init__(self, mesh: RankMesh, kind: str, watch: Watch | None):
        self.mesh, self.kind, self.watch = mesh, kind, watch

    def doing(self, what: str) -> None:
        """For the messages of others: what this rank is at."""
        if self.watch is not None:
            self.watch.doing = what

    def agree(self, samples: Any, flags: Sequence[bool] | None, *, agreed: bool = False) -> list[bool]:
        """The dummy flags, once all ranks have agreed on the call, the number of samples and, inside each unit, on the flags.

        One collective of four numbers: over all ranks for training, inside a unit for inference. Raises StepError on all ranks alike.
        agreed: the caller has seen to all that, on all ranks; then there is none.
        """
        train = self.kind == "train_step"
        problem = _problem(samples, flags, train)
        n = 0 if problem else len(samples)
        dummies = [bool(f) for f in flags] if flags is not None and not problem else [False] * n
        if agreed and not problem:
            if self.watch is not None:
                self.watch.agreed = self.watch.step - 1  # the last one that all ranks are known to have come through
            return dummies
        mine = [_KINDS.index(self.kind), n, zlib.crc32(bytes(dummies)), int(bool(problem))]
        # NB: inference talks inside a unit only, and units may well have different numbers of samples.
        first = 0 if train else self.mesh.unit * self.mesh.unit_size
        rows = gather(control(self.mesh, None if train else self.mesh.names), mine)
        if self.watch is not None and train:
            self.watch.agreed = self.watch.step
        error = self._difference(rows, first, problem)
        if error:
            e = StepError(error)
            e.everywhere = True
            raise e
        return dummies

    def _difference(self, rows: list[list[int]], first: int, problem: str) -> str:
        if problem:
            return f"{self.kind}: {problem}"
        if all(row == rows[0] for row in rows):
            return ""

        def who(column: int) -> dict[int, list[int]]:
            out: dict[int, list[int]] = {}
            for r, row in enumerate(rows, first):
                out.setdefault(row[column], []).append(r)
            return out

        if wrong := who(3).get(1):
            return f"{listed(wrong)} called {self.kind} with wrong arguments; the error is there"
        if len(kinds := who(0)) > 1:
            parts = ", ".join(f"{listed(r)} in {_KINDS[k]}" for k, r in kinds.items())
            return f"ranks are in different calls: {parts}; all ranks must call the same steps in the same order"
        if len(counts := who(1)) > 1:
            parts = "; ".join(f"{n} on {listed(r)}" for n, r in sorted(counts.items()))
            return f"ranks were given different numbers of samples: {parts}. Fill up with dummy batches (is_dummy_batch)"
        size = self.mesh.unit_size
        for start in range(0, len(rows), size):
            if len({row[2] for row in rows[start : start + size]}) > 1:
                ranks = listed(range(first + start, first + start + size))
                return f"{ranks} form one scale unit but were given different is_dummy_batch; ranks of a unit take the same batches"
        return ""


def _problem(samples: Any, flags: Any, train: bool) -> str:
    if not isinstance(samples, (list, tuple)):
        return f"samples must be a list, one per micro batch; it is a {type(samples).__name__}"
    if not samples and train:
        return "samples is empty; give at least one, a dummy batch where there is no data"
    if flags is not None and (not isinstance(flags, (list, tuple)) or len(flags) != len(samples)):
        what = f"{len(flags)} entries" if isinstance(flags, (list, tuple)) else f"type {type(flags).__name__}"
        return f"is_dummy_batch must be a list of as many flags as there are samples, {len(samples)}; it has {what}"
    return ""


@contextmanager
def together(mesh: RankMesh, kind: str) -> Iterator[Turn]:
    """Run a step so that if it fails on one rank it ends on all.

    Raises the rank's own error where it happened, StepError with the cause elsewhere. In-process ranks and single ones need no help.
    """
    watch = Watch.get() if mesh.world_size > 1 and isinstance(mesh.join((UNITS, *mesh.names)).comm, DistComm) else None
    turn = Turn(mesh, kind, watch)
    if watch is None:
        yield turn
        return
    first = mesh.unit * mesh.unit_size
    watch.enter(kind, (0, mesh.world_size - 1) if kind == "train_step" else (first, first + mesh.unit_size - 1))
    try:
        yield turn
    except BaseException as e:
        found = watch.explain(e)
        if found is e:
            raise
        raise found from e
    finally:
        watch.doing, watch.inside = "", False


@contextmanager
def guarded(mesh: RankMesh, what: str) -> Iterator[None]:
    """As together(), for all that surrounds the steps (data, hooks, saving), in which collectives of all ranks wait for each other."""
    watch = Watch.get() if mesh.world_size > 1 and isinstance(mesh.join((UNITS, *mesh.names)).comm, DistComm) else None
    try:
        yield
    except BaseException as e:
        if watch is None:
            raise
        watch.kind, watch.group, watch.doing = "train_step", (0, mesh.world_size - 1), what
        found = watch.explain(e)
        if found is e:
            raise
        raise found from e


class Watch:
    """This process's eye on the others. One per run."""

    _one: Watch | None = None

    @classmethod
    def get(cls) -> Watch:
        store = dist.distributed_c10d._get_default_store()
        if cls._one is None or cls._one._source is not store:
            if cls._one is not None:
                cls._one._end.set()
            cls._one = cls(store)
        return cls._one

    def __init__(self, store: dist.Store):
        self._source = store
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # NB: a connection of its own, so that the thread never waits for the main one.
        own = store.clone()
        own.set_timeout(timedelta(seconds=5))
        self.store = dist.PrefixStore("autopar/faults", own)
        self.step = self.agreed = 0
        self.kind, self.group, self.doing, self.inside = "train_step", (0, self.world - 1), "", False
        self.cause: str | None = None
        self._told: tuple[str, int] | None = None  # the step that the cause was told of, if nothing has been given up for it yet
        self.failed: set[tuple[str, int]] = set()  # steps that this rank has failed in by itself
        self.pending: list[tuple[float, Fault]] = []
        self._seen = self._answered = 0
        axis_module.interrupt[:] = [self.interrupt]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="autopar faults", daemon=True)
        self._thread.start()
        atexit.register(self._stop)  # NB: a thread that is inside of the store when Python ends aborts the process

    # -- called by the main thread

    def enter(self, kind: str, group: tuple[int, int]) -> None:
        self.interrupt()
        self.step += kind == "train_step"
        self.kind, self.group, self.doing, self.inside = kind, group, "the agreement on the samples", True

    def interrupt(self, error: RuntimeError | None = None) -> None:
        """Raise the cause if a rank has failed that this one may be waiting for. error: what a collective has failed with meanwhile."""
        if error is not None and self.cause is None and self.pending:
            self.cause = self.pending[0][1].text
        if self.cause is not None:
            raise StepError(self.cause) from error

    def explain(self, e: BaseException) -> BaseException:
        """What to raise on this rank for an exception that a step ended with; the others are told."""
        if (isinstance(e, StepError) and (e.everywhere or str(e) == self.cause)) or getattr(e, "_told", None) == self.group:
            return e
        if not _is_contact_lost(e):
            return self._own(e)
        return self._lost_contact(e) if self.cause is None else StepError(self.cause)

    def _own(self, e: BaseException) -> BaseException:
        self.failed.add((self.kind, self.step))
        if self._told == (self.kind, self.step):
            self.cause = self._told = None  # this rank fails as the other did, only later
        frames = traceback.extract_tb(e.__traceback__)
        where = f" (at {frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        said = "".join(traceback.format_exception_only(type(e), e)).strip()
        if not hasattr(e, "_told"):
            e.add_note(f"on rank {self.rank}, in {self.kind} {self.step}, {self.doing}; the other ranks end with this error")
        e._told = self.group  # type: ignore[attr-defined]
        self._post(f"rank {self.rank} failed in {self.kind} {self.step}, {self.doing}: {said}{where}")
        return e

    def _lost_contact(self, e: BaseException) -> BaseException:
        until = time.monotonic() + 3 * POLL
        while not self.pending and self.cause is None and time.monotonic() < until:
            time.sleep(POLL / 5)
        if self.cause is None and self.pending:
            self.cause = self.pending[0][1].text
        if self.cause is None:
            # NB: of gloo's text, what happened; not its source file, nor its advice
            said = re.sub(r"^\[[^\]]*\] ", "", str(e).strip().partition("\n")[0]).partition(". This is typ")[0]
            left: list[int] = []
            try:
                text, left = self._roll(said)
            except RuntimeError:
                text = f"lost contact with the other ranks and with torch's store: {said}; look at the output of rank 0"
            self.cause = f"{self.kind} {self.step} ended: {text}"
            self._post(self.cause, absent=len(left))
        return StepError(self.cause)

    def _roll(self, said: str) -> tuple[str, list[int]]:
        """What to say of the ranks, and which do not answer."""
        call = self.store.add("calls", 1)
        left, until = set(range(self.world)), time.monotonic() + ANSWER
        answers: dict[int, str] = {}
        while left and time.monotonic() < until:
            for r in sorted(left):
                if self.store.check([f"here/{call}/{r}"]):
                    answers[r] = self.store.get(f"here/{call}/{r}").decode()
                    left.discard(r)
            time.sleep(POLL / 5)
        if left:
            return f"no answer from {listed(sorted(left))}: killed (out of memory?) or cut off ({said})", sorted(left)
        same: dict[str, list[int]] = {}
        for r, what in sorted(answers.items()):
            same.setdefault(what, []).append(r)
        return f"a collective failed ({said}), but all ranks live: {'; '.join(f'{listed(r)} {what}' for what, r in same.items())}", []

    def _post(self, text: str, absent: int = 0) -> None:
        """Tell the ranks of the group, and stay (2 s at most) until they have read it: this process may end, and the store with it."""
        fault = Fault(self.rank, self.group, self.kind, self.step, text)
        try:
            n = self.store.add("faults", 1)
            self.store.set(f"fault/{n}", json.dumps(asdict(fault)))
            until = time.monotonic() + 8 * POLL
            while self.store.add(f"read/{n}", 0) < self.group[1] - self.group[0] - absent and time.monotonic() < until:
                time.sleep(POLL / 5)
        except RuntimeError:
            pass  # the store is gone: so are the others

    # -- the thread

    def _stop(self) -> None:
        self._end.set()
        self._thread.join(timeout=6)

    def _loop(self) -> None:
        while not self._end.wait(POLL):
            try:
                self._answer()
                self._read()
                self._judge()
            except RuntimeError:
                return  # the store is gone

    def _answer(self) -> None:
        for call in range(self._answered + 1, self.store.add("calls", 0) + 1):
            what = f"in {self.kind} {self.step}, {self.doing}" if self.inside else f"outside of a step, after train_step {self.step}"
            self.store.set(f"here/{call}/{self.rank}", what)
            self._answered = call

    def _read(self) -> None:
        for n in range(self._seen + 1, self.store.add("faults", 0) + 1):
            data: dict[str, Any] = json.loads(self.store.get(f"fault/{n}"))
            fault = Fault(**{**data, "group": tuple(data["group"])})
            self._seen = n
            if fault.rank != self.rank and fault.group[0] <= self.rank <= fault.group[1]:
                log.error("rank %d: told that %s", self.rank, fault.text)
                self.pending.append((time.monotonic(), fault))
                self.store.add(f"read/{n}", 1)

    def _judge(self) -> None:
        """A fault that this rank did not have too, and did not outlive, ends its waiting."""
        for seen, fault in list(self.pending):
            if (fault.kind, fault.step) in self.failed or fault.step < self.agreed:
                self.pending.remove((seen, fault))
            elif self.cause is None and time.monotonic() > seen + GRACE:
                self.cause, self._told = fault.text, (fault.kind, fault.step)
                _abort_nccl()


def _is_contact_lost(e: BaseException) -> bool:
    """Whether a collective failed, and not what the user's code does in a step."""
    if not isinstance(e, (RuntimeError, OSError)) or isinstance(e, AutoparError):
        return False
    frames = traceback.extract_tb(e.__traceback__)
    return bool(_TRANSPORT.search(str(e)) or (frames and _INSIDE.search(frames[-1].filename)))


def _abort_nccl() -> None:
    """A rank that waits for a CUDA stream sees no Python; NCCL's groups have to be ended under it."""
    for group in list(dist.distributed_c10d._world.pg_map):
        try:
            if dist.get_backend(group) == "nccl":
                group.abort()
        except Exception as e:  # NB: the thread must live on, to answer the roll
            log.warning("cannot end an NCCL group: %s", e)
