"""Small modules whose Python code looks at self.training, one way each.
Must not know the compiler.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def drop_path(x, p: float, training: bool):
    if p == 0.0 or not training:
        return x
    keep = 1 - p
    mask = x.new_empty((x.shape[0], 1)).bernoulli_(keep)
    return x * mask / keep


class DropPath(nn.Module):
    def __init__(self, p: float = 0.5):
        super().__init__()
        self.p = p

    def forward(self, x):
        return drop_path(x, self.p, self.training)


class Base(nn.Module):
    """A linear layer for the others to use."""

    def __init__(self):
        super().__init__()
        self.lin, self.head, self.p = nn.Linear(8, 8), nn.Linear(8, 8), 0.25


class StochasticDepth(Base):
    """Rates grow with depth; the first is 0."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(8, 8), DropPath(p)]) for p in (0.0, 0.25, 0.5))

    def forward(self, x):
        for linear, drop in self.layers:
            x = x + drop(F.gelu(linear(x)))
        return x


class Noise(Base):
    """Gaussian noise on activations, added by the module itself."""

    def forward(self, x):
        x = self.lin(x)
        if self.training:
            x = x + torch.randn_like(x) * 0.1
        return self.head(x)


class NoiseLayer(Base):
    """The same in a module of its own, in the middle of another."""

    class Add(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x) * 0.1 if self.training else x

    def __init__(self):
        super().__init__()
        self.noise = self.Add()

    def forward(self, x):
        return self.head(self.noise(self.lin(x)))


class NoiseBetweenOps(Base):
    """The same between functions."""

    def forward(self, x):
        x = F.gelu(x)
        if self.training:
            x = x + torch.randn_like(x) * 0.1
        x = F.relu(x)
        return F.linear(x, self.lin.weight)


class AuxiliaryLoss(Base):
    """The loss has another term in training; the value without it exists too."""

    def forward(self, x):
        y = self.lin(x)
        loss = y.square().mean()
        if self.training:
            loss = loss + 0.1 * self.head(y).square().mean()
        return loss


class TrainingOutput(Base):
    """Training returns more than eval."""

    def forward(self, x):
        y = self.lin(x)
        if self.training:
            return y, self.head(y)
        return y


class EvalBranch(Base):
    """Eval computes what training does not."""

    def forward(self, x):
        y = self.lin(x)
        if not self.training:
            y = y.softmax(-1)
        return y


class Frozen(Base):
    """Batch norm and dropout, of which a part stays in eval mode."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Sequential(nn.BatchNorm1d(8), DropPath(), nn.Dropout(0.5)).eval()
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.frozen(self.lin(x)))))


class Handed(Base):
    """The flag goes straight into torch functions."""

    def forward(self, x):
        x = F.dropout(self.lin(x), p=self.p, training=self.training)
        return self.head(F.dropout(x, self.p, self.training))


class Attention(Base):
    """The ways in which attention modules are told their dropout."""

    def __init__(self, p: float = 0.25):
        super().__init__()
        self.p = p

    def forward(self, x):
        q = self.lin(x).view(-1, 2, 2, 4).transpose(1, 2)
        dropout = self.p if self.training else 0.0
        a = F.scaled_dot_product_attention(q, q, q, dropout_p=dropout)
        b = attend(q, dropout=0.0 if not self.training else self.p, module=self)
        return self.head((a + b).transpose(1, 2).reshape(x.shape))


def attend(q, dropout, module):
    weights = F.dropout((q @ q.mT).softmax(-1), p=dropout, training=module.training)
    return weights @ q


class Always(Base):
    """Dropout in both modes, which no source line tells."""

    def forward(self, x):
        q = self.lin(x).view(-1, 2, 2, 4)
        return self.head(F.scaled_dot_product_attention(q, q, q, dropout_p=self.p).reshape(x.shape))


class Checkpointed(Base):
    """Recomputed in training only."""

    recompute = True

    def forward(self, x):
        if self.recompute and self.training:
            x = checkpoint(self.lin, x, use_reentrant=False)
        else:
            x = self.lin(x)
        return self.head(x)


class LayerDrop(Base):
    """A draw decides about a layer in training only; here the rate is 0 and nothing is decided."""

    rate = 0.0

    def forward(self, x):
        if self.training and torch.rand([]) < self.rate:
            return x
        return self.head(self.lin(x))


class Counter(Base):
    """A buffer that changes in training only."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        x = self.lin(x)
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.1)
        return self.head(x - self.mean)


class Switches(Base):
    """Changes the mode of a part while it runs, and compares the flag in ways a flag object would not survive."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        assert self.training is True or self.training is False
        assert isinstance(self.training, bool) and {True: 1, False: 0}[self.training] == int(self.training)
        self.drop.eval()
        x = self.drop(self.lin(x))
        self.drop.train(self.training)
        return self.head(torch.dropout(x, 0.5, self.training))


class InPlace(Base):
    """What eval returns unchanged is then written in place."""

    def __init__(self):
        super().__init__()
        self.drop = DropPath()

    def forward(self, x):
        y = self.drop(self.lin(x))
        y += 1
        return self.head(y)
