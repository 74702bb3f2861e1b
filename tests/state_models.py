"""What the tests of state train: a tied language model with a frozen parameter, a batch per step, two groups of parameters.
Must not import autopar.
"""

from __future__ import annotations

import torch
from small_models import LM
from torch import nn


def lm():
    """Dropout off; tied weights, one frozen parameter, a fused projection that is sharded inside groups."""
    module = LM(n=1)
    module.layers[0].n1.bias.requires_grad_(False)
    return module.eval()


def batch(step):
    ids = torch.randint(0, 16, (4, 6), generator=torch.Generator().manual_seed(step))
    return {"ids": ids, "labels": ids}


def groups(name):
    return {"weight_decay": 0.3} if name.endswith("bias") or ".n" in name else None


class Mixed(nn.Module):
    """Ordinary modules around two that are parallelised."""

    def __init__(self, first, second):
        super().__init__()
        self.stem, self.first, self.norm, self.second = nn.Linear(8, 8), first, nn.BatchNorm1d(6), second

    @classmethod
    def of(cls, whole, first, second):
        """The stem and norm of another one around these."""
        made = cls(first, second)
        made.stem, made.norm = whole.stem, whole.norm
        return made

    def forward(self, x):
        return self.second(self.norm(self.first(self.stem(x))))
