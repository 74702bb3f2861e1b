"""Modules of many kinds for sweeps of random plans, each with something that went wrong in some parallel code once.
Must not import autopar. Sizes are multiples of 2, 3 and 4 wherever possible, so that axes of those sizes have a choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import small_models
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

B, T, D, V = 4, 12, 24, 24


class Grouped(nn.Module):
    """Grouped-query attention: rotary buffers, shared key heads, an additive mask made from a padding mask; a frozen output bias."""

    def __init__(self, heads=4, kv=2, native=False):
        super().__init__()
        self.heads, self.kv, self.native, self.dim = heads, kv, native, D // heads
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, kv * self.dim, bias=False), nn.Linear(D, kv * self.dim, bias=False)
        self.o = nn.Linear(D, D)
        self.o.bias.requires_grad_(False)
        self.register_buffer("inv_freq", 1.0 / 10 ** (torch.arange(0, self.dim, 2) / self.dim), persistent=False)

    def rotate(self, x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-b, a), dim=-1) * sin

    def forward(self, x, mask=None):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, self.dim).transpose(1, 2)
        k, v = (p(x).view(b, t, self.kv, -1).transpose(1, 2) for p in (self.k, self.v))
        at = torch.arange(t, device=x.device)[None, :, None] * self.inv_freq[None, None, :]
        at = torch.cat((at, at), dim=-1)[:, None]
        q, k = self.rotate(q, at.cos(), at.sin()), self.rotate(k, at.cos(), at.sin())
        bias = torch.full((t, t), -1e4, dtype=x.dtype, device=x.device).triu(1)[None, None]
        if mask is not None:
            bias = bias.expand(b, 1, -1, -1).masked_fill(~mask[:, None, None, :], -1e4)
        if self.native:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        else:
            many = self.heads // self.kv
            k, v = (y[:, :, None].expand(b, self.kv, many, t, self.dim).reshape(b, self.heads, t, self.dim) for y in (k, v))
            weights = torch.softmax(q @ k.transpose(2, 3) / self.dim**0.5 + bias, dim=-1)
            y = F.dropout(weights, 0.1, self.training) @ v
        return self.o(y.transpose(1, 2).contiguous().view(b, t, -1))


class Adapters(nn.Module):
    """Frozen weights with low-rank adapters beside them, tied head, frozen embedding."""

    def __init__(self, rank=4, n=2):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.base = nn.ModuleList(nn.Linear(D, D) for _ in range(n))
        self.down = nn.ModuleList(nn.Linear(D, rank, bias=False) for _ in range(n))
        self.up = nn.ModuleList(nn.Linear(rank, D, bias=False) for _ in range(n))
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.embed.weight
        for p in (*self.base.parameters(), self.embed.weight):
            p.requires_grad_(False)

    def forward(self, ids, labels):
        x = self.embed(ids)
        for base, down, up in zip(self.base, self.down, self.up, strict=True):
            x = x + F.silu(base(x) + up(F.dropout(down(x), 0.2, self.training)) * 0.5)
        return F.cross_entropy(self.head(x).transpose(1, 2), labels, ignore_index=-100, label_smoothing=0.1)


@dataclass
class Result:
    loss: torch.Tensor
    parts: dict
    hidden: tuple


class Losses(nn.Module):
    """Several losses of several reductions, results nested in a dataclass, one returned twice, one without gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, D), nn.Linear(D, V), nn.Linear(D, 1)
        self.register_buffer("weight", torch.rand(V) + 0.5)

    def forward(self, x, target, labels):
        h = torch.tanh(self.a(x))
        logits = self.b(h)
        ce = F.cross_entropy(logits.view(-1, V), labels.view(-1), weight=self.weight, ignore_index=-100)
        summed = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / labels.ne(-100).sum()
        mse, l1 = F.mse_loss(h, target), F.smooth_l1_loss(h, target, reduction="sum")
        kl = F.kl_div(F.log_softmax(logits, -1), F.softmax(target, -1), reduction="batchmean")
        bce = F.binary_cross_entropy_with_logits(self.c(h).squeeze(-1), (labels > 3).to(h.dtype))
        nll = F.nll_loss(F.log_softmax(logits, -1).transpose(1, 2), labels.clamp(min=0), reduction="none").mean()
        cos = 1 - F.cosine_similarity(h, target, dim=-1).mean()
        loss = ce + 0.1 * summed + mse + 1e-2 * l1 + kl + bce + nll + cos
        with torch.no_grad():
            accuracy = (logits.argmax(-1) == labels).to(h.dtype).mean()
        return Result(loss, {"ce": ce, "mse": mse, "accuracy": accuracy, "again": ce}, (h, [logits, logits.detach()]))


class Experts(nn.Module):
    """A mixture of experts: top-k router, dense dispatch by one-hot, and a loop over experts with index_add."""

    def __init__(self, n=4, h=12):
        super().__init__()
        self.n, self.router = n, nn.Linear(D, n, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(n, D, h)), nn.Parameter(torch.randn(n, h, D))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        probabilities = self.router(flat).softmax(-1)
        top, chosen = probabilities.topk(2, dim=-1)
        top = top / top.sum(-1, keepdim=True)
        gate = torch.zeros_like(probabilities).scatter(1, chosen, top)
        hidden = F.gelu(torch.einsum("td,edh->teh", flat, self.up))
        y = torch.einsum("teh,ehd,te->td", hidden, self.down, gate)
        load = F.one_hot(chosen, self.n).to(x.dtype).mean((0, 1))
        return y.view_as(x), (load * probabilities.mean(0)).sum() * self.n


class Vision(nn.Module):
    """Group norm, strided and transposed convolution, pooling, padding, interpolation, running statistics, a position table."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(4, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12)
        self.group, self.deep = nn.GroupNorm(4, 12), nn.Conv2d(12, 12, 3, padding=1, groups=4)
        self.back = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.table = nn.Parameter(torch.randn(1, 12, 6, 6))
        self.head = nn.Linear(6, 12)

    def forward(self, x):
        y = F.relu(self.norm(self.stem(x)), inplace=True)
        y = y + self.table
        y = y + F.gelu(self.group(self.deep(y)))
        z = F.max_pool2d(F.pad(y, (3, 3, 3, 3)), 4) + F.avg_pool2d(y, 2)
        z = F.interpolate(z, scale_factor=2, mode="nearest")
        w = self.back(torch.sigmoid(z) * y)
        return self.head(F.adaptive_avg_pool2d(w, 1).flatten(1)), w.mean((2, 3))


class InPlace(nn.Module):
    """Writes through views of views, buffers set and counted, slices copied, masks filled in place, an accumulated result."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("history", torch.zeros(3, D))

    def forward(self, x, mask):
        self.steps += 1
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)
            self.history = torch.cat((self.history[1:], self.mean[None]))
        y = self.a(x) - self.mean
        parts = y.clone().unflatten(-1, (2, -1)).unbind(-2)
        first = parts[0] * 2
        first.masked_fill_(mask[..., None], 0.5)
        first[:, 1:] += parts[1][:, :-1]
        out = torch.zeros_like(y)
        out[..., : y.shape[-1] // 2] = first
        out.narrow(-1, y.shape[-1] // 2, y.shape[-1] // 2).copy_(parts[1])
        total = torch.zeros_like(out)
        for h in (out, self.b(out)):
            total += h.relu()
        return total.transpose(0, 1).contiguous(), self.history.sum()


class Recurrent(nn.Module):
    """A loop over time with chunked gates, stacked results, a cumulative sum, running reductions."""

    def __init__(self):
        super().__init__()
        self.x, self.h = nn.Linear(D, 3 * D), nn.Linear(D, 3 * D, bias=False)
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, x):
        h, out = x.new_zeros(x.shape[0], D), []
        for step in self.x(x)[:, :4].unbind(1):
            r, z, n = (step + self.h(h)).chunk(3, -1)
            r, z = torch.sigmoid(r), torch.sigmoid(z)
            h = (1 - z) * torch.tanh(n * r) + z * h
            out.append(h * self.scale)
        y = torch.stack(out, dim=1)
        y = y.cumsum(1) / torch.arange(1, 5, device=x.device, dtype=x.dtype)[:, None]
        return y.flip(1), y.amax(1), y.var(-1, unbiased=False), h.norm(dim=-1)


class Windows(nn.Module):
    """Shifted windows: roll, partition by views and permutes, a gathered bias table, merged back; layer norm in between."""

    def __init__(self, w=2, heads=2):
        super().__init__()
        self.w, self.heads, self.qkv, self.out = w, heads, nn.Linear(12, 36), nn.Linear(12, 12)
        self.table, self.norm = nn.Parameter(torch.randn((2 * w - 1) ** 2, heads)), nn.LayerNorm(12)
        at = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij")).flatten(1)
        delta = (at[:, :, None] - at[:, None, :] + w - 1).permute(1, 2, 0)
        self.register_buffer("index", (delta[..., 0] * (2 * w - 1) + delta[..., 1]).contiguous(), persistent=False)

    def forward(self, x):
        b, h, w, c = x.shape
        s = self.w
        y = torch.roll(self.norm(x), shifts=(-1, -1), dims=(1, 2))
        y = y.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        q, k, v = self.qkv(y).reshape(y.shape[0], s * s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(s * s, s * s, -1).permute(2, 0, 1).contiguous()
        weights = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        y = self.out((weights.softmax(-1) @ v).transpose(1, 2).reshape(-1, s * s, c))
        y = y.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return x + torch.roll(y, shifts=(1, 1), dims=(1, 2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(D), Grouped(), nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x, mask):
        x = x + self.attention(self.norm(x), mask)
        return x + F.dropout(self.mlp(x), 0.1, self.training)


class Decoder(nn.Module):
    """A tied language model of recomputed blocks, one of them called twice, hidden states returned, loss over shifted labels."""

    def __init__(self, n=2):
        super().__init__()
        self.embed, self.layers, self.norm = nn.Embedding(V, D, padding_idx=0), nn.ModuleList(Block() for _ in range(n)), nn.LayerNorm(D)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, mask, labels):
        x, hidden = self.embed(ids), []
        for layer in (*self.layers, self.layers[0]):
            x = checkpoint(layer, x, mask, use_reentrant=False)
            hidden.append(x)
        logits = self.head(self.norm(x))
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100)
        return {"loss": loss, "logits": logits, "hidden": tuple(hidden)}


class Clip(torch.autograd.Function):
    """Identity whose gradient is clipped."""

    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-ctx.limit, ctx.limit), None


class Mixed(nn.Module):
    """An autograd.Function, detached targets, a stop-gradient branch, an unused parameter, an einsum, a scan of statistics."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(3, 3)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        y = Clip.apply(self.a(x), 0.01)
        with torch.no_grad():
            target = F.normalize(self.b(x), dim=-1)
        similarity = torch.einsum("btd,bsd->bts", F.normalize(y, dim=-1), target) * self.gain.exp()
        z = torch.where(similarity > 0, similarity, 0.1 * similarity)
        high = z.max(-1).values.detach()
        return torch.logsumexp(z - high[..., None], -1) + high, z.tril().sum((1, 2)), (y.std(1) * target.mean(1)).prod(-1)


class Unit(nn.Module):
    def __init__(self, d=12):
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.register_buffer("seen", torch.zeros(d))

    def forward(self, x):
        with torch.no_grad():
            self.seen.add_(x.mean((0, 1)))
        return x + self.down(F.gelu(self.up(x))) - self.seen


class Tied(nn.Module):
    """Weights tied between layers and to the head, a layer in the list twice, a buffer written at each call."""

    def __init__(self, d=12):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Unit(d) for _ in range(4)), nn.Linear(2 * d, d, bias=False)
        self.layers[2].up.weight, self.layers[1].down.weight = self.layers[0].up.weight, self.head.weight
        self.layers[3] = self.layers[0]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x, self.head(torch.cat([x, x], -1))


def table() -> dict:
    """name -> (class, options, arguments)."""
    torch.manual_seed(0)
    x, ids = torch.randn(B, T, D), torch.randint(1, V, (B, T))
    mask = torch.arange(T) < torch.tensor([12, 9, 12, 5])[:, None]
    labels = ids.masked_fill(~mask, -100)
    return {
        "grouped": (Grouped, {}, {"x": x, "mask": mask}),
        "grouped_native": (Grouped, {"native": True}, {"x": x}),
        "adapters": (Adapters, {}, {"ids": ids, "labels": labels}),
        "losses": (Losses, {}, {"x": x, "target": torch.randn(B, T, D), "labels": labels}),
        "experts": (Experts, {}, {"x": x}),
        "vision": (Vision, {}, {"x": torch.randn(B, 4, 12, 12)}),
        "in_place": (InPlace, {}, {"x": x, "mask": mask}),
        "recurrent": (Recurrent, {}, {"x": x}),
        "windows": (Windows, {}, {"x": torch.randn(B, 6, 6, 12)}),
        "decoder": (Decoder, {}, {"ids": ids, "mask": mask, "labels": labels}),
        "mixed": (Mixed, {}, {"x": x}),
        "tied": (Tied, {}, {"x": torch.randn(B, 6, 12)}),
    }


HF = ("gpt2", "llama", "bert", "t5", "swin", "mixtral")
NAMES = (*small_models.NAMES, *table(), *HF)


def build(name: str) -> tuple[nn.Module, dict]:
    """(module in training mode, forward arguments), in float64 but for mixtral, whose grouped products have no kernel for it."""
    if name in HF:
        import models  # benchmarks/models.py

        return models.build(name, torch.float32 if name == "mixtral" else torch.float64)
    if name in small_models.NAMES:
        module, args = small_models.inputs(name)
    else:
        cls, options, args = table()[name]
        torch.manual_seed(0)
        module = cls(**options).train()
    return module.double(), {k: v.double() if v.is_floating_point() else v for k, v in args.items()}
