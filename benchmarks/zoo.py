"""The zoo: 30 Hugging Face architectures compiled and verified by one harness, with no special cases.

    python benchmarks/zoo.py [--json] [--only llama,gpt2] [--seeds 3] [--jobs 2]
Columns: exact (generated one-rank code, loss and every gradient against eager, train mode with equal seeds and eval
mode); `tp` on 2 and 4 for each seed, `data` on 2, `data` x `tp` on a 2x2 mesh (all ranks in process, outputs and every
gradient, train and eval); share of matmul flops split under tp; ops without a rule. float64 (1e-12) where the model's
ops have float64 kernels, otherwise float32 (1e-5).
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

from common import Figure, parser, report

CHECKS = ("exact", "tp2", "tp4", "data2", "mesh2x2")


def one(name: str, seeds: int, verbose: bool) -> dict[str, Any]:
    """All columns of one architecture: 'ok', or the first line of the error."""
    import torch
    from models import build

    from autopar.config import ComputeConfig
    from autopar.driver import compile_module
    from autopar.pas.policies import data, mesh_policy, tp
    from autopar.trace import trace
    from autopar.verification import verify_compiled

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    started = time.process_time()
    model, args = build(name, torch.float64)
    dtype = torch.float64
    try:
        copy.deepcopy(model)(**args)
    except RuntimeError:  # an op without a float64 kernel
        dtype = torch.float32
        model, args = build(name, dtype)
    row: dict[str, Any] = {"name": name, "dtype": str(dtype).removeprefix("torch.")}

    def attempt(column: str, run: Any) -> None:
        try:
            row[column] = run()
        except Exception as e:
            if verbose:
                traceback.print_exc()
            row[column] = f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"[:300]

    graph = None

    def exact() -> str:
        nonlocal graph
        graph = trace(model, args)
        both = graph.branch is None  # otherwise the code refuses eval mode, and a second instance is compiled for that
        result = same_as_eager(model, args, compile_module(model, args, "dp", ComputeConfig(), graph=graph), (True, False)[: 1 + both])
        if result != "ok" or both:
            return result
        return same_as_eager(model, args, compile_module(copy.deepcopy(model).eval(), args, "dp", ComputeConfig()), (False,))

    attempt("exact", exact)
    if graph is None:
        return row | dict.fromkeys(CHECKS[1:], "not traced")
    row["unruled"] = unruled(graph)
    shares = []

    def parallel(policy: Any, ngpus: int, **pas: Any) -> str:
        config = ComputeConfig(plan_ngpus=ngpus, pas_config=pas)
        compiled = compile_module(model, args, policy, config, graph=graph)
        if policy == "tp":
            shares.append(split_share(graph, compiled.program))
        result = verify_compiled(model, args, compiled, config)
        return "ok" if result.ok else f"{sum(not d.ok for d in result.differences)} differ, worst {result.worst}"

    def every_seed(ngpus: int) -> str:
        results = [parallel("tp", ngpus, seed=s) for s in range(1, seeds + 1)]
        return next((r for r in results if r != "ok"), "ok")

    attempt("tp2", lambda: every_seed(2))
    attempt("tp4", lambda: every_seed(4))
    attempt("data2", lambda: parallel("data", 2))
    attempt("mesh2x2", lambda: parallel(mesh_policy({"dp": (2, data), "tp": (2, tp)}), 4))
    row["split"] = median(shares) if shares else 0.0
    row["seconds"] = time.process_time() - started
    return row


def same_as_eager(model: Any, args: dict[str, Any], compiled: Any, modes: tuple[bool, ...]) -> str:
    """Generated one-rank code against eager with equal seeds and torch's own random ops: bitwise or within 1e-12 relative."""
    import torch

    from autopar.codegen.load import load_module_class
    from autopar.runtime import rank_mesh

    weights = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    weights |= compiled.graph.constants
    generated = load_module_class(compiled.texts)(rank_mesh((), device="cpu"))
    for mode in modes:
        eager = copy.deepcopy(model).train(mode)
        generated.load(lambda n, s: weights[n].detach()[s]).train(mode)
        results = []
        for m in (eager, generated):
            torch.manual_seed(0)
            m.zero_grad()
            loss = m(**args).loss
            loss.backward()
            results.append((loss.detach(), {n: p.grad for n, p in m.named_parameters()}))
        (loss, grads), (loss2, grads2) = results
        limit = 1e-12 if loss.dtype == torch.float64 else 1e-6
        bad = [] if abs(loss - loss2) <= limit * max(1, abs(loss)) else [f"loss {float(loss)} {float(loss2)}"]
        for n, g in grads.items():
            g2 = grads2.get(n)
            if (g is None) != (g2 is None) or (g is not None and not ((g - g2).abs().max() <= limit * max(1, g.abs().max()))):
                bad.append(n)
        if bad:
            return f"{'train' if mode else 'eval'}: {len(bad)} differ: {', '.join(bad[:3])}"
    return "ok"


def split_share(graph: Any, program: Any) -> float:
    """Share of the forward matmul flops that at least one axis splits, counting every instance of a block."""
    from autopar.ir.graph import Op
    from autopar.lower.program import Local
    from autopar.rules import recipe_of

    total = split = 0.0
    for block in program.blocks.values():
        source = graph.blocks[block.source]
        ops = {op.id: op for op in source.ops if isinstance(op, Op)}
        for item in block.body:
            if isinstance(item, Local):
                recipe = recipe_of(source, ops[item.op])
                if recipe is not None and recipe.matmul:
                    flops = recipe.flops * max(1, len(block.instances))
                    total += flops
                    split += flops * any(recipe.parse(c)[0] in recipe.factors for c in item.choice)
    return split / total if total else 1.0


def unruled(graph: Any) -> list[str]:
    """Names of ops that no rule knows."""
    from autopar.ir.graph import Op, op_outputs
    from autopar.rules import canonical, recipe_of

    found = set()
    for block in graph.blocks.values():
        for op in block.ops:
            if isinstance(op, Op) and op_outputs(block, op) and recipe_of(block, op) is None:
                found.add(canonical(op.fn))
    return sorted(found)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", default="")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--verbose", action="store_true")
    options.add_argument("--child")
    args = options.parse_args()
    if args.child:
        print(json.dumps(one(args.child, args.seeds, args.verbose)))
        return
    from models import ZOO

    names = args.only.split(",") if args.only else ZOO
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}

    def run(name: str) -> dict[str, Any]:
        command = [sys.executable, __file__, "--child", name, "--seeds", str(args.seeds), *["--verbose"] * args.verbose]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=None if args.verbose else subprocess.PIPE, text=True)
        try:
            row = json.loads(done.stdout.strip().splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            last = (done.stderr or "").strip().splitlines()[-1:] or ["?"]
            row = {"name": name, **dict.fromkeys(CHECKS, f"crashed: {last[0]}")}
        if not args.json:
            cells = " ".join(f"{'ok' if row[c] == 'ok' else 'FAIL':<8}" for c in CHECKS)
            print(
                f"{name:<12} {row.get('dtype', '?'):<8} {cells} {100 * row.get('split', 0):>5.1f}% {row.get('seconds', 0):>6.1f}s  "
                f"{', '.join(row.get('unruled', [])) or '-'}",
                flush=True,
            )
            for c in CHECKS:
                if row[c] != "ok":
                    print(f"    {c}: {row[c]}", flush=True)
        return row

    if not args.json:
        print(f"{'model':<12} {'dtype':<8} {' '.join(f'{c:<8}' for c in CHECKS)} {'split':>6} {'cpu':>7}  ops without a rule")
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(run, names))
    figures = [Figure("zoo_exact", sum(r["exact"] == "ok" for r in rows), "models", f"eager, of {len(rows)}", 28, at_least=True)]
    for c in CHECKS[1:]:
        good = sum(r[c] == "ok" for r in rows)
        figures.append(Figure(f"zoo_{c}", good, "models", f"the original module, of {len(rows)}", 26, at_least=True))
    share = median(r.get("split", 0.0) for r in rows)
    figures.append(Figure("zoo_split_share", share, "share", "matmul flops, median over models", 0.9, at_least=True))
    report(figures, args.json)


if __name__ == "__main__":
    main()
