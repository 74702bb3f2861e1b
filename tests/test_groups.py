"""Processes and groups: torchrun's variables, world sizes that do not fit, coordinates, failing together.
Must not know modules."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from autopar.errors import LayoutError
from autopar.runtime import groups
from autopar.runtime.groups import fail_together, rank_mesh
from autopar.runtime.inproc import run_ranks
from tests.procs import ProcessesFailed, run_processes

pytestmark = pytest.mark.procs


def test_outside_of_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        LayoutError, match=r"not a process of a distributed run: RANK, WORLD_SIZE.*`torchrun --nproc_per_node N your_script.py`"
    ):
        rank_mesh((("tp", 2),))
    axes = rank_mesh((("tp", 1),))
    assert axes["tp"].size == 1 and axes.world_size == 1 and not dist.is_initialized()


def message(fn):
    try:
        fn()
    except LayoutError as e:
        return str(e)
    return None


def test_world_size_does_not_fit():
    for text in run_processes(lambda rank: message(lambda: rank_mesh((("dp", 2), ("tp", 2)))), 3):
        assert "the generated code is for 4 devices (dp=2, tp=2), but 3 processes are running" in text
        assert "torchrun --nproc_per_node 4" in text and "plan_ngpus=3" in text


def workers():
    """How many threads of gloo there are that hold tensors."""
    return sum("gloo_runloop" in t.read_text() for t in Path("/proc/self/task").glob("*/comm"))


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads by /proc")
@pytest.mark.parametrize("destroyed", [True, False])
def test_no_thread_is_left_when_python_ends(destroyed):
    """One of gloo that lets go of a tensor then aborts the process; whoever still holds a mesh, and whether the script ends the run."""

    def rank_main(rank):
        mesh = rank_mesh((("dp", 2), ("tp", 2)), device="cpu")
        for name in mesh.names:
            mesh[name].all_reduce_(torch.ones(3))
        during = workers()
        dist.barrier()
        if destroyed:
            dist.destroy_process_group()
        groups._end()
        assert mesh.world_size == 4  # it is still there
        return during, workers()

    for during, after in run_processes(rank_main, 4, connect=False):
        assert during and not after


def test_unknown_axis():
    assert "the mesh has no axis 'pp'" in run_ranks((("tp", 2),), lambda axes, rank: message(lambda: axes["pp"]))[0]


def layout(axes, rank):
    ones = torch.tensor(10.0**rank)
    sums = [
        int(axes.join(n).all_reduce(ones)) for n in (("tp",), ("dp",), ("tp", "dp"), ("units",), ("units", "tp"), ("units", "dp", "tp"))
    ]
    return sums, axes.unit, axes.device_index, [(a.name, a.rank, a.size) for a in axes.values()], axes.replicas.size


@pytest.mark.parametrize("mesh,units", [((("tp", 2),), 1), ((("tp", 2),), 2), ((("dp", 2), ("tp", 2)), 1), ((("dp", 1), ("tp", 2)), 2)])
def test_same_layout_as_in_process(mesh, units):
    mesh = mesh if len(mesh) == 2 else (("dp", 1), *mesh)
    here = run_ranks(mesh, layout, units=units)
    # connect=False: rank_mesh starts torch.distributed itself, as under torchrun.
    assert run_processes(lambda rank: layout(rank_mesh(mesh), rank), len(here), connect=False) == here


def test_all_succeed():
    assert run_processes(lambda rank: [fail_together("load", lambda i=i: (rank, i)) for i in range(3)], 3) == [
        [(r, i) for i in range(3)] for r in range(3)
    ]


@pytest.mark.parametrize("bad", [0, 2])
def test_one_rank_fails_and_all_end_with_its_error(bad):
    def load(rank):
        def work():
            if rank == bad:
                time.sleep(0.2)
                raise ValueError("no space left")

        start = time.monotonic()
        try:
            fail_together("load", work, timeout=30)
        except (LayoutError, ValueError) as e:
            return type(e).__name__, str(e), time.monotonic() - start

    for rank, (kind, text, seconds) in enumerate(run_processes(load, 3, timeout=15)):
        assert "no space left" in text and seconds < 10
        assert kind == ("ValueError" if rank == bad else "LayoutError")
        assert rank == bad or (text.startswith(f"rank {bad} failed to load: ValueError: no space left (at ") and "test_groups.py:" in text)


def test_a_rank_that_hangs_ends_the_others_in_time():
    def load(rank):
        if rank == 1:
            time.sleep(2)
            return None
        return message(lambda: fail_together("compile", lambda: None, timeout=0.5))

    first, _, third = run_processes(load, 3, timeout=15)
    assert first == third == "rank 1 did not compile within 0.5 s"


def test_the_rank_that_holds_the_store_fails():
    """Rank 0 serves the store and ends the process at once; the others still get its error."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def fn(rank):
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE")
        os.environ["MASTER_PORT"] = str(port)
        rank_mesh((("tp", 3),))

        def work():
            assert rank, "the disk is full"
            time.sleep(0.2)

        try:
            fail_together("load", work, timeout=20)
        except AssertionError:
            os._exit(3)
        except LayoutError as e:
            print(f"rank {rank} sees: {e}", flush=True)
            os._exit(4)

    with pytest.raises(ProcessesFailed) as e:
        run_processes(fn, 3, connect=False)
    text = str(e.value)
    for rank in (1, 2):
        assert f"rank {rank} sees: rank 0 failed to load: AssertionError: the disk is full" in text


def test_the_helper_shows_every_ranks_output():
    def fn(rank):
        print(f"hello from {rank}")
        assert rank != 1, "one is bad"

    with pytest.raises(ProcessesFailed) as e:
        run_processes(fn, 2)
    text = str(e.value)
    assert "hello from 0" in text and "hello from 1" in text and "one is bad" in text and "rank 1: failed with 1" in text


def test_the_helper_kills_at_its_time_limit():
    start = time.monotonic()
    with pytest.raises(ProcessesFailed, match="rank 0: killed"):
        run_processes(lambda rank: time.sleep(30), 1, timeout=0.5)
    assert time.monotonic() - start < 5
