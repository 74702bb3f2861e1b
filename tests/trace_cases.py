"""Small modules with one feature each, and the comparison of their recordings with eager.
Must not know the tracer's insides; a recording is judged by replaying it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import namedtuple
from typing import Any

import torch
import torch.nn.functional as F
from replay import replay
from torch import nn
from torch.utils.checkpoint import checkpoint

from autopar.trace.recording import RecordedGuard, RecordedOp, Recording

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
MODES = [("meta", False), ("meta", True), ("cpu", False), ("cpu", True), ("reuse_cache", False)]

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Result:
    loss: torch.Tensor
    extra: Any = None


class Square(torch.autograd.Function):
    """Has a gradient of its own: three times the true one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 6 * x * g


square_early = Square.apply


def per_row(x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
    """Uses vmap, so the tracer cannot look inside."""
    return torch.vmap(lambda r: r * r.sum())(x) * scale


@torch.library.custom_op("trace_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


twice.register_autograd(lambda ctx, g: g * 2)


class Base(nn.Module):
    """A linear layer for the others to use."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mask", torch.arange(6) % 2 == 0, persistent=False)
        self.register_buffer("state", torch.ones(6))
        self.extra = torch.linspace(0, 1, 6)  # a plain attribute


def module(body: Any) -> type[Base]:
    """A module class from its forward."""
    return type(body.__name__, (Base,), {"forward": body})


CASES: list[type[Base]] = []


def case(body: Any) -> Any:
    CASES.append(module(body))
    return body


@case
def plain(self, x):
    return F.gelu(self.lin(x)).sum()


@case
def views_and_sizes(self, x):
    b, n = x.shape
    y = self.lin(x).view(b, 2, n // 2).transpose(1, 2).contiguous()
    y = y.reshape(b, -1, x.size(-1) // 3) / max(b, 2)
    return y.flatten().mean() * y.numel() + len(x)


@case
def getters(self, x):
    y = self.lin(x).T
    return (y.mT @ y.data).sum() + y.H.real.sum()


@case
def inplace(self, x):
    y = self.lin(x)
    z = y.view(-1)
    y = y.clone()
    y += 1
    y[:, 0] = 0
    y[1].mul_(3)
    w = y[2]
    y.add_(x, alpha=2)
    return (y * w).sum() + z.sum()


@case
def shifted(self, ids):
    out = ids.new_zeros(ids.shape)
    out[:, 1:] = ids[:, :-1].clone()
    out[:, 0] = 2
    return self.lin(out).sum()


@case
def fake_into_zeros(self, x):
    y = torch.zeros(x.shape[0], 6)
    for i in range(2):
        y[:, i] = self.lin(x)[:, i]
    v = y[0]
    return (y * y).sum() + v.sum()


@case
def out_argument(self, x):
    with torch.no_grad():
        out = torch.empty_like(x)
        torch.add(x, 1, out=out)
    return self.lin(out).sum()


@case
def data_and_detach(self, x):
    y = self.lin(x)
    return (y * y.detach() + y.data).sum()


@case
def contexts(self, x):
    with torch.no_grad():
        s = self.lin(x).softmax(-1)
        with torch.enable_grad():
            t = self.lin(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = self.lin(x)
        with torch.autocast("cpu", enabled=False):
            z = self.lin(x)
    return (s * t + y.float() * z).sum()


@case
def inference(self, x):
    with torch.no_grad():
        y = self.lin(x).exp()
        y.mul_(2)
    return (self.lin(x) * y).sum()


@case
def functions(self, x):
    return (Square.apply(self.lin(x)) + square_early(x) + twice(self.lin(x)) + torch.ops.aten.neg(x)).sum()


@case
def buffers(self, x):
    self.count += 1
    self.state = self.state * 0.5 + x.mean(0).detach()
    return (self.lin(x) * self.state).sum() * self.count


@case
def unregistered(self, x):
    return (self.lin(x) * self.extra + torch.tensor([1.0, 2, 3, 4, 5, 6])).sum()


@case
def masks(self, x):
    y = self.lin(x).masked_fill(self.mask, -1.0)
    if bool(self.mask.all()):
        y = y * 100
    return torch.where(self.mask, y, y.exp()).sum() + y[:, self.mask.nonzero(as_tuple=True)[0]].sum()


@case
def checkpointed(self, x):
    f = lambda a: F.dropout(self.lin(a).tanh(), 0.3)  # noqa: E731
    y = checkpoint(f, self.lin(x), use_reentrant=False)
    return checkpoint(f, y, use_reentrant=True).sum()


@case
def random_ops(self, x):
    y = F.dropout(self.lin(x), 0.5, self.training)
    return (y * torch.rand_like(y) + torch.randn(x.shape[0], 6)).sum()


@case
def containers(self, x):
    parts = torch.split(self.lin(x), [2, 4], dim=1)
    top = x.topk(2, dim=-1)
    q, k, v = self.lin(x).chunk(3, dim=-1)
    return sum(p.sum() for p in parts) + top.values.sum() + (q * k + v).sum() + torch.cat([*parts], 1).sum()


@case
def iteration(self, x):
    return sum(row.sum() * i for i, row in enumerate(self.lin(x)[:3]))


@case
def same_tensor(self, x):
    y = self.lin(x)
    return (y.contiguous() + y.float() + y.to(x.device) + y.expand(x.shape[0], 6) + F.dropout(y, 0.5, False)).sum()


@case
def requires(self, x):
    y = x.clone().requires_grad_()
    (g,) = torch.autograd.grad((y * y).sum(), y)
    return (self.lin(x) * g.detach()).sum()


@case
def unwritten_alias(self, x):
    y = self.lin(x).detach()
    z = y.view(2, -1)
    y.zero_()
    return self.lin(z.reshape(-1, 6)[:1]).sum()


@case
def swallowed(self, x):
    y = self.lin(x)
    return y.square().sum() if y.requires_grad else y.sum()


def outcome(m: nn.Module, call: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    m.zero_grad()
    loss = call()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in m.named_parameters()}, {n: b.clone() for n, b in m.named_buffers()}


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def check(m: nn.Module, recording: Recording, given: dict[str, Any]) -> None:
    a, b = copy.deepcopy(m), copy.deepcopy(m)
    assert_same(outcome(a, lambda: a(**copy.deepcopy(given))), outcome(b, lambda: replay(recording, b, copy.deepcopy(given))))


def ops(recording: Recording, ending: str) -> list[RecordedOp]:
    return [e for e in recording.events if isinstance(e, RecordedOp) and e.fn.endswith(ending)]


def guards(recording: Recording) -> list[RecordedGuard]:
    return [e for e in recording.events if isinstance(e, RecordedGuard)]
