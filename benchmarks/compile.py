"""Compile time and memory: Llama-3 405B shapes over tp=8, growth with depth, and tracing against torch.export.

    python benchmarks/compile.py [--json]
Each measurement runs in a process of its own on one thread; times are CPU seconds, medians over interleaved repeats.
"""

from __future__ import annotations

import json
import sys
from statistics import median
from typing import Any

from common import Figure, cpu_seconds, fresh, parser, peak_mb, report

SEQ = 8192


def model_405b(kind: str, layers: int) -> tuple[Any, dict[str, Any]]:
    """Llama-3 405B shapes on the meta device: 'own' (benchmarks/llama.py) or 'hf' (transformers)."""
    import torch

    ids = torch.zeros(1, SEQ, dtype=torch.long)
    with torch.device("meta"):
        if kind == "own":
            from dataclasses import replace

            from llama import LLAMA_405B, Llama

            return Llama(replace(LLAMA_405B, layers=layers)).to(torch.bfloat16), dict(ids=ids, labels=ids)
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            num_hidden_layers=layers, hidden_size=16384, num_attention_heads=128, num_key_value_heads=8, intermediate_size=53248,
            vocab_size=128256, max_position_embeddings=131072, use_cache=False,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(torch.bfloat16), dict(input_ids=ids, labels=ids)


def compile_once(kind: str, layers: int) -> dict[str, Any]:
    """Compile in this process; CPU seconds per stage and peak memory."""
    from autopar.codegen.emit import emit
    from autopar.config import ComputeConfig
    from autopar.driver import make_plan
    from autopar.lower.check import check
    from autopar.lower.lower import lower
    from autopar.trace import trace

    model, args = model_405b(kind, layers)
    stages = {}
    stages["trace"], graph = cpu_seconds(lambda: trace(model, args, strategy="meta", constant_folding=True))
    stages["policy"], plan = cpu_seconds(lambda: make_plan(graph, "tp", ComputeConfig(plan_ngpus=8)))
    stages["lower"], program = cpu_seconds(lambda: lower(graph, plan))
    stages["check"], _ = cpu_seconds(lambda: check(graph, program))
    stages["emit"], texts = cpu_seconds(lambda: emit(graph, program))
    return {**stages, "rss": peak_mb(), "lines": len(texts["model.py"].splitlines())}


def trace_only(kind: str, layers: int, how: str) -> dict[str, Any]:
    """CPU seconds of tracing alone, by autopar or by torch.export non-strict."""
    import torch

    model, args = model_405b(kind, layers)
    if how == "export":
        meta = {k: v.to("meta") for k, v in args.items()}
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True):
            seconds, _ = cpu_seconds(lambda: torch.export.export(model, (), meta, strict=False))
    else:
        from autopar.trace import trace

        seconds, _ = cpu_seconds(lambda: trace(model, args, strategy="meta", constant_folding=True))
    return {"seconds": seconds}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--child", nargs="*", help=argparse_hidden())
    args = options.parse_args()
    if args.child:
        job, kind, layers, *rest = args.child
        job = compile_once if job == "compile" else trace_only
        print(json.dumps(job(kind, int(layers), *rest)))
        return
    figures = []
    for kind, label in (("own", "plain PyTorch Llama"), ("hf", "Hugging Face Llama")):
        deep, shallow, ours, export = [], [], [], []
        for _ in range(args.repeats):  # interleaved: the machine is shared
            deep.append(fresh(__file__, "--child", "compile", kind, "126"))
            shallow.append(fresh(__file__, "--child", "compile", kind, "16"))
            ours.append(fresh(__file__, "--child", "trace", kind, "16", "autopar")["seconds"])
            export.append(fresh(__file__, "--child", "trace", kind, "16", "export")["seconds"])
        stages = ("trace", "policy", "lower", "check", "emit")
        after = [median(sum(r[s] for s in stages[1:]) for r in runs) for runs in (deep, shallow)]
        if not args.json:
            rows = " ".join(f"{s} {median(r[s] for r in deep):.2f}" for s in stages)
            print(f"{label}, 126 layers, CPU seconds: {rows}; {deep[0]['lines']} generated lines")
        suffix = "" if kind == "own" else "_hf"
        total = median(sum(r[s] for s in stages) for r in deep)
        figures += [
            Figure(f"compile_405b_cpu_s{suffix}", total, "s", label, 15),
            Figure(f"compile_405b_rss_mb{suffix}", max(r["rss"] for r in deep), "MB", label, 1024),
            Figure(f"after_trace_growth{suffix}", after[0] / after[1], "ratio", f"{label}, 126 against 16 layers", 1.5),
            Figure(f"trace_vs_export{suffix}", median(ours) / median(export), "ratio", f"torch.export non-strict, {label} x 16", 0.35),
        ]
    report(figures, args.json)


def argparse_hidden() -> str:
    import argparse

    return argparse.SUPPRESS


if __name__ == "__main__":
    sys.exit(main())
