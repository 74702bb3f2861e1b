"""Small modules that between them use every feature of a lowered program: random ops, run-time sizes, writes, ties, calls, reads.
Must not import autopar.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class MLP(nn.Module):
    def __init__(self, d=8, h=16, p=0.1):
        super().__init__()
        self.norm, self.up, self.down, self.p = nn.LayerNorm(d), nn.Linear(d, h), nn.Linear(h, d), p

    def forward(self, x):
        h = F.gelu(self.up(self.norm(x)))
        h = F.dropout(h, self.p, self.training)
        return x + F.dropout(self.down(h), self.p, self.training)


class Attention(nn.Module):
    """Fused projection, split three ways, run-time sizes."""

    def __init__(self, d=8, heads=4):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(d, 3 * d), nn.Linear(d, d), heads

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (y.view(b, t, self.heads, d // self.heads).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class GatedMLP(nn.Module):
    def __init__(self, d=8, h=16):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, h, bias=False), nn.Linear(d, h, bias=False), nn.Linear(h, d, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, d=8, heads=4, h=16):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention, self.mlp = Attention(d, heads), GatedMLP(d, h)

    def forward(self, x):
        x = x + self.attention(self.n1(x))
        return x + F.dropout(self.mlp(self.n2(x)), 0.1, self.training)


class LM(nn.Module):
    """Tied language model with a loss; layers may be recomputed."""

    def __init__(self, n=2, d=8, vocab=16, recompute=False):
        super().__init__()
        self.embed, self.pos = nn.Embedding(vocab, d), nn.Parameter(torch.randn(8, d))
        self.layers = nn.ModuleList(Layer(d) for _ in range(n))
        self.norm, self.head, self.recompute = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False), recompute
        self.head.weight = self.embed.weight

    def forward(self, ids, labels=None):
        x = self.embed(ids) + self.pos[: ids.shape[1]]
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        logits = self.head(self.norm(x))
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Conv(nn.Module):
    """Running statistics, a counter, in-place activations."""

    def __init__(self):
        super().__init__()
        self.c1, self.b1, self.c2 = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        y = F.relu(self.b1(self.c1(x)), inplace=True)
        y = self.c2(y)
        y += x
        return self.head(y.mean((2, 3)))


class Writes(nn.Module):
    """Buffers counted and set, views written through, slices assigned."""

    def __init__(self, d=8):
        super().__init__()
        self.proj = nn.Linear(d, d)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(d))

    def forward(self, x):
        self.steps += 1
        with torch.no_grad():
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        y = self.proj(x)
        z = y * 2
        v = z.view(-1)
        v.mul_(3)
        z[:, 0] = 1.0
        out = torch.zeros_like(y)
        out.add_(z)
        out = torch.relu_(out)
        return out + self.mean, self.steps * 1


class Reads(nn.Module):
    """Control flow on inputs."""

    def __init__(self, d=8):
        super().__init__()
        self.a, self.b = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x, mask):
        x = self.a(x) if bool(mask.all()) else self.b(x)
        return x.masked_fill(~mask, 0.0).sum(-1) / x.size(0)


class Twice(nn.Module):
    """One block called twice, two of a kind side by side."""

    def __init__(self, d=8):
        super().__init__()
        self.layers = nn.ModuleList([MLP(d), MLP(d)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(layer(x))
        return x


class Stacked(nn.Module):
    """Blocks in blocks, several results per block."""

    def __init__(self, d=8):
        super().__init__()
        self.stages = nn.ModuleList(Stage(d) for _ in range(2))

    def forward(self, x):
        total = 0
        for s in self.stages:
            x, aux = s(x)
            total = total + aux
        return x, total


class Stage(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.blocks = nn.ModuleList(MLP(d) for _ in range(2))

    def forward(self, x):
        for b in self.blocks:
            x = b(x)
        a, c = x.chunk(2, -1)
        return torch.cat([c, a], -1), x.pow(2).mean()


def inputs(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """(module in training mode, forward arguments)."""
    torch.manual_seed(0)
    x, ids = torch.randn(4, 6, 8), torch.randint(0, 16, (4, 6))
    table = {
        "mlp": (MLP, {}, {"x": x}),
        "attention": (Attention, {}, {"x": x}),
        "layer": (Layer, {}, {"x": x}),
        "lm": (LM, {}, {"ids": ids, "labels": ids}),
        "lm_logits": (LM, {}, {"ids": ids}),
        "lm_recompute": (LM, {"recompute": True}, {"ids": ids, "labels": ids}),
        "conv": (Conv, {}, {"x": torch.randn(4, 4, 6, 6)}),
        "writes": (Writes, {}, {"x": x[0]}),
        "reads": (Reads, {}, {"x": x, "mask": torch.ones(4, 6, 8, dtype=torch.bool)}),
        "twice": (Twice, {}, {"x": x}),
        "stacked": (Stacked, {}, {"x": x}),
    }
    cls, options, args = table[name]
    return cls(**options).train(), args


NAMES = ("mlp", "attention", "layer", "lm", "lm_logits", "lm_recompute", "conv", "writes", "reads", "twice", "stacked")
