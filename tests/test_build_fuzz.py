"""Random programs of views, in-place writes, buffers and nested, shared, checkpointed modules: build against eager."""

from __future__ import annotations

import random

import pytest
import torch
from test_build_models import prove, x
from torch import nn
from torch.utils.checkpoint import checkpoint

STEPS = (
    "mul",
    "relu",
    "linear",
    "view",
    "half",
    "clone",
    "add_",
    "scale_",
    "set",
    "buffer",
    "state",
    "call",
    "ckpt",
    "dropout",
    "replace",
    "all",
)
WEIGHTS = (3, 2, 3, 3, 2, 2, 3, 2, 2, 1, 1, 2, 1, 1, 1, 6)


class Program(nn.Module):
    """Runs `steps`: (name, operand positions, random numbers) on a growing list of 2-d tensors with 8 columns."""

    def __init__(self, steps, children):
        super().__init__()
        self.steps, self.parts, self.fc = steps, nn.ModuleList(children), nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(8))
        self.register_buffer("last", torch.ones(8))

        # NB: how often a checkpoint repeats a write to a buffer depends on which tensors the backward pass asks for.
        self.state = any(s[0] in ("buffer", "replace") for s in steps) or any(c.state for c in children)

    def part(self, k, recompute, *args):
        part = self.parts[k % len(self.parts)]
        return checkpoint(part, *args, use_reentrant=False) if recompute and not part.state else part(*args)

    def forward(self, a, b):
        pool = [a, b]
        for name, i, j, r in self.steps:
            u, v = pool[i % len(pool)], pool[j % len(pool)]
            w = v[: u.shape[0]] if v.shape[0] >= u.shape[0] else v.mean(0)
            if name == "mul":
                pool.append(u * w)
            elif name == "relu":
                pool.append(torch.relu(u))
            elif name == "linear":
                pool.append(self.fc(u))
            elif name == "view":
                pool.append(u.view(-1).view(u.shape))
            elif name == "half":
                pool.append(u[: max(1, u.shape[0] // 2)])
            elif name == "clone":
                pool.append(u.clone())
            elif name == "add_":
                u.add_(w * 0.1)
            elif name == "scale_":
                u *= 0.5
            elif name == "set":
                u[0] = w.reshape(-1, 8)[0].tanh()
            elif name == "buffer":
                self.count += u.detach().mean(0)
            elif name == "state":
                pool.append(u + self.count * self.last)
            elif name == "replace":
                self.last = u.detach().mean(0)
            elif name == "dropout":
                pool.append(nn.functional.dropout(u, 0.3))
            elif name == "all":
                for k in range(len(self.parts)):
                    u = self.part(k, (r + k) % 9 == 8, u, v)
                pool.append(u)
            elif self.parts:
                pool.append(self.part(r, name == "ckpt", u, v))
        return sum(t.mean(0, keepdim=True) for t in pool[-3:]) + pool[-1]


def program(rng, depth=0):
    # NB: equal children are what makes blocks; unequal ones what takes them apart.
    children, n = [], rng.choice((0, 2, 3) if depth else (2, 3, 4)) if depth < 2 else 0
    if n:
        state = rng.getstate()
        for _ in range(n):
            if rng.random() < 0.8:
                rng.setstate(state)
            children.append(program(rng, depth + 1))
    names = rng.choices(STEPS, WEIGHTS, k=rng.randint(4, 9))
    return Program([(s, rng.randrange(6), rng.randrange(6), rng.randrange(9)) for s in names], children)


def works(seed):
    """The module of a seed and its inputs, None if eager PyTorch refuses it."""
    torch.manual_seed(seed)
    module = program(random.Random(seed))
    inputs = {"a": x(4, 8), "b": x(6, 8)}
    try:
        outs = program(random.Random(seed))(inputs["a"].requires_grad_() * 1, inputs["b"].requires_grad_() * 1)
        outs.sum().backward()
    except RuntimeError:
        return None
    return module, {k: v.detach() for k, v in inputs.items()}


def run(seeds):
    tried = 0
    for seed in seeds:
        if (made := works(seed)) is not None:
            tried += 1
            try:
                # NB: views written in place get their backward when next used, which dead ops do: sums may be in another order.
                prove(*made, rounding=1e-5)
            except Exception as e:
                e.add_note(f"seed {seed}")
                raise
    return tried


def test_random_programs():
    assert run(range(40)) > 10


@pytest.mark.slow
def test_many_random_programs():
    assert run(range(1000, 2000)) > 300
