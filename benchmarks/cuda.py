"""On a CUDA device: one-rank generated code against the module itself, in step time, peak memory and results.

    python benchmarks/cuda.py [--json]
Llama-like models, a small one (launches dominate) and one of 0.5 billion parameters in bfloat16; wall seconds after a
synchronize, the two taking turns, medians of per-round ratios. Then a training step of every model of models.py.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.utils._pytree as pytree
from common import Figure, parser, report
from llama import Config, Llama
from models import ZOO, build
from step import make_step

import autopar

SHAPES = {
    "small": (Config(layers=4, hidden=128, ffn=384), (8, 128), torch.float32),
    "large": (Config(layers=8, hidden=2048, heads=16, kv_heads=4, ffn=5632, vocab=32000), (4, 2048), torch.bfloat16),
}


def made(module: torch.nn.Module, args: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as tmp:
        compute = autopar.ComputeConfig(constant_folding=True)
        return autopar.parallelize(module, args, "dp", compute, gen_savedir=tmp, reuse="override")


def timed(step: Callable[[], float], each: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(each):
        step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(step: Callable[[], float]) -> int:
    """Bytes allocated at most in a step beyond what is there before it: contestants share the device."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def against_eager(name: str, rounds: int, each: int) -> list[Figure]:
    config, (batch, seq), dtype = SHAPES[name]
    torch.manual_seed(0)
    eager = Llama(config).to(dtype)
    ids = torch.randint(0, config.vocab, (batch, seq + 1), generator=torch.Generator().manual_seed(1))
    args = dict(ids=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous())
    generated = made(eager, args)
    args = {k: v.cuda() for k, v in args.items()}
    steps = {"generated": make_step(generated, args), "eager": make_step(eager.cuda(), args)}
    losses = {k: [step() for _ in range(3)] for k, step in steps.items()}
    assert max(abs(a - b) for a, b in zip(*losses.values(), strict=True)) < (1e-4 if dtype is torch.float32 else 2e-2), losses
    ratios = []
    for _ in range(rounds):
        took = {k: timed(step, each) for k, step in steps.items()}
        ratios.append(took["generated"] / took["eager"])
    memory = {k: peak(step) for k, step in steps.items()}
    return [
        Figure(f"cuda_step_vs_eager_{name}", median(ratios), "ratio", "the module itself, eager", 1.02),
        Figure(f"cuda_memory_vs_eager_{name}", memory["generated"] / memory["eager"], "ratio", "peak of a step, eager", 1.02),
    ]


def worst(name: str, dtype: torch.dtype) -> float:
    """The largest difference of outputs and gradients of a step, relative to the largest entry of each tensor."""
    module, args = build(name, dtype)
    for m in module.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    module.eval()
    eager = copy.deepcopy(module).cuda()
    results = []
    generated = made(module, args)
    args = pytree.tree_map(lambda t: t.cuda() if isinstance(t, torch.Tensor) else t, args)
    for model in (eager, generated):
        out = [t for t in pytree.tree_leaves(dict(model(**args))) if isinstance(t, torch.Tensor)]
        sum(t.sum() for t in out if t.requires_grad).backward()
        results.append(out)
    pairs = list(zip(*results, strict=True))
    aliases = generated.named_aliases()
    for n, p in eager.named_parameters():
        if p.grad is not None:
            pairs.append((p.grad, generated.get_parameter(aliases.get(n, n)).grad))
    with torch.no_grad():
        return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs if a.is_floating_point())


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=11)
    args = options.parse_args()
    assert torch.cuda.is_available(), "needs a CUDA device"
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    figures = []
    for name, each in (("small", 10), ("large", 4)):
        figures += against_eager(name, args.rounds, each)
        gc.collect()
    report(figures, args.json)
    for name in ZOO:
        try:
            print(f"{name:<20} {worst(name, torch.float64):.1e} float64", flush=True)
        except RuntimeError:  # an op without a float64 kernel
            print(f"{name:<20} {worst(name, torch.float32):.1e} float32", flush=True)


if __name__ == "__main__":
    main()
