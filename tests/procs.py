"""run_processes: a function on N forked gloo processes (0.1 s for four), with every rank's output when one fails.
Must not know what is tested.

NB: fork after importing torch, one thread per child: a child that uses OpenMP threads of its parent hangs.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class ProcessesFailed(AssertionError):
    """A rank raised, died or did not end in time; the message holds the output of all."""


def run_processes(fn: Callable[[int], Any], n: int, timeout: float = 60.0, *, connect: bool = True) -> list:
    """Call fn(rank) on n processes and return the results (anything that pickles) in rank order.

    connect: start torch.distributed with gloo; else only torchrun's environment variables are set, as a script would find them.
    """
    assert not torch.cuda.is_initialized(), "a process that has used CUDA cannot be forked"
    with tempfile.TemporaryDirectory() as folder:
        pids, told = {}, []
        for rank in range(n):
            sys.stdout.flush()
            sys.stderr.flush()
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                _child(fn, rank, n, read, Path(folder), timeout, connect)
            os.close(read)
            pids[pid] = rank
            told.append(write)
        # The store lives in the parent, so that no port is guessed. NB: made after the forks: with its thread running, one in ten hung.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
        for write in told:
            os.write(write, f"{store.port}".encode())
            os.close(write)
        codes = _wait(pids, timeout)
        del store  # NB: a traceback would keep it, and its thread hangs processes that are forked later
        outputs = [(Path(folder) / f"{r}.out").read_text(errors="replace") for r in range(n)]
        if any(code != 0 for code in codes.values()):
            parts = [f"--- rank {r}: {_outcome(codes[r])}\n{outputs[r]}" for r in range(n)]
            raise ProcessesFailed("\n".join(parts))
        return [pickle.loads((Path(folder) / f"{r}.result").read_bytes()) for r in range(n)]


def _child(fn: Callable, rank: int, n: int, told: int, folder: Path, timeout: float, connect: bool) -> None:
    """Never returns. NB: _exit, so that nothing inherited from the parent (pytest, the store) is torn down here."""
    code = 1
    try:
        out = os.open(folder / f"{rank}.out", os.O_CREAT | os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        # A rank that hangs says where, just before it is killed.
        faulthandler.dump_traceback_later(timeout * 0.9, file=2)
        torch.set_num_threads(1)
        port = os.read(told, 16).decode()
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is served by the parent, as torchrun's agent does
        limit = timedelta(seconds=timeout)
        if connect:
            dist.init_process_group("gloo", timeout=limit)
        result = fn(rank)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
        code = 0
        if dist.is_initialized():
            _meet(n)
            dist.destroy_process_group()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
        if dist.is_initialized():
            _meet(n, 0.0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _meet(n: int, seconds: float = 20.0) -> None:
    """Wait for the others. NB: init_process_group is no barrier; a rank that leaves while another still connects breaks or hangs it."""
    store = dist.distributed_c10d._get_default_store()
    store.add("procs/end", 1)
    until = time.monotonic() + seconds
    while store.add("procs/end", 0) < n and time.monotonic() < until:
        time.sleep(0.002)


def _wait(pids: dict[int, int], timeout: float) -> dict[int, int]:
    """Exit codes by rank; -signal for those that were killed, all that are left at the deadline among them."""
    left, codes, deadline = dict(pids), {}, time.monotonic() + timeout
    failed_at = None
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[left.pop(pid)] = os.waitstatus_to_exitcode(status)
        if failed_at is None and any(codes.values()):
            failed_at = time.monotonic()
        # The others usually hang in a collective once one has failed; they get a little time to say so.
        if left and (time.monotonic() > deadline or (failed_at and time.monotonic() > failed_at + 10)):
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
            failed_at = None if failed_at is None else float("inf")
        time.sleep(0.005)
    return codes


def _outcome(code: int) -> str:
    return (
        "ended well" if code == 0 else "killed: out of time, or another rank failed" if code == -signal.SIGKILL else f"failed with {code}"
    )
