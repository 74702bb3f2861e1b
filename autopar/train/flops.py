"""Flops of a training step: from the graphs of parallel modules, by the formula outside of them; and the peaks of known devices.
Must not know time, loops or loggers.

Definition: 6 x parameters in matrix products + 6 x layers x heads x (query/key + value head dims) x sequence length per token. That is
three times the matrix products of the traced forward; recomputed blocks count once, attention counts whole where it is causal too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autopar.ir.codec import load_graph
from autopar.ir.graph import Block, Graph, Op, op_outputs, refs
from autopar.rules import recipe_of
from autopar.runtime import ParallelModule

# Datasheet peaks in TFLOP/s: half precision with fp32 accumulation, dense. The first whose words are in the device's name counts.
PEAKS = {
    "B200": 2250.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 150.0,
    "A10": 125.0,
    "V100 PCIE": 112.0,
    "V100": 125.0,
    "T4": 65.0,
    "MI300X": 1307.0,
}


def peak_tflops(device_name: str) -> float | None:
    """The datasheet peak of a device by the name torch.cuda.get_device_name gives; None for one that is not in the table."""
    words = device_name.replace("-", " ").split()
    if "MIG" in words:  # a slice of a device
        return None
    for name, peak in PEAKS.items():
        want = name.split()
        if any(words[i : i + len(want)] == want for i in range(len(words))):
            return peak
    return None


def flops_per_token(matmul_params: int, layers: int, heads: int, head_dims: int, seq: int) -> float:
    """The definition itself; head_dims: query/key plus value dims of one head."""
    return 6.0 * matmul_params + 6.0 * layers * heads * head_dims * seq


@dataclass(frozen=True)
class Work:
    """Flops of forward and backward per token and per sample; None where that is not known."""

    per_token: float | None
    per_sample: float | None

    def of(self, tokens: float | None, samples: float) -> float | None:
        """The flops of a step on so many tokens and samples."""
        if tokens is not None and self.per_token is not None:
            return self.per_token * tokens
        return None if self.per_sample is None else self.per_sample * samples


def work_of(model: nn.Module, sample: Any = None) -> Work:
    """The flops of a model. sample: a micro batch, from which the formula takes the length of sequences; unused where all is traced."""
    parts, outside, todo = [], 0, [model]
    while todo:
        m = todo.pop()
        if isinstance(m, ParallelModule):
            parts.append(_traced(m))
            continue
        if not isinstance(m, nn.Embedding):
            outside += sum(p.numel() for p in m.parameters(recurse=False) if p.dim() == 2)
        todo += m.children()
    if outside:
        # NB: the layers of a model that is parallel in part are in its graphs.
        layers, heads, head_dims = (0, 0, 0) if parts else _attention(model)
        length = _length(sample)
        per_token = flops_per_token(outside, layers, heads, head_dims, length or 0)
        parts.append(Work(None if length == 1 else per_token, per_token * length if length else None))
    if not parts:
        return Work(None, None)
    return Work(_sum(p.per_token for p in parts), _sum(p.per_sample for p in parts))


def _sum(numbers: Iterable[float | None]) -> float | None:
    known = list(numbers)
    return None if None in known else sum(known)


def trained_flops(graph: Graph) -> float:
    """Flops of forward and backward as traced. Products without a gradient (rotary tables) are not in the definition."""
    total = 0.0
    for block in graph.blocks.values():
        total += sum(_forward(block, op) for op in block.ops if isinstance(op, Op)) * max(1, len(block.instances))
    return 3.0 * total


def _forward(block: Block, op: Op) -> float:
    if not any(v.grad for v in op_outputs(block, op)):
        return 0.0
    recipe = recipe_of(block, op)
    return recipe.flops if recipe is not None and recipe.matmul else 0.0


def _traced(module: ParallelModule) -> Work:
    """By the graph beside the generated code. Its shapes are those of one micro batch of one scale unit."""
    file = getattr(sys.modules.get(type(module).__module__), "__file__", None)
    if file is None or not (Path(file).parent / "graph.json").exists():
        return Work(None, None)
    graph = load_graph(Path(file).parent)
    given = [graph.body.values[r.id] for a in graph.arguments for r in refs(a.tree)]
    shapes = [v.shape for v in given if v.is_tensor and v.shape]
    if not shapes:
        return Work(None, None)
    ids = [v.shape for v in given if v.is_tensor and len(v.shape) == 2 and v.dtype in ("int64", "int32")]
    batch, *rest = (ids or shapes)[0]
    sequences = bool(ids) or len(rest) == 2  # NB: a part of a model gets (batch, sequence, width)
    total = trained_flops(graph)
    return Work(total / (batch * rest[0]) if sequences and batch * rest[0] else None, total / batch if batch else None)


def _attention(model: nn.Module) -> tuple[int, int, int]:
    """(layers, heads, query/key plus value dims of a head), from a configuration as Hugging Face's models have it; else zeros."""
    config = getattr(model, "config", None)

    def read(*names: str) -> int:
        return next((n for name in names if isinstance(n := getattr(config, name, None), int)), 0)

    layers, heads = read("num_hidden_layers", "n_layer"), read("num_attention_heads", "n_head")
    return layers, heads, 2 * (read("head_dim") or (read("hidden_size", "n_embd") // heads if heads else 0))


def _length(sample: Any) -> int | None:
    """Of the sequences in a micro batch; 1 where its samples are plain rows."""
    ids = token_ids(sample)
    if ids is not None:
        return ids.shape[1]
    first = next(tensors(sample), None)
    return None if first is None or first.dim() > 3 else first.shape[1] if first.dim() == 3 else 1


def count_tokens(sample: Any) -> int | None:
    """The tokens of a micro batch: entries of its first integer tensor of two dims (batch, sequence); None if it has none."""
    ids = token_ids(sample)
    return None if ids is None else ids.numel()


def token_ids(sample: Any) -> Tensor | None:
    return next((t for t in tensors(sample) if t.dim() == 2 and t.dtype in (torch.int64, torch.int32)), None)


def tensors(sample: Any) -> Iterable[Tensor]:
    """All tensors of a sample, in order."""
    if isinstance(sample, Tensor):
        yield sample
    elif isinstance(sample, Mapping):
        for x in sample.values():
            yield from tensors(x)
    elif isinstance(sample, (tuple, list)):
        for x in sample:
            yield from tensors(x)
    elif hasattr(sample, "__dataclass_fields__"):
        for x in vars(sample).values():
            yield from tensors(x)
