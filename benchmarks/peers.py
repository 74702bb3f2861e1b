"""The peers of the step benchmark: Llama split by hand in Megatron style, and by PyTorch's DTensor `parallelize_module`.
Must not know autopar. Both split attention and MLP over two ranks and replicate the rest.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from llama import Llama
from torch import Tensor, nn

moved = {"bytes": 0}  # bytes put into collectives by the hand-written model


def _all_reduce(x: Tensor) -> Tensor:
    moved["bytes"] += x.numel() * x.element_size()
    dist.all_reduce(x)
    return x


class Enter(torch.autograd.Function):
    """Identity; its backward sums over the ranks (Megatron's f)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _all_reduce(grad.contiguous())


class Leave(torch.autograd.Function):
    """Sum over the ranks; its backward is the identity (Megatron's g)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _all_reduce(x.contiguous())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def _shard(linear: nn.Linear, dim: int, rank: int, size: int) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().chunk(size, dim)[rank].clone())


def handwritten(model: Llama, rank: int, size: int) -> Llama:
    """Shard a Llama in place, with Enter and Leave around attention and MLP."""

    def split(block: nn.Module, columns: tuple[nn.Linear, ...], row: nn.Linear) -> None:
        for linear in columns:
            _shard(linear, 0, rank, size)
        _shard(row, 1, rank, size)
        inner = block.forward
        block.forward = lambda x, *rest: Leave.apply(inner(Enter.apply(x), *rest))

    for layer in model.layers:
        a, m = layer.attention, layer.mlp
        split(a, (a.q, a.k, a.v), a.o)
        split(m, (m.gate, m.up), m.down)
    return model


def dtensor(model: Llama, size: int) -> Llama:
    """The same split through torch.distributed.tensor.parallel."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (size,))
    column, row = ColwiseParallel, RowwiseParallel
    plan = {
        **{f"attention.{n}": column() for n in "qkv"},
        "attention.o": row(),
        "mlp.gate": column(),
        "mlp.up": column(),
        "mlp.down": row(),
    }
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)
    return model
