"""The runtime: data parallelism, ZeRO and checkpoints against PyTorch's own, and a soak of 2,000 steps.

    python benchmarks/runtime.py [--json] [--soak] [--only dp2,zero1,zero1_views,zero3,memory,checkpoint,soak]
Two gloo ranks, a Llama of 4 layers and hidden 512 (13.6 million parameters), batch 2 per rank, sequence 128, AdamW. CPU seconds
summed over the ranks, the contestants taking turns in the same processes; medians of per-round ratios.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from common import Figure, parser, report

HIDDEN, BATCH, SEQ = 512, 2, 128
RANKS, SOAK_RANKS, SOAK_STEPS = 2, 4, 2000
Step = Callable[[], float]
# NB: large tensors straight from the kernel and back to it at once, for all contestants: then resident memory is what is held.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}


# -- the contestants: each makes a step of the same training, which returns this rank's loss


def _llama(hidden: int) -> Any:
    import torch
    from llama import Config, Llama

    torch.manual_seed(0)
    return Llama(Config(layers=4, hidden=hidden, ffn=3 * hidden))


def _batch() -> dict[str, Any]:
    import torch

    gen = torch.Generator().manual_seed(1 + int(os.environ["RANK"]))
    ids = torch.randint(0, 1024, (BATCH, SEQ + 1), generator=gen)
    return dict(ids=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous())


def _parallel(hidden: int, policy: str = "dp", **settings: Any) -> tuple[Any, Any]:
    import torch

    import autopar

    # NB: all ranks read the same folder, which rank 0 names.
    place = [tempfile.mkdtemp() if os.environ["RANK"] == "0" else None]
    autopar.runtime.groups.init()
    torch.distributed.broadcast_object_list(place)
    config = autopar.ComputeConfig(constant_folding=True, use_async_reducer=True, **settings)
    module = autopar.parallelize(_llama(hidden), _batch(), policy, config, gen_savedir=place[0], reuse="override")
    torch.distributed.barrier()
    if os.environ["RANK"] == "0":
        shutil.rmtree(place[0])
    return module, autopar.build_optimizer(module, torch.optim.AdamW, config, lr=1e-3)


def autopar_step(hidden: int, **settings: Any) -> Step:
    module, optimizer = _parallel(hidden, **settings)
    args, units = _batch(), module.mesh.units

    def step() -> float:
        loss = module(**args)
        (loss / units).backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    step.optimizer, step.module = optimizer, module
    return step


def _plain_step(model: Any, optimizer: Any) -> Step:
    args = _batch()

    def step() -> float:
        loss = model(**args)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    step.model = model
    return step


def ddp_step(hidden: int) -> Step:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(_llama(hidden), gradient_as_bucket_view=True)
    return _plain_step(model, torch.optim.AdamW(model.parameters(), lr=1e-3))


def zro_step(hidden: int, views: bool) -> Step:
    """views: parameters and gradients as views into buckets, which is faster, and not the default."""
    import torch
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(_llama(hidden), gradient_as_bucket_view=views)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, parameters_as_bucket_view=views, lr=1e-3)
    return _plain_step(model, optimizer)


def fsdp2_step(hidden: int) -> Step:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, model = init_device_mesh("cpu", (RANKS,)), _llama(hidden)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _plain_step(model, torch.optim.AdamW(model.parameters(), lr=1e-3))


PAIRS = {
    "dp2": (lambda h: autopar_step(h), ddp_step),
    "zero1": (lambda h: autopar_step(h, use_zero=1, zero_use_reduce_scatter=True), lambda h: zro_step(h, False)),
    "zero1_views": (lambda h: autopar_step(h, use_zero=1, zero_use_reduce_scatter=True), lambda h: zro_step(h, True)),
    "zero3": (lambda h: autopar_step(h, use_zero=3), fsdp2_step),
}


# -- jobs of the ranks: each returns what rank 0 prints


def _in_turn(contestants: dict[str, Callable[[], Any]], count: int, each: int) -> dict[str, list[float]]:
    """CPU seconds of all ranks for `each` calls of every contestant, `count` times in turn, after one round to warm up."""
    import torch
    import torch.distributed as dist

    times: dict[str, list[float]] = {k: [] for k in contestants}
    for n in range(count + 1):
        for name, call in contestants.items():
            dist.barrier()
            start = time.process_time()
            for _ in range(each):
                call()
            if n:
                times[name].append(time.process_time() - start)
    table = torch.tensor(list(times.values()), dtype=torch.float64)
    dist.all_reduce(table)
    return dict(zip(times, table.tolist(), strict=True))


def train(pair: str, hidden: int, count: int, each: int) -> dict[str, Any]:
    ours, theirs = PAIRS[pair]
    steps = {"autopar": ours(hidden), "peer": theirs(hidden)}
    for _ in range(3):
        first = [step() for step in steps.values()]
        assert abs(first[0] - first[1]) < 1e-3, first
    out = {"times": _in_turn(steps, count, each)}
    return out | ({"bytes": _reduced_bytes(steps, hidden)} if pair == "dp2" else {})


def _reduced_bytes(steps: dict[str, Step], hidden: int) -> dict[str, int]:
    """Bytes that one rank puts into all-reduces of gradients in one step; DDP's as its communication hook sees them."""
    import torch.distributed as dist

    import autopar

    with autopar.runtime.record() as log:
        steps["autopar"]()
    seen = []
    other = ddp_step(hidden)

    def count(state, bucket):  # NB: DDP checks annotations, and takes no strings
        seen.append(bucket.buffer().nbytes)
        work = dist.all_reduce(bucket.buffer().div_(RANKS), async_op=True).get_future()
        return work.then(lambda f: f.value()[0])

    other.model.register_comm_hook(None, count)
    other()
    counts = sum(1 for _ in steps["autopar"].module.parameters()) * 4
    return {"autopar": sum(r.payload for r in log), "counts": counts, "peer": sum(seen)}


def memory(pair: str, name: str, hidden: int, steps: int) -> dict[str, Any]:
    """Peak of resident memory over what there was before the model, of one contestant, per rank."""
    ours, theirs = PAIRS[pair]
    _batch()
    small = (ours if name == "autopar" else theirs)(32)  # what is imported and compiled at first
    for _ in range(2):
        small()
    del small
    gc.collect()
    before = _status("VmRSS")
    step = (ours if name == "autopar" else theirs)(hidden)
    step()  # the optimizer's state
    gc.collect()
    held = _status("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    for _ in range(steps):
        step()
    import torch

    row = torch.tensor([_status("VmHWM") - before, held])
    torch.distributed.all_reduce(row)
    return {"peak": row[0].item() / RANKS, "held": row[1].item() / RANKS}


def _status(key: str) -> float:
    """MB of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key + ":"))
    return int(line.split()[1]) / 1024


def checkpoint(hidden: int, count: int, folder: str) -> dict[str, Any]:
    """Tensor parallel over both ranks, with AdamW's state. The peer's state dict holds the same local tensors, as DTensors."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    import autopar

    module, optimizer = _parallel(hidden, "tp", plan_ngpus=RANKS)
    loss = module(**_batch())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    plain = _as_dtensors(module, optimizer)
    rank, serial = dist.get_rank(), iter(range(10**6))
    at = {}

    def timed(name: str, save: Callable[[str], None]) -> Callable[[], None]:
        def call() -> None:
            at[name] = f"{folder}/{name}{next(serial)}"  # NB: a new folder each time
            save(at[name])

        return call

    def clear() -> None:
        dist.barrier()
        if rank == 0:
            for path in Path(folder).iterdir():
                if str(path) not in at.values():
                    shutil.rmtree(path)
        dist.barrier()

    saves = {
        "autopar": timed("a", lambda path: autopar.save_checkpoint(path, module, optimizer)),
        "peer": timed("b", lambda path: dcp.save(plain, checkpoint_id=path)),
    }
    loads = {
        "autopar": lambda: autopar.load_checkpoint(at["a"], module, optimizer),
        "peer": lambda: dcp.load(plain, checkpoint_id=at["b"]),
    }
    rows: dict[str, list[dict[str, list[float]]]] = {"save": [], "load": []}
    walls: dict[str, list[dict[str, float]]] = {"save": [], "load": []}
    for n in range(count + 1):
        for job, contestants in (("save", saves), ("load", loads)):
            cpu, wall = {}, {}
            for name, call in contestants.items():
                dist.barrier()
                start, began = time.process_time(), time.monotonic()
                call()
                cpu[name], wall[name] = time.process_time() - start, time.monotonic() - began
            if n:
                rows[job].append(cpu)
                walls[job].append(wall)
        clear()
    out = {}
    for job in rows:
        import torch

        table = torch.tensor([[r["autopar"], r["peer"]] for r in rows[job]], dtype=torch.float64)
        dist.all_reduce(table)
        out[job] = {"times": dict(zip(("autopar", "peer"), table.T.tolist(), strict=True))}
        out[job]["wall"] = {k: [w[k] for w in walls[job]] for k in ("autopar", "peer")}
    sizes = {k: sum(f.stat().st_size for f in Path(v).iterdir()) for k, v in at.items()}
    return out | {"bytes": sizes}


def _as_dtensors(module: Any, optimizer: Any) -> dict[str, Any]:
    """The state dict that a user of plain DCP has for this module: no counters or random states, only the tensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = init_device_mesh("cpu", (RANKS,))
    placements, state = module.named_placements(), {p.name: s for p, s in optimizer.named_pieces()}

    def wrap(name: str, t: Any) -> DTensor:
        kind = placements[name].types[0]
        where = Shard(int(kind[2:].split(",")[0].rstrip(")"))) if kind.startswith("S") else Replicate()
        return DTensor.from_local(t.detach().view(module.get_parameter(name).shape), mesh, [where], run_check=False)

    out = {f"model.{n}": wrap(n, p) for n, p in module.named_parameters()}
    for name, s in state.items():
        out |= {f"optimizer.{name}.{key}": wrap(name, s[key]) for key in ("exp_avg", "exp_avg_sq")}
    return out


def soak(steps: int, folder: str) -> dict[str, Any]:
    """A tiny model, ZeRO-1 over two units of two, clipping, and a checkpoint now and then: memory and files, largest over the ranks."""
    import torch
    import torch.distributed as dist

    import autopar
    from autopar.runtime.groups import init

    init()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Any) -> Any:
            return (self.inner(x) - x).pow(2).mean()

    config = autopar.ComputeConfig(plan_ngpus=2, use_zero=True, use_async_reducer=True, use_end2end=True)
    module = autopar.parallelize(Net(), {"x": torch.randn(8, 16)}, "tp", config, gen_savedir=f"{folder}/code")
    module.check_finite = True
    optimizer = autopar.build_optimizer(module, torch.optim.AdamW, config, lr=1e-3)
    rows = []
    for n in range(1, steps + 1):
        optimizer.zero_grad()
        module.train_step([torch.randn(8, 16) for _ in range(2)])
        optimizer.clip_gnorm(1.0)
        optimizer.step()
        if n % max(1, steps // 20) == 0:
            autopar.save_checkpoint(f"{folder}/last", module, optimizer)
            autopar.load_checkpoint(f"{folder}/last", module, optimizer)
            gc.collect()
            rows.append([_status("VmRSS"), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))])
    table = torch.tensor(rows, dtype=torch.float64)
    tables = [torch.empty_like(table) for _ in range(dist.get_world_size())]
    dist.all_gather(tables, table)
    half = len(rows) // 2
    grown = torch.stack([t[-3:].mean(0) - t[half - 1 : half + 2].mean(0) for t in tables]).max(0).values
    return dict(zip(("rss_mb", "files", "threads"), grown.tolist(), strict=True))


# -- the parent


def child(job: str, *args: object, ranks: int = RANKS, env: dict[str, str] | None = None) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__, "--child", job]
    full = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run([*command, *map(str, args)], env=full, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"runtime.py {job} {' '.join(map(str, args))} failed:\n{done.stdout}{done.stderr}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def _child(job: str, *args: str) -> None:
    import torch
    import torch.distributed as dist

    from autopar.runtime.groups import init

    torch.set_num_threads(1)
    init()
    jobs = {"train": train, "memory": memory, "checkpoint": checkpoint, "soak": soak}
    out = jobs[job](*(int(a) if a.isdigit() else a for a in args))
    if dist.get_rank() == 0:
        print(json.dumps(out))
    dist.destroy_process_group()


def ratio(times: dict[str, list[float]]) -> float:
    return median(a / b for a, b in zip(times["autopar"], times["peer"], strict=True))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--steps", type=int, default=4, help="steps per round and contestant")
    options.add_argument("--soak", action="store_true", help="the soak too")
    options.add_argument("--only", default="dp2,zero1,zero1_views,zero3,memory,checkpoint", help="which, by comma")
    options.add_argument("--child", nargs="*")
    args = options.parse_args()
    if args.child:
        _child(*args.child)
        return
    wanted, figures = {*args.only.split(","), *(["soak"] if args.soak else [])}, []
    goals = {
        "dp2": ("dp2_vs_ddp", "DistributedDataParallel, gradients as views", 1.05),
        "zero1": ("zero1_vs_zro", "ZeroRedundancyOptimizer", 0.95),
        "zero1_views": ("zero1_vs_zro_views", "the same with gradients and parameters as views", 1.0),
        "zero3": ("zero3_vs_fsdp2", "FSDP2 fully_shard", 1.0),
    }
    for pair, (name, peer, goal) in goals.items():
        if pair in wanted:
            got = child("train", pair, HIDDEN, args.rounds, args.steps)
            figures.append(Figure(name, ratio(got["times"]), "ratio", peer, goal))
            if pair == "dp2":
                b = got["bytes"]
                figures.append(Figure("dp2_bytes_vs_ddp", (b["autopar"] - b["counts"]) / b["peer"], "ratio", "gradient bytes, DDP", 1.0))
    if "memory" in wanted:
        for pair, name, peer in (("zero1", "zero1_memory", "zro"), ("zero3", "zero3_memory", "fsdp2")):
            ours, theirs = (child("memory", pair, who, HIDDEN, 3, env=MALLOC) for who in ("autopar", "peer"))
            for key, when, middle in (("peak", "peak per rank", ""), ("held", "between steps", "_held")):
                against = f"{goals[pair][1]}, {when} ({ours[key]:.0f} and {theirs[key]:.0f} MB)"
                figures.append(Figure(f"{name}{middle}_vs_{peer}", ours[key] / theirs[key], "ratio", against, 1.05))
    with tempfile.TemporaryDirectory() as folder:
        if "checkpoint" in wanted:
            got = child("checkpoint", HIDDEN, args.rounds, folder)
            for job in ("save", "load"):
                against = f"torch.distributed.checkpoint {job} (wall {ratio(got[job]['wall']):.2f})"
                figures.append(Figure(f"{job}_vs_dcp", ratio(got[job]["times"]), "ratio", against, 1.0))
        if "soak" in wanted:
            got = child("soak", SOAK_STEPS, folder, ranks=SOAK_RANKS)
            figures.append(Figure("soak_rss_growth_mb", got["rss_mb"], "MB", "the first half of 2,000 steps", 1.0))
            figures.append(Figure("soak_fd_growth", got["files"], "files", "the first half of 2,000 steps", 0.0))
            figures.append(Figure("soak_thread_growth", got["threads"], "threads", "the first half of 2,000 steps", 0.0))
    report(figures, args.json)


if __name__ == "__main__":
    main()
