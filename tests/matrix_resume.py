"""Checkpoints in the training matrix: saved under each layout, loaded under each other; and resuming on the same layout, bit by bit.
Knows the public interface only. `python tests/matrix_resume.py` runs everything and prints the tables; names of models choose some.

Every layout trains on the same micro batches, shared out among its units, so that a run goes on under another layout with the same losses.
"""

from __future__ import annotations

import copy
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent)]

import numpy as np
import torch

import autopar
from tests.matrix import LAYOUTS, NAMES, OPTIMIZERS, TOLERANCE, ZEROS, Result, build, compile_in, relative, train
from tests.procs import run_processes

STEPS = 5  # before the checkpoint, and after it
SAMPLES = 4  # micro batches of all units in a step; dp4 has one in each unit, and accumulates nothing
EXTRA = {"step": STEPS}
ROUNDING = 1e-6  # of the largest entry: what gradients that should be zero stay below
Pair = tuple[str, str]  # layout that saved, layout that loads
PAIRS: list[Pair] = list(product(LAYOUTS, LAYOUTS))
# (model, optimizer, turn): one model with every mode under every layout, the others with some.
TURNS = [("gpt", "adamw", t) for t in range(5)] + [(n, list(OPTIMIZERS)[i % 2], i % 5) for i, n in enumerate(NAMES) if n != "gpt"]


def zeros(turn: int) -> dict[str, str]:
    """A ZeRO mode for each layout; five turns give every layout every mode."""
    modes = list(ZEROS)
    return {layout: modes[(i + turn) % len(modes)] for i, layout in enumerate(LAYOUTS)}


def run(name: str, layout: str, model: Any, optimizer: Any, steps: range) -> tuple[dict, list, dict, list]:
    """(losses by step and micro batch, norms, state dict, random draws) of this rank after some steps."""
    micro = SAMPLES // LAYOUTS[layout].units
    losses, norms = train(name, model, optimizer, steps, LAYOUTS[layout].units, micro)
    by_sample = {(step, unit * micro + m): loss for (step, unit, m), loss in losses.items()}
    drawn = [torch.rand(2).tolist(), random.random(), float(np.random.rand())]
    return by_sample, norms, copy.deepcopy(autopar.sharded_state_dict(model, optimizer)), drawn


def save(name: str, layout: str, made: Any, zero: str, optimizer: str, folder: Path) -> tuple:
    """Train, save, train on as if nothing had been saved."""
    model, opt = build(name, layout, made, zero, optimizer)
    seed(1)
    run(name, layout, model, opt, range(STEPS))
    autopar.save_checkpoint(folder, model, opt, EXTRA)
    return run(name, layout, model, opt, range(STEPS, 2 * STEPS))


def resume(name: str, layout: str, made: Any, zero: str, optimizer: str, folder: Path, **options: Any) -> tuple:
    """Load into a new model and optimizer, whose learning rates are others, and train on."""
    model, opt = build(name, layout, made, zero, optimizer)
    for group in opt.param_groups:
        group["lr"] *= 7
    seed(2)
    assert autopar.load_checkpoint(folder, model, opt, **options) == EXTRA
    return run(name, layout, model, opt, range(STEPS, 2 * STEPS))


def seed(n: int) -> None:
    torch.manual_seed(n)
    random.seed(n)
    np.random.seed(n)


def on_ranks(name: str, layout: str, folder: Path, jobs: Mapping[Any, Any]) -> dict[Any, list]:
    """job -> what each rank returned; a job is a function of what compile_in gives. All in one set of processes."""

    def rank(_: int) -> list:
        made = compile_in(folder, name, layout)
        return [job(made) for job in jobs.values()]

    found = run_processes(rank, LAYOUTS[layout].world, timeout=600)
    return {key: [r[i] for r in found] for i, key in enumerate(jobs)}


# -- comparison


def same_bits(got: Any, want: Any, where: str = "") -> str:
    """The first place where two values, of tensors, numbers, texts and containers of them, are not bit by bit the same; else ''."""
    if isinstance(want, torch.Tensor):
        equal = isinstance(got, torch.Tensor) and got.dtype == want.dtype and torch.equal(got, want)
        return "" if equal else where or "a tensor"
    if isinstance(want, Mapping):
        if not isinstance(got, Mapping) or got.keys() != want.keys():
            return f"{where} (keys)"
        return next((w for k in want if (w := same_bits(got[k], want[k], f"{where}/{k}"))), "")
    if isinstance(want, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(got) != len(want):
            return f"{where} (length)"
        return next((w for i, v in enumerate(want) if (w := same_bits(got[i], v, f"{where}/{i}"))), "")
    return "" if got == want else f"{where}: {got!r:.40} and not {want!r:.40}"


def close(got: list, want: list) -> Result:
    """The worst error of losses, norms, and of the merged parameters and optimizer state, relative as in the matrix.

    NB: state of a parameter whose gradient is nothing but rounding (the bias of keys in attention) is nothing but rounding
    either: below a millionth of the largest entry that any parameter has. There it must be so small in both runs.
    """
    a, b = ({k: v for rank in ranks for k, v in rank[0].items()} for ranks in (got, want))
    assert a.keys() == b.keys() and len(a) == STEPS * SAMPLES
    errors = {f"loss of {k}": relative(a[k], b[k]) for k in b}
    errors |= {f"norm {i} on rank {r}": relative(n, want[0][1][i]) for r, rank in enumerate(got) for i, n in enumerate(rank[1])}
    (params, state), (want_params, want_state) = (autopar.merge_state_dicts([rank[2] for rank in ranks]) for ranks in (got, want))
    assert params.keys() == want_params.keys() and state["param_groups"] == want_state["param_groups"]
    errors |= {n: relative(params[n], t) for n, t in want_params.items() if "running" not in n and "num_batches" not in n}
    assert state["state"].keys() == want_state["state"].keys()
    largest: dict[str, float] = {}
    for tensors in want_state["state"].values():
        largest |= {key: max(largest.get(key, 0.0), float(t.abs().max())) for key, t in tensors.items()}
    for i, tensors in want_state["state"].items():
        for key, t in tensors.items():
            pair = state["state"][i][key], t
            rounding = ROUNDING ** (2 if key.endswith("_sq") else 1) * largest[key]
            if not all(float(x.abs().max()) < rounding for x in pair):
                errors[f"{key} of {i}"] = relative(*pair)
    where = max(errors, key=errors.get)
    return Result(errors[where], where)


# -- any layout from any other


def resume_pairs(name: str, optimizer: str, turn: int, pairs: Iterable[Pair] = PAIRS) -> dict[Pair, Result]:
    """Each pair against the uninterrupted run of the layout that saved: bit by bit on the same one (error 0 or infinite)."""
    pairs, zero, out = list(pairs), zeros(turn), {}
    with tempfile.TemporaryDirectory() as root:
        folder, ends = Path(root), {}
        for layout in dict.fromkeys(x for pair in pairs for x in pair):
            compile_in(folder, name, layout, load_module=False)
        for layout in dict.fromkeys(saved for saved, _ in pairs):
            job = {0: lambda made, x=layout: save(name, x, made, zero[x], optimizer, folder / f"checkpoint-{x}")}
            ends[layout] = on_ranks(name, layout, folder, job)[0]
        for layout in dict.fromkeys(loaded for _, loaded in pairs):
            jobs = {
                saved: lambda made, x=layout, s=saved: resume(name, x, made, zero[x], optimizer, folder / f"checkpoint-{s}")
                for saved, loaded in pairs
                if loaded == layout
            }
            for saved, got in on_ranks(name, layout, folder, jobs).items():
                if saved == layout:
                    differs = same_bits([_without_statistics(r) for r in got], [_without_statistics(r) for r in ends[saved]])
                    out[saved, layout] = Result(float("inf") if differs else 0.0, differs)
                else:
                    out[saved, layout] = close(got, ends[saved])
    return {pair: out[pair] for pair in pairs}


def _without_statistics(rank: tuple) -> tuple:
    """NB: running statistics are the first unit's in a checkpoint (docs/checkpoints.md); nothing that is trained depends on them."""
    losses, norms, state, drawn = rank
    model = {n: t for n, t in state["model"].items() if "running" not in n}
    return losses, norms, {**state, "model": model}, drawn


# -- the same layout


def resume_same(layout: str, cells: Iterable[tuple[str, str]], name: str = "dropout") -> dict[tuple[str, str], str]:
    """Per (ZeRO, optimizer), in processes of their own, where the resumed run differs from the uninterrupted one; '' for nowhere.

    Compared bit by bit: losses, norms, every rank's parameters and optimizer state, and draws of torch, Python and NumPy at the end.
    """
    cells = list(cells)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        compile_in(folder, name, layout, load_module=False)
        jobs = [
            {c: lambda made, c=c, do=do: do(name, layout, made, *c, folder / "-".join(("checkpoint", *c))) for c in cells}
            for do in (save, resume)
        ]
        want, got = (on_ranks(name, layout, folder, j) for j in jobs)
    return {c: same_bits(got[c], want[c]) for c in cells}


def main(chosen: list[str]) -> int:
    """Print the tables; 1 if a cell failed."""
    bad, begun, done = [], time.time(), 0
    for name, optimizer, turn in [t for t in TURNS if not chosen or t[0] in chosen]:
        zero, start = zeros(turn), time.time()
        print(f"\n| {name}, {optimizer}: saved under, loaded under | " + " | ".join(f"{x} {zero[x]}" for x in LAYOUTS) + " |")
        print("|---" * (len(LAYOUTS) + 1) + "|")
        found = resume_pairs(name, optimizer, turn)
        for saved in LAYOUTS:
            cells = [found[saved, x] for x in LAYOUTS]
            print(f"| {saved} {zero[saved]} | " + " | ".join("bitwise" if r.error == 0 else f"{r.error:.1e}" for r in cells) + " |")
        done += len(found)
        bad += [f"{name} {optimizer} {zero[s]} {s} -> {zero[x]} {x}: {r}, {r.where}" for (s, x), r in found.items() if r.error > TOLERANCE]
        print(f"\n{time.time() - start:.0f} s", flush=True)
    cells = list(product(ZEROS, OPTIMIZERS))
    print("\n| GPT with dropout, resumed on | " + " | ".join(f"{o} {z}" for z, o in cells) + " |")
    print("|---" * (len(cells) + 1) + "|")
    for layout in LAYOUTS if not chosen or "dropout" in chosen else ():
        found = resume_same(layout, cells)
        print(f"| {layout} | " + " | ".join(w or "bitwise" for w in found.values()) + " |", flush=True)
        done += len(found)
        bad += [f"dropout {layout} {z} {o}: {w}" for (z, o), w in found.items() if w]
    print(f"\n{done} cells run, {len(bad)} failed; {time.time() - begun:.0f} s")
    for text in bad:
        print(f"FAILED {text}")
    return 1 if bad else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
