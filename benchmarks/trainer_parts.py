"""What benchmarks/trainer.py runs on two ranks: the parts that its configuration names, and the two jobs.
Must not know figures or goals. Each job leaves result.json in the folder it is given.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from llama import Config, Llama
from torch import Tensor, nn

import autopar
from autopar.runtime.launch import load
from autopar.train import Trainer, TrainHook
from autopar.train.checkpoint import Checkpointer
from autopar.train.spec import CheckpointSpec

BATCH, SEQ, VOCAB = 4, 64, 1024


class Model(Llama):
    """Takes a sample: windows of SEQ + 1 ids."""

    def __init__(self) -> None:
        super().__init__(Config(layers=2, hidden=128, heads=8, kv_heads=4, ffn=384, vocab=VOCAB))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids[:, :-1], ids[:, 1:])


def data(size: int) -> Tensor:
    return torch.randint(0, VOCAB, (size, SEQ + 1), generator=torch.Generator().manual_seed(1))


class Turns(TrainHook):
    """Lets a bare loop make `each` steps after every `each` of the trainer, with module, optimizer and loader of its own; times both."""

    def __init__(self, each: int, folder: str):
        self.each, self.folder = each, Path(folder)
        self.cpu: dict[str, list[float]] = {"trainer": [], "bare": []}
        self.wall: dict[str, list[float]] = {"trainer": [], "bare": []}

    def on_train_start(self, trainer: Trainer) -> None:
        config = trainer.train_args.compute_config
        saved = next(self.folder.rglob("manifest.json")).parent
        module = load(saved, units=trainer.world_size)
        optimizer = autopar.build_optimizer(module, torch.optim.AdamW, config, lr=1e-3)
        sampler = torch.utils.data.DistributedSampler(trainer.dataset["train"], trainer.world_size, trainer.rank)
        batches = iter(torch.utils.data.DataLoader(trainer.dataset["train"], BATCH, sampler=sampler))
        mean = 1 / trainer.world_size

        def step() -> None:
            optimizer.zero_grad()
            module.train_step([next(batches)], None, lambda loss: loss * mean)
            optimizer.clip_gnorm(1.0)
            optimizer.step()

        self.step = step
        self._start()

    def _start(self) -> None:
        dist.barrier()
        self.began = time.process_time(), time.perf_counter()

    def _took(self, who: str) -> None:
        self.cpu[who].append(time.process_time() - self.began[0])
        self.wall[who].append(time.perf_counter() - self.began[1])
        self._start()

    def on_step_end(self, trainer: Trainer, epoch: int, idx: int, step_metrics: Any, aggregated_outputs: Any) -> None:
        if (idx + 1) % self.each == 0:
            self._took("trainer")
            for _ in range(self.each):
                self.step()
            self._took("bare")

    def on_train_end(self, trainer: Trainer) -> None:
        cpu = torch.tensor(list(self.cpu.values()), dtype=torch.float64)
        dist.all_reduce(cpu)
        if trainer.rank == 0:
            result = {"cpu": dict(zip(self.cpu, cpu.tolist(), strict=True)), "wall": self.wall}
            (self.folder / "result.json").write_text(json.dumps(result))


def overhead(folder: str, rounds: int, each: int) -> None:
    """Seconds per round, cpu of all ranks: {"cpu": {"trainer": [...], "bare": [...]}, "wall": ...}. The first round is to warm up."""
    steps = (rounds + 1) * each
    torch.set_num_threads(1)
    Trainer(
        {
            "compute_config": {"use_end2end": True, "constant_folding": True},
            "gen_savedir": f"{folder}/gen",
            "pas_policy": "dp",
            "model": {"type": "trainer_parts.Model"},
            "optimizer": {"type": "torch.optim.AdamW", "args": {"lr": 1e-3}, "clip_gnorm": 1.0},
            "dataset": {"type": "trainer_parts.data", "train_args": {"size": 2 * BATCH * (steps + 1)}},
            "checkpoint": {"no_save": True},
            "log": [{"type": "autopar.train.loggers.TensorBoardLogger", "args": {"name": "run", "root_dir": folder}}],
            "log_progress_every_n_train_steps": 10,
            "hook": {"type": "trainer_parts.Turns", "args": {"each": each, "folder": folder}},
            "micro_batch_size": BATCH,
            "max_train_steps": steps,
            "val_every_n_epochs": None,
            "seed": 0,
        }
    ).run()


class Wide(nn.Module):
    """16.8 million parameters: 200 MB with the two moments of AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(16))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.pow(2).mean()


def saves(folder: str, rounds: int) -> None:
    """Seconds that training waits for a save, at once and in the background, in turn: {'sync': [...], 'async': [...], 'bytes': n}."""
    torch.set_num_threads(1)
    x = torch.randn(2, 1024)
    module = autopar.parallelize(Wide(), {"x": x}, "dp", {"plan_ngpus": 1}, gen_savedir=f"{folder}/gen", init_module_params=True)
    rank, world = dist.get_rank(), dist.get_world_size()
    optimizer = autopar.build_optimizer(module, torch.optim.AdamW, lr=1e-3)
    module(x).backward()
    optimizer.step()
    savers = {}
    for name in ("sync", "async"):
        spec = CheckpointSpec(save_dir=f"{folder}/{name}", async_save=name == "async", keep_last_n_checkpoints=1)
        savers[name] = Checkpointer(spec, rank=rank, world_size=world)
    stalls: dict[str, list[float]] = {"sync": [], "async": []}
    for step in range(rounds + 1):  # the first is not counted
        for name, saver in savers.items():
            dist.barrier()
            report = saver.save(module=module, optimizer=optimizer, status={"finished_train_steps": step}, step=step, epoch=0)
            saver.wait()
            took = torch.tensor([report.stall_s, report.bytes], dtype=torch.float64)
            worst = took[:1].clone()
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            dist.all_reduce(took)
            if step:
                stalls[name].append(worst.item())
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps({**stalls, "bytes": int(took[1])}))
    dist.destroy_process_group()
