"""Step time: generated tensor-parallel code against DTensor and hand-written Megatron modules; one-rank code against eager.

    python benchmarks/step.py [--json]
Two gloo ranks, 4 layers, batch 8, sequence 128, AdamW; CPU seconds summed over the ranks, the models taking turns in
the same processes; medians of per-round ratios. Also compares the bytes put into collectives.
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

BATCH, SEQ = 8, 128


def megatron(graph: Any, config: Any) -> Any:
    """The same split as the peers': columns of q, k, v, gate, up; rows of o and down; the rest follows."""
    import autopar

    columns = ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")
    rows = ("attention.o", "mlp.down")
    choices = {f"layers.*.{n}/linear": {"tp": "n"} for n in columns} | {f"layers.*.{n}/linear": {"tp": "k"} for n in rows}
    return autopar.follow(graph, autopar.plan_from(graph, autopar.Mesh((("tp", config.plan_ngpus),)), choices))


def make_step(model: Any, args: dict[str, Any], sync: Callable[[], None] | None = None) -> Callable[[], float]:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> float:
        loss = model(**args)
        loss.backward()
        if sync:
            sync()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def rounds(steps: dict[str, Callable[[], float]], count: int, each: int) -> dict[str, list[float]]:
    """CPU seconds of `each` steps of every contestant, `count` times in turn (A, B, B, A), after one warm-up round.

    NB: nobody is to pay for what the one before leaves: the order changes, and garbage is collected between turns.
    """
    times: dict[str, list[float]] = {k: [] for k in steps}
    for n in range(count + 1):
        if n == 1:
            gc.collect()
            gc.freeze()  # what lives on need not be looked through again
        for name in list(steps)[:: -1 if n % 2 else 1]:
            gc.collect()
            start = time.process_time()
            for _ in range(each):
                steps[name]()
            if n:
                times[name].append(time.process_time() - start)
    return times


def two_ranks(hidden: int, count: int, each: int) -> None:
    """Under torchrun: prints the result on rank 0 as JSON."""
    import torch
    import torch.distributed as dist
    from llama import Config, Llama
    from peers import dtensor, handwritten, moved

    import autopar
    from autopar.runtime.axis import record

    torch.set_num_threads(1)
    config = Config(layers=4, hidden=hidden, ffn=3 * hidden)
    rank = int(os.environ["RANK"])
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config.vocab, (BATCH, SEQ + 1), generator=gen)
    args = dict(ids=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous())

    def fresh() -> Llama:
        torch.manual_seed(0)
        return Llama(config)

    folder = Path(tempfile.gettempdir()) / f"autopar-step-{os.environ['TORCHELASTIC_RUN_ID']}"  # one for both ranks
    compute = autopar.ComputeConfig(plan_ngpus=2, constant_folding=True)
    generated = autopar.parallelize(fresh(), args, megatron, compute, gen_savedir=folder, reuse="override")
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)
    steps = {
        "generated": make_step(generated, args, generated.sync_grads),
        "handwritten": make_step(handwritten(fresh(), rank, 2), args),
        "dtensor": make_step(dtensor(fresh(), 2), args),
    }
    first = {name: step() for name, step in steps.items()}
    assert max(first.values()) - min(first.values()) < 1e-4, first
    moved["bytes"] = 0
    steps["handwritten"]()
    with record() as log:
        steps["generated"]()
    bytes_moved = {"handwritten": moved["bytes"], "generated": sum(r.payload for r in log)}
    times = rounds(steps, count, each)
    table = torch.tensor([times[k] for k in steps], dtype=torch.float64)
    dist.all_reduce(table)
    if rank == 0:
        print(json.dumps({"bytes": bytes_moved, "times": dict(zip(steps, table.tolist(), strict=True))}))
    dist.destroy_process_group()


def one_rank(count: int, each: int, compiled: bool) -> None:
    """Generated code for one device against the module itself; prints JSON."""
    import torch
    from llama import Config, Llama

    import autopar

    torch.set_num_threads(1)
    config = Config(layers=4, hidden=128, ffn=384)
    ids = torch.randint(0, config.vocab, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(1))
    args = dict(ids=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous())
    torch.manual_seed(0)
    eager = Llama(config)
    with tempfile.TemporaryDirectory() as tmp:
        compute = autopar.ComputeConfig(constant_folding=True)
        generated = autopar.parallelize(eager, args, "dp", compute, gen_savedir=tmp, reuse="override")
    models = {"generated": generated, "eager": eager}
    if compiled:
        models = {k: torch.compile(m) for k, m in models.items()}
    print(json.dumps({"times": rounds({k: make_step(m, args) for k, m in models.items()}, count, each)}))


def guards_cost(count: int, each: int) -> None:
    """Hugging Face GPT-2 with a padding mask, guards='error' against 'off'; prints JSON."""
    import torch
    from models import build

    import autopar

    torch.set_num_threads(1)
    module, args = build("gpt2", n_embd=128, n_layer=4)
    steps = {}
    with tempfile.TemporaryDirectory() as tmp:
        for name, guards in (("generated", "error"), ("eager", "off")):
            compute = autopar.ComputeConfig(constant_folding=True, guards=guards)
            made = autopar.parallelize(module, args, "dp", compute, gen_savedir=tmp, instance_name=guards, reuse="override")
            call = made.forward
            made.forward = lambda call=call, **kw: call(**kw).loss
            steps[name] = make_step(made, args)
    print(json.dumps({"times": rounds(steps, count, each)}))


def child(*args: str, ranks: int = 1) -> dict[str, Any]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch, __file__, "--child", *args], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"step.py {' '.join(args)} failed:\n{done.stdout}{done.stderr}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def ratio(times: dict[str, list[float]], against: str) -> float:
    return median(a / b for a, b in zip(times["generated"], times[against], strict=True))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=60, help="twice as many of the models on one rank")
    options.add_argument("--steps", type=int, default=1, help="steps per round and model")
    options.add_argument("--child", nargs="*")
    args = options.parse_args()
    if args.child:
        job, *rest = args.child
        count, each = int(rest[-2]), int(rest[-1])
        if job == "two":
            two_ranks(int(rest[0]), count, each)
        elif job == "guards":
            guards_cost(count, each)
        else:
            one_rank(count, each, job == "compiled")
        return
    # NB: many short turns: the machine's speed changes by the second, by more than what is to be seen.
    count, each, twice = str(args.rounds), str(args.steps), str(2 * args.rounds)
    figures = []
    for hidden, goal in ((128, 0.80), (512, 0.90)):
        got = child("two", str(hidden), count, each, ranks=2)
        figures.append(Figure(f"tp2_vs_dtensor_h{hidden}", ratio(got["times"], "dtensor"), "ratio", "DTensor parallelize_module", goal))
        name = "tp2_vs_handwritten" if hidden == 128 else f"tp2_vs_handwritten_h{hidden}"
        figures.append(Figure(name, ratio(got["times"], "handwritten"), "ratio", "hand-written Megatron modules", 1.05))
        share = got["bytes"]["generated"] / got["bytes"]["handwritten"]
        figures.append(Figure(f"tp2_bytes_vs_handwritten_h{hidden}", share, "ratio", "bytes in collectives, hand-written", 1.0))
    for job, name in (("eager", "one_rank_vs_eager"), ("compiled", "one_rank_vs_eager_compiled")):
        got = child(job, twice, each)
        figures.append(Figure(name, ratio(got["times"], "eager"), "ratio", f"the module itself, {job}", 1.02))
    got = child("guards", twice, each)
    figures.append(Figure("guards_cost", ratio(got["times"], "eager"), "ratio", "guards='off', Hugging Face GPT-2", 1.05))
    report(figures, args.json)


if __name__ == "__main__":
    main()
