"""Train the GPT: alone as plain PyTorch, or under torchrun as code that autopar generated for tensor parallelism.
Writes one JSON line per step to the file given, from rank 0.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from model import BATCH, LAYERS, SEQ, batch, build, corpus

import autopar


def split(graph: autopar.Graph, config: autopar.ComputeConfig) -> autopar.Plan:
    """Megatron's split by names: columns of q, k, v and up; rows of out and down. Everything else follows."""
    columns = {f"blocks.*.{name}/linear": {"tp": "n"} for name in ("attention.q", "attention.k", "attention.v", "up")}
    rows = {f"blocks.*.{name}/linear": {"tp": "k"} for name in ("attention.out", "down")}
    mesh = autopar.Mesh((("tp", config.plan_ngpus),))
    return autopar.follow(graph, autopar.plan_from(graph, mesh, columns | rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--losses", type=Path, required=True)
    parser.add_argument("--gen-savedir", type=Path, default=Path(".autopar"))
    args = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)

    data, model = corpus(), build()
    sync = lambda: None  # noqa: E731
    if world > 1:
        config = autopar.ComputeConfig(plan_ngpus=world, constant_folding=True)
        model = autopar.parallelize(model, batch(data, 0), split, config, gen_savedir=args.gen_savedir, reuse="override")
        sync = model.sync_grads
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = int(os.environ.get("RANK", "0")) == 0
    with args.losses.open("w") if first else open(os.devnull, "w") as log:
        for step in range(args.steps):
            start = time.perf_counter()
            loss = model(**batch(data, step))
            loss.backward()
            sync()
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - start
            log.write(json.dumps({"step": step, "loss": loss.item(), "tokens_per_s": BATCH * SEQ / seconds}) + "\n")
            log.flush()
    if first:
        print(f"{LAYERS} layers, {sum(p.numel() for p in model.parameters()):,} parameters on rank 0")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
