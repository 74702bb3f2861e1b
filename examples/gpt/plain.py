"""The GPT trained as plain PyTorch in one process: what `autopar train` on gpt.yaml has to equal, step by step.
Must not know that autopar exists. Writes one JSON line per step.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from model import BATCH, GPT, SEQ, Bytes
from torch.utils.data import DataLoader, DistributedSampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--losses", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = Bytes()
    loader = DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, num_replicas=1, rank=0), drop_last=True)
    with args.losses.open("w") as log:
        for step, batch in zip(range(1, args.steps + 1), loader, strict=False):
            start = time.perf_counter()
            loss = model(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - start
            log.write(json.dumps({"step": step, "train_loss": loss.item(), "tokens_per_s": BATCH * SEQ / seconds}) + "\n")
            log.flush()


if __name__ == "__main__":
    main()
