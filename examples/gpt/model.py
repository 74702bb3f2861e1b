"""A byte-level GPT in plain PyTorch, for one device, and a dataset of the Python standard library's own source files.
Must not know that autopar exists.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

BYTES, LAYERS, WIDTH, HEADS, SEQ, BATCH = 256, 4, 256, 8, 128, 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, WIDTH)
        self.v = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        q = self.q(x).view(batch, seq, HEADS, WIDTH // HEADS).transpose(1, 2)
        k = self.k(x).view(batch, seq, HEADS, WIDTH // HEADS).transpose(1, 2)
        v = self.v(x).view(batch, seq, HEADS, WIDTH // HEADS).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, seq, WIDTH))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        hidden = F.gelu(self.up(self.norm2(x)))
        return x + self.down(hidden)


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(BYTES, WIDTH)
        self.positions = nn.Embedding(SEQ, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, BYTES, bias=False)
        self.apply(self._init)

    @staticmethod
    def _init(m: nn.Module) -> None:
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, std=0.02)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["ids"]
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def corpus(limit: int = 2_000_000) -> Tensor:
    """The first `limit` bytes of the standard library's .py files, in name order."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    data = b"".join(f.read_bytes() for f in files)[:limit]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


class Bytes(Dataset):
    """Windows of SEQ bytes of the corpus that do not overlap; every tenth is kept for validation."""

    def __init__(self, train: bool = True) -> None:
        self.data = corpus()
        windows = range((len(self.data) - 1) // SEQ)
        self.windows = [w for w in windows if (w % 10 != 9) == train]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self.windows[index] * SEQ
        return {"ids": self.data[start : start + SEQ], "labels": self.data[start + 1 : start + SEQ + 1]}


def build(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT()


def inputs() -> dict[str, dict[str, Tensor]]:
    """Dummy arguments of forward, for `autopar compile examples/gpt/model.py:build --inputs inputs`."""
    rows = [Bytes()[i] for i in range(BATCH)]
    return {"batch": {name: torch.stack([r[name] for r in rows]) for name in rows[0]}}
