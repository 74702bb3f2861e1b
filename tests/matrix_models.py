"""The models of the training matrix, and what each step trains them on.
Must not import autopar.

NB: every comparison is relative, in float32, so no parameter may be small against its own update: biases begin with random values, not at
zero, where a gradient that is nothing but rounding (of the bias of keys in attention) would be all there is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

B, T, D, V = 4, 6, 16, 32


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, 2 * D, bias=False), nn.Linear(2 * D, D)
        self.norm, self.unused = nn.LayerNorm(D), nn.Parameter(torch.randn(D))

    def forward(self, sample):
        y = self.down(F.gelu(self.mid(torch.tanh(self.up(self.norm(sample["x"]))))))
        return F.mse_loss(y, sample["y"]), y


class Layer(nn.Module):
    def __init__(self, p, heads=4):
        super().__init__()
        self.n1, self.qkv, self.out, self.n2 = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D), nn.LayerNorm(D)
        self.up, self.down, self.heads, self.p = nn.Linear(D, 2 * D), nn.Linear(2 * D, D), heads, p

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (y.view(b, t, self.heads, d // self.heads).transpose(1, 2) for y in self.qkv(self.n1(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0, is_causal=True)
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(b, t, d)), self.p, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.n2(x)))), self.p, self.training)


class GPT(nn.Module):
    """The head is the embedding. With dropout, it draws random numbers in the stem, in attention and in both branches of a layer."""

    def __init__(self, p=0.0):
        super().__init__()
        self.embed, self.pos, self.drop = nn.Embedding(V, D), nn.Parameter(torch.randn(T, D)), nn.Dropout(p)
        self.layers, self.norm, self.head = nn.ModuleList(Layer(p) for _ in range(2)), nn.LayerNorm(D), nn.Linear(D, V, bias=False)
        nn.init.normal_(self.embed.weight, std=0.5)
        self.head.weight = self.embed.weight

    def forward(self, sample):
        x = self.drop(self.embed(sample["ids"]) + self.pos)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), sample["labels"].flatten())


class Llama(nn.Module):
    """Hugging Face's, two heads of queries to each of keys."""

    def __init__(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.lm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=V, hidden_size=D, intermediate_size=2 * D, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=2 * T, initializer_range=0.2,
            )
        )  # fmt: skip

    def forward(self, sample):
        return self.lm(input_ids=sample["ids"], labels=sample["labels"], use_cache=False).loss


class Bert(nn.Module):
    """Hugging Face's, dropout off, the rows padded to different lengths."""

    def __init__(self):
        from transformers import BertConfig, BertForMaskedLM

        super().__init__()
        self.lm = BertForMaskedLM(
            BertConfig(
                vocab_size=V, hidden_size=D, intermediate_size=2 * D, num_hidden_layers=1, num_attention_heads=4, initializer_range=0.2,
                max_position_embeddings=2 * T, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip

    def forward(self, sample):
        return self.lm(input_ids=sample["ids"], attention_mask=sample["mask"], labels=sample["masked"]).loss


class Conv(nn.Module):
    """The first convolution and its norm are frozen; the last norm takes its statistics from the batch, and keeps running ones."""

    def __init__(self):
        super().__init__()
        self.stem, self.n1 = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.c2, self.n2, self.c3, self.n3 = (
            nn.Conv2d(8, 8, 3, padding=1),
            nn.GroupNorm(4, 8),
            nn.Conv2d(8, 8, 1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Linear(8, 8)
        for p in (*self.stem.parameters(), *self.n1.parameters()):
            p.requires_grad_(False)

    def forward(self, sample):
        x = F.relu(self.n1(self.stem(sample["image"])))
        x = x + F.gelu(self.n2(self.c2(x)))
        x = F.avg_pool2d(x, 2) + torch.tanh(self.n3(self.c3(F.max_pool2d(x, 2))))
        return F.cross_entropy(self.head(x.mean((2, 3))), sample["label"])


class Part(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.norm, self.up, self.down, self.scale = nn.LayerNorm(D), nn.Linear(D, h), nn.Linear(h, D), nn.Parameter(torch.ones(D))

    def forward(self, x):
        return x + self.scale * self.down(F.gelu(self.up(self.norm(x))))


class Mixed(nn.Module):
    """An ordinary module: `a` and `b` are made parallel, what is around and between them is not; `b` is called twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.a, self.mid, self.b, self.head = nn.Embedding(V, D), Part(2 * D), nn.Linear(D, D), Part(3 * D), nn.Linear(D, V)
        self.frozen = nn.Parameter(torch.rand(D) + 0.5, requires_grad=False)

    def forward(self, sample):
        x = self.a(self.embed(sample["ids"])) * self.frozen
        x = self.b(self.b(torch.tanh(self.mid(x))))
        return F.cross_entropy(self.head(x).flatten(0, 1), sample["labels"].flatten())


MODELS = {"mlp": MLP, "gpt": GPT, "llama": Llama, "bert": Bert, "conv": Conv, "mixed": Mixed, "dropout": lambda: GPT(0.1)}
PARTS = {"mixed": ("a", "b")}  # what is made parallel, where that is not the whole model
_KEYS = {"mlp": ("x", "y"), "bert": ("ids", "mask", "masked"), "conv": ("image", "label")}


@cache
def _state(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.dim() == 1 and n != "unused":
                p.add_(torch.randn_like(p) / 4)
    return model.state_dict()


def original(name: str) -> nn.Module:
    """The model with its initial weights, in training mode. Leaves the random state alone."""
    with torch.random.fork_rng():
        model = MODELS[name]()
    model.load_state_dict(_state(name))
    return model.train()


def sample(name: str, step: int, index: int) -> dict[str, torch.Tensor]:
    """Micro batch `index` of the step."""
    g = torch.Generator().manual_seed(1000 * step + index + 1)
    ids = torch.randint(1, V, (B, T), generator=g)
    mask = torch.arange(T) < torch.randint(2, T, (B, 1), generator=g)
    everything = {
        "x": torch.randn(B, T, D, generator=g),
        "y": 8 * torch.randn(B, T, D, generator=g),
        "ids": ids,
        "labels": torch.randint(0, V, (B, T), generator=g),
        "mask": mask.long(),
        "masked": ids.masked_fill(~mask, -100),
        "image": torch.randn(B, 4, 6, 6, generator=g),
        "label": torch.randint(0, 8, (B,), generator=g),
    }
    return {k: everything[k] for k in _KEYS.get(name, ("ids", "labels"))}


def dummy(name: str, part: str = "") -> dict[str, Any]:
    """Arguments of the forward of the model, or of a part of it."""
    return {"x": torch.zeros(B, T, D)} if part else {"sample": sample(name, 0, 0)}


def options(name: str) -> dict[str, Any] | None:
    """The second group of AdamW: what has one dim."""
    one_dim = "norm" in name.lower() or name.split(".")[-1] in ("bias", "scale") or ".n" in name or name.startswith("n")
    return {"weight_decay": 0.0, "lr": 0.01} if one_dim else None
