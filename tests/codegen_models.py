"""Modules that code is generated from in test_codegen*.py, with arguments to trace and to run them.
Must not import autopar: they are what a user writes.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Mlp(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.drop = nn.Dropout(0.3)

    def forward(self, hidden_states, scale=None):
        residual = hidden_states
        hidden_states = self.norm(hidden_states)
        hidden_states = F.gelu(self.up(hidden_states))
        hidden_states = self.drop(self.down(hidden_states))
        if scale is not None:
            hidden_states = hidden_states * scale
        hidden_states = residual + hidden_states
        return hidden_states


class Stack(nn.Module):
    def __init__(self, n=3, d=8, keep=False):
        super().__init__()
        self.layers = nn.ModuleList(Mlp(d) for _ in range(n))
        self.head = nn.Linear(d, 5)
        self.keep = keep

    def forward(self, x):
        kept = []
        scale = x.mean()
        hidden = x * 2
        for layer in self.layers:
            hidden = layer(hidden, scale)
            kept.append(hidden)
        return (self.head(hidden), *kept) if self.keep else self.head(hidden)


class Shared(nn.Module):
    """One layer called three times, then two of a list from the middle."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x):
        for _ in range(3):
            x = self.layers[0](x)
        for layer in self.layers[2:4]:
            x = layer(x)
        return x


class Heads(nn.Module):
    """Views with sizes, unpacking, matmuls, operators, subscripts."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.register_buffer("bias", torch.ones(16, 16, dtype=torch.bool).tril(), persistent=False)

    def forward(self, x, mask=None):
        b, s, d = x.shape
        q, k, v = self.qkv(x).split(8, dim=-1)
        q, k, v = (t.view(b, s, 2, -1).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / 4 ** 0.5
        causal = self.bias[:s, :s]
        if mask is not None:
            causal = causal & mask[:, None, None, :]
        scores = torch.where(causal, scores, float("-inf"))
        probs = scores.softmax(-1)
        y = (probs @ v).transpose(1, 2).reshape(b, s, d)
        top, _ = y.max(dim=-1, keepdim=True)
        return -self.out(y) + 1 - top[..., 0:1].pow(2)


class Contexts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            scale = self.a(x).abs().mean()
            scale = scale + 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.b(x)
            with torch.no_grad():
                z = self.a(y)
            w = self.a(y)
        return y.float() / scale + z.float() + w.float()


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(8)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("hidden", torch.zeros(8), persistent=False)

    def forward(self, x):
        old = self.mean
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.hidden.copy_(x.detach()[0])
        return self.bn(x) - old + self.mean


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8))

    def forward(self, x, ids):
        shifted = ids.new_zeros(ids.shape)
        shifted[:, 1:] = ids[:, :-1].clone()
        shifted[:, 0] = 7
        y = x * self.w
        y += 1
        first = y[:, 0]
        first.mul_(3)
        z = torch.zeros_like(x)
        z.scatter_(1, shifted % 8, 1.0)
        z.masked_fill_(x > 1, -1)
        return y * z, shifted


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor
    extra: dict | None = None


Pair = namedtuple("Pair", "first second")


class Structs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        y = self.a(x)
        return Output(y.mean(), y, {"pair": Pair(y + 1, None), "list": [y, 3, "text"]})


class Arguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, batch, pair, x=None, flag=True, *, scale=2.0, name="it's", **kwargs):
        y = self.a(batch["ids"].float()) + pair[0] * pair[1]
        if x is not None:
            y = y + x
        return y * scale if flag else y


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(3))
        self.a = nn.Linear(8, 8)

    def part(self, x, y):
        return F.dropout(self.a(x) * y, 0.5, self.training)

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return checkpoint(self.part, x, x + 1, use_reentrant=False)


class Guarded(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x, mask):
        if mask.all():
            return self.a(x)
        return self.a(x) * mask


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 3  # NB: not the gradient of x * 2, so that looking inside would show


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.table = torch.arange(8.0)  # a constant, no buffer

    def forward(self, x):
        return Twice.apply(self.a(x)) + self.table


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.module = nn.ModuleDict({"a-b": nn.Linear(8, 8)})

    def forward(self, input_ids):
        x = self.frozen(self.embed(input_ids))
        return self.head(self.module["a-b"](x))


class Large(nn.Module):
    """A helper whose locals are large and dead long before the forward ends."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def scores(self, x):
        weights = self.a(x)
        wide = weights.exp()
        return wide.sum(-1, keepdim=True)

    def forward(self, x):
        s = self.scores(x)
        y = self.b(x) * s
        y = y.tanh()
        y = y + x
        y = y.relu()
        return y


def data(*shape, grad=False, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def ids(*shape, high=16, seed=1):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "mlp": (Mlp, {"hidden_states": data(2, 4, 8, grad=True)}, {"hidden_states": data(3, 5, 8)}),
    "stack": (Stack, {"x": data(2, 4, 8)}, {"x": data(1, 2, 8)}),
    "stack-keep": (lambda: Stack(keep=True), {"x": data(2, 4, 8)}, None),
    "shared": (Shared, {"x": data(2, 4, 8)}, {"x": data(3, 8)[None]}),
    "heads": (Heads, {"x": data(2, 6, 8), "mask": torch.tensor([[True] * 6, [True] * 4 + [False] * 2])},
              {"x": data(1, 9, 8), "mask": torch.ones(1, 9, dtype=torch.bool)}),
    "heads-no-mask": (Heads, {"x": data(2, 6, 8)}, None),
    "contexts": (Contexts, {"x": data(4, 8)}, {"x": data(2, 8)}),
    "buffers": (Buffers, {"x": data(4, 8)}, {"x": data(6, 8)}),
    "writes": (Writes, {"x": data(4, 8), "ids": ids(4, 8)}, {"x": data(2, 8), "ids": ids(2, 8)}),
    "structs": (Structs, {"x": data(4, 8)}, {"x": data(2, 8)}),
    "arguments": (Arguments, {"batch": {"ids": ids(4, 8)}, "pair": (data(4, 8), data(8))}, None),
    "checkpointed": (Checkpointed, {"x": data(4, 8, grad=True)}, {"x": data(2, 8)}),
    "guarded": (Guarded, {"x": data(4, 8), "mask": torch.ones(4, 1)}, {"x": data(2, 8), "mask": torch.ones(2, 1)}),
    "custom": (Custom, {"x": data(4, 8)}, {"x": data(2, 8)}),
    "tied": (Tied, {"input_ids": ids(2, 4)}, {"input_ids": ids(3, 7)}),
    "large": (Large, {"x": data(4, 8)}, {"x": data(2, 8)}),
}  # fmt: skip
