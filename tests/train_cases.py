"""Models, data sets and hooks for tests of the trainer, the configurations that name them, and the same training in plain PyTorch.
Must not know what is tested.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, DistributedSampler, IterableDataset, default_collate

from autopar.train.hooks import TrainHook

NAME = __name__
B, T, VOCAB = 3, 5, 32  # of the byte model: all different


class MLP(nn.Module):
    """End to end: takes a sample, returns the loss and what it predicts."""

    def __init__(self, dim: int = 8, nlayers: int = 2, dropout: float = 0.0):
        super().__init__()
        self.layers = nn.ModuleList([Layer(dim) for _ in range(nlayers)])
        self.dropout = dropout

    def forward(self, batch):
        x = batch["x"]
        for layer in self.layers:
            x = F.dropout(x + layer(x), self.dropout, self.training)
        return F.mse_loss(x, batch["y"]), x


class Layer(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class TinyGPT(nn.Module):
    """A byte-level language model: embedding, one attention block, tied head. The sample is {'ids': (batch, T + 1)}."""

    def __init__(self, vocab: int = VOCAB, dim: int = 8, heads: int = 2):
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocab, dim), nn.LayerNorm(dim)
        self.qkv, self.out, self.mlp, self.heads = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), Layer(dim), heads
        self.head = nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, sample):
        ids, labels = sample["ids"][:, :-1], sample["ids"][:, 1:]
        x = self.embed(ids)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        logits = self.head(x + self.mlp(x))
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


class SumTokens(nn.Module):
    """The loss is a sum over tokens that count (label >= 0); how many there are is in the output, for per-token-mean."""

    def __init__(self, vocab: int = VOCAB, dim: int = 8):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(vocab, dim), Layer(dim), nn.Linear(dim, vocab)

    def forward(self, sample):
        logits = self.head(self.layer(self.embed(sample["ids"])))
        labels = sample["labels"]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return loss, (labels >= 0).sum()


class Around(nn.Module):
    """An ordinary model around layers that are to be parallel; takes a sample, returns the loss."""

    def __init__(self, dim: int = 8):
        super().__init__()
        self.inp, self.layer, self.norm, self.head = nn.Linear(dim, dim), Layer(dim), nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, batch):
        return F.mse_loss(self.head(self.norm(self.layer(self.inp(batch["x"])))), batch["y"])


def layer_args(args: Any) -> dict[str, Any]:
    """forward_args_gen_fn of Layer."""
    return {"x": torch.randn(args.micro_batch_size, 8)}


def count_tokens_fn(loss_outputs, sync_group):
    """aggregate_outputs_fn for SumTokens."""
    from autopar.train import AggregatedOutputs

    loss = sum((float(o[0]) for o in loss_outputs), 0.0)
    numbers = torch.tensor([loss, len(loss_outputs), sum(int(o[1]) for o in loss_outputs)], dtype=torch.float64)
    torch.distributed.all_reduce(numbers, group=sync_group)
    return AggregatedOutputs(loss_sum=numbers[0].item(), num_batches=int(numbers[1]), num_tokens=int(numbers[2]))


# -- data


class SimpleDataset(Dataset):
    """`size` samples of two vectors, the same for the same seed. Samples in `nan` are NaN; `fail` names one that raises."""

    def __init__(self, dim: int = 8, size: int = 20, seed: int = 0, nan: tuple[int, ...] = (), fail: int | None = None):
        g = torch.Generator().manual_seed(1000 + seed)
        self.x, self.y = torch.randn(size, dim, generator=g), torch.randn(size, dim, generator=g)
        self.x[list(nan)] = float("nan")
        self.fail = fail

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if i == self.fail:
            raise ValueError(f"sample {i} cannot be read")
        return {"x": self.x[i], "y": self.y[i]}


class Noisy(SimpleDataset):
    """Draws a random number for every sample that is read: exact resuming has to restore random states."""

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        x = super().__getitem__(i)
        return {**x, "x": x["x"] + 0.1 * torch.randn(x["x"].shape)}


class ByteDataset(Dataset):
    """Windows of T + 1 numbers below VOCAB from a text of this repository's making."""

    def __init__(self, size: int = 20, length: int = T, vocab: int = VOCAB, seed: int = 0):
        g = torch.Generator().manual_seed(2000 + seed)
        self.ids = torch.randint(0, vocab, (size, length + 1), generator=g)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"ids": self.ids[i]}


class Labelled(ByteDataset):
    """For SumTokens: every sample has another number of tokens that count."""

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        labels = self.ids[i, 1:].clone()
        labels[: i % (len(labels) - 1)] = -100
        return {"ids": self.ids[i, :-1], "labels": labels}


class Stream(IterableDataset):
    """An iterable data set without a length that gives each scale unit its own samples; units may get different numbers of them."""

    def __init__(self, dim: int = 8, size: int = 20, seed: int = 0, plan_ngpus: int = 1, uneven: int = 0):
        self.data = SimpleDataset(dim, size, seed)
        self.plan_ngpus, self.uneven = plan_ngpus, uneven

    def __iter__(self):
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        unit, units = rank // self.plan_ngpus, world // self.plan_ngpus
        mine = range(unit, len(self.data), units)
        for i in mine[: len(mine) - unit * self.uneven]:
            yield self.data[i]


class StatefulLoader:
    """A loader with state_dict and load_state_dict, as torchdata has them: it goes on where it was."""

    def __init__(self, dataset, batch_size, sampler=None, **ignored):
        self.dataset, self.batch_size, self.sampler = dataset, batch_size, sampler
        self.at, self.started, self.read = 0, False, 0

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self):
        indices = list(self.sampler)
        while self.at * self.batch_size < len(indices):
            mine = indices[self.at * self.batch_size : (self.at + 1) * self.batch_size]
            self.at += 1
            self.read += 1
            yield default_collate([self.dataset[i] for i in mine])
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


# -- configurations


def mlp_args(folder: str | Path, **changes: Any) -> dict[str, Any]:
    """TrainerArgs of a small run as a dict; `changes` replace top-level keys, or with dicts merge into them."""
    base: dict[str, Any] = {
        "compute_config": {"plan_ngpus": 1, "use_end2end": True},
        "gen_savedir": str(Path(folder) / "gen"),
        "pas_policy": "dp",
        "model": {"type": f"{NAME}.MLP"},
        "optimizer": {"type": "torch.optim.SGD", "args": {"lr": 0.1}},
        "dataset": {"type": f"{NAME}.SimpleDataset", "train_args": {"size": 20}},
        "dataset_sampler": {"train_args": {"shuffle": False}, "val_args": {"shuffle": False}},
        "checkpoint": {"no_save": True, "save_dir": str(Path(folder) / "checkpoints")},
        "micro_batch_size": 2,
        "max_epochs": 2,
        "enable_progress_bar": False,
        "seed": 7,
    }
    return merged(base, changes)


def shared_args(folder: str | Path, **changes: Any) -> dict[str, Any]:
    """mlp_args of a test in a folder of its own; generated code is in the folder above, for the other tests to use."""
    args = mlp_args(folder, **changes)
    kind = repr([args.get(k) for k in ("compute_config", "pas_policy", "model", "precision", "micro_batch_size")])
    return {**args, "gen_savedir": str(Path(folder).parent / "gen"), "gen_reuse": "moo", "instance_name": f"i{crc32(kind.encode())}"}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    out = copy.copy(base)
    for key, value in changes.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


# -- hooks


class Recorder(TrainHook):
    """Keeps what a step reports, on every rank: .losses, .norms, .lrs by step; .val by the number of finished steps."""

    last: Recorder

    def __init__(self):
        Recorder.last = self
        self.losses, self.norms, self.lrs, self.val, self.counts = [], [], [], {}, []

    def on_step_end(self, trainer, epoch, idx, step_metrics, aggregated_outputs):
        self.losses.append(step_metrics.train_loss)
        self.norms.append(step_metrics.gnorm)
        self.lrs.append(step_metrics.lr)
        self.counts.append(aggregated_outputs.num_batches)

    def on_val_end(self, trainer, val_loss):
        self.val[trainer.train_status.finished_train_steps] = val_loss


def train(args: dict[str, Any]) -> Any:
    """(the trainer after its run, a Recorder of it). For one rank of run_processes, or alone."""
    from autopar.train import Trainer

    trainer = Trainer({**args, "hook": {"type": Recorder, "args": {}}} if "hook" not in args else args)
    trainer.run()
    return trainer, getattr(Recorder, "last", None)


# -- the same in plain PyTorch


def windows(dataset, *, units: int, micro: int, accumulation: int, epoch: int, shuffle: bool):
    """Of one epoch, for each step the micro batches of all scale units."""
    samplers = [DistributedSampler(dataset, units, u, shuffle=shuffle) for u in range(units)]
    per_unit = []
    for sampler in samplers:
        sampler.set_epoch(epoch)
        order = list(sampler)
        per_unit.append([default_collate([dataset[i] for i in order[k : k + micro]]) for k in range(0, len(order), micro)])
    for k in range(0, len(per_unit[0]), accumulation):
        yield [b for batches in per_unit for b in batches[k : k + accumulation]]


def train_plain(model, optimizer, dataset, *, steps: int, units=1, micro=2, accumulation=1, shuffle=False, clip=None, cast=None):
    """Losses and norms of a hand-written loop: the gradient of a step is the mean over its micro batches."""
    losses, norms, epoch = [], [], 0
    while len(losses) < steps:
        for batches in windows(dataset, units=units, micro=micro, accumulation=accumulation, epoch=epoch, shuffle=shuffle):
            optimizer.zero_grad()
            total = 0.0
            for batch in batches:
                out = model(batch if cast is None else {k: v.to(cast) if v.is_floating_point() else v for k, v in batch.items()})
                loss = out[0] if isinstance(out, tuple) else out
                (loss / len(batches)).backward()
                total += loss.item()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf")).item())
            optimizer.step()
            losses.append(total / len(batches))
            if len(losses) == steps:
                break
        epoch += 1
    return losses, norms


# -- a model of Hugging Face


class Llama(nn.Module):
    """LlamaForCausalLM of a small random configuration, as a model that takes a sample and returns the loss."""

    def __init__(self, vocab: int = VOCAB):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
        config.use_cache = False
        self.model = LlamaForCausalLM(config)

    def forward(self, sample):
        ids = sample["ids"]
        logits = self.model(input_ids=ids[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def llama_args(folder: str | Path) -> dict[str, Any]:
    return mlp_args(
        folder,
        compute_config={"plan_ngpus": 2},
        pas_policy="tp",
        model={"type": Llama},
        optimizer={"type": "torch.optim.AdamW", "args": {"lr": 0.01}},
        dataset={"type": ByteDataset, "train_args": {"size": 8, "length": 12}},
        max_epochs=None,
        max_train_steps=6,
    )
