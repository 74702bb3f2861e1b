"""A user's script for torchrun: `torchrun --nproc_per_node 2 torchrun_train.py MODE FOLDER`. Run by test_launch.py.
Must not import the tests.

train: tensor-parallel training against the plain module, then a rank without its weights. policy: a policy that raises on rank 0.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import autopar
from autopar.runtime.launch import load

STEPS = 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(16, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 16, bias=False)

    def forward(self, ids, labels):
        x = self.embed(ids)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def columns_and_rows(graph, config):
    mesh = autopar.Mesh((("tp", config.plan_ngpus),))
    named = {"up/linear": {"tp": "n"}, "down/linear": {"tp": "k"}, "head/linear": {"tp": "n"}}
    return autopar.follow(graph, autopar.plan_from(graph, mesh, named))


def broken(graph, config):
    raise ValueError("the policy has no idea")


def merged(module: nn.Module, name: str) -> torch.Tensor:
    """The whole gradient of a parameter, put together from all ranks."""
    place, grad = module.named_placements()[name], module.get_parameter(name).grad
    pieces: list = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, (module.local_slice(name), grad.cpu()))
    whole = torch.full(place.shape, float("nan"))
    for where, piece in pieces:
        whole[where] = piece
    return whole


def train(folder: Path) -> dict:
    torch.manual_seed(0)
    plain = Net()
    batches = [dict(zip(("ids", "labels"), torch.randint(0, 16, (2, 4, 6)), strict=True)) for _ in range(STEPS)]
    module = autopar.parallelize(copy.deepcopy(plain), batches[0], columns_and_rows, {"plan_ngpus": 2}, gen_savedir=folder / "saved")
    device = module.device  # CUDA where there is one, shared by the ranks if need be
    plain.to(device)
    held = sum(p.numel() for p in module.parameters()), sum(p.numel() for p in plain.parameters())
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (module, plain))
    losses, gradients = [], []
    for batch in batches:
        batch = {k: v.to(device) for k, v in batch.items()}
        for model, optimizer in ((module, ours), (plain, theirs)):
            optimizer.zero_grad()
            loss = model(**batch)
            loss.backward()
            losses.append(loss.item())
        module.sync_grads()
        gradients += [float((merged(module, n) - p.grad.cpu()).abs().max()) for n, p in plain.named_parameters()]
        ours.step()
        theirs.step()
    return {"losses": losses, "gradients": gradients, "held": held, "device": str(device), "backend": dist.get_backend()}


def a_rank_without_weights(folder: Path) -> str:
    """Rank 1 loads from a disk of its own, on which the weights are missing."""
    mine = next((folder / "saved").glob("*/_"))
    if dist.get_rank() == 1:
        mine = Path(shutil.copytree(mine, folder / "other disk"))
        (mine / "weights.safetensors").unlink()
    try:
        load(mine, timeout=20)
    except autopar.AutoparError as e:
        return f"{type(e).__name__}: {e}"
    return ""


def main(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if mode == "policy":
        x = torch.zeros(2, 3, dtype=torch.long)
        autopar.parallelize(Net(), {"ids": x, "labels": x}, broken, {"plan_ngpus": 2}, gen_savedir=folder / "saved", timeout=30)
        raise AssertionError("loaded what was never compiled")
    result = train(folder) | {"missing": a_rank_without_weights(folder)}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
