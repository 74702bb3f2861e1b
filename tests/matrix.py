"""The training matrix: model x layout x ZeRO x optimizer, under gloo processes, against plain PyTorch in one process.
Knows the public interface only. `python tests/matrix.py` runs all cells and prints the table; names of models or layouts choose rows.

A cell trains 10 steps with accumulation and clipping. Its error is the largest of those of all losses, gradient norms and final merged
parameters, each relative to what plain PyTorch has; of a tensor, relative to its largest entry.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent)]

import torch
from torch import nn

import autopar
from autopar.config import ComputeConfig
from autopar.errors import ConfigError
from autopar.pas.policies import mesh_policy
from tests import matrix_models as models
from tests.procs import ProcessesFailed, run_processes

STEPS = 10
TOLERANCE = 1e-5
CLIP = 0.5  # below the norm in most steps (of every model in one at least)


@dataclass(frozen=True)
class Layout:
    policy: Any
    plan: int  # devices in a scale unit
    units: int = 1

    @property
    def world(self) -> int:
        return self.plan * self.units


LAYOUTS = {
    "dp2": Layout("dp", 1, 2),
    "tp2": Layout("tp", 2),
    "data2": Layout("data", 2),
    "tp2x2": Layout("tp", 2, 2),
    "mesh2x2": Layout(mesh_policy({"dp": (2, "data"), "tp": (2, "tp")}), 4),
    "dp4": Layout("dp", 1, 4),
}
ZEROS: dict[str, dict[str, Any]] = {
    "none": {},
    "zero1": {"use_zero": 1},
    "groups": {"use_zero": 1, "zero_ngroups": 2},
    "scatter": {"use_zero": 1, "zero_use_reduce_scatter": True},
    "zero3": {"use_zero": 3},
}


@dataclass(frozen=True)
class Optimizer:
    make: Any
    kwargs: dict[str, Any]
    groups: Any = None  # original parameter name -> options of its group
    reducer: dict[str, Any] = field(default_factory=dict)  # how gradients travel, so that the matrix has both ways


# NB: eps. Adam divides by the root of the second moment; an entry whose gradient is rounding alone (1e-9) would move as far as any other,
# in a direction that the order of a sum decides. With 1e-3 what is that small stays that small, and 1e-5 can be asked for.
OPTIMIZERS = {
    "sgd": Optimizer(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": Optimizer(
        torch.optim.AdamW,
        {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-3},
        models.options,
        {"use_async_reducer": True, "reducer_bucket_cap_mb": 0.002},
    ),
}
Cell = tuple[str, str]  # ZeRO, optimizer
CELLS: list[Cell] = [(z, o) for o in OPTIMIZERS for z in ZEROS]
NAMES = [n for n in models.MODELS if n != "dropout"]


# -- plain PyTorch


@dataclass
class Trained:
    """losses: of each micro batch of each unit, by (step, unit, micro). params: final, by every name. buffers: of unit 0."""

    losses: dict[tuple[int, int, int], torch.Tensor]
    norms: list[torch.Tensor]
    state: dict[str, torch.Tensor]


def plain_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """The torch optimizer over the original model."""
    given, groups = OPTIMIZERS[name], {}
    for n, p in model.named_parameters():
        if p.requires_grad:
            mine = (given.groups(n) if given.groups else None) or {}
            groups.setdefault(tuple(mine.items()), []).append(p)
    return given.make([{"params": params, **dict(mine)} for mine, params in groups.items()], **given.kwargs)


@cache
def plain(name: str, optimizer: str, units: int, micro: int = 2, dtype: torch.dtype = torch.float32) -> Trained:
    model = models.original(name).to(dtype)
    opt, out = plain_optimizer(optimizer, model), Trained({}, [], {})
    for step in range(STEPS):
        opt.zero_grad()
        for unit in range(units):
            for m in range(micro):
                loss = loss_of(model(cast(models.sample(name, step, unit * micro + m), dtype)))
                (loss / (units * micro)).backward()
                out.losses[step, unit, m] = loss.detach()
        out.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        opt.step()
    assert max(out.norms) > CLIP, "nothing is clipped"
    out.state = {n: t.detach() for n, t in model.state_dict(keep_vars=True).items() if units == 1 or isinstance(t, nn.Parameter)}
    return out


def loss_of(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def cast(sample: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in sample.items()}


# -- ranks


def compile_in(folder: Path, name: str, layout: str, **options: Any) -> dict[str, Any]:
    """part -> what autopar.parallelize made of it. With load_module=False in the parent; then under processes, which find the code."""
    given = LAYOUTS[layout]
    whole = models.original(name) if name in models.PARTS else None
    out = {}
    for part in models.PARTS.get(name, ("",)):
        config = ComputeConfig(given.plan, given.world, use_end2end=whole is None)
        make = (lambda: models.original(name)) if whole is None else (lambda part=part: whole.get_submodule(part))
        out[part] = autopar.parallelize(
            type(make()), models.dummy(name, part), given.policy, config,
            module_fn=make, gen_savedir=folder, instance_name=f"{name}-{layout}-{part}".rstrip("-"), **options,
        )  # fmt: skip
    return out


def build(name: str, layout: str, made: dict[str, Any], zero: str, optimizer: str) -> tuple[nn.Module, Any]:
    """This rank's (model, optimizer)."""
    model = made[""]() if "" in made else models.original(name)
    for part in filter(None, made):
        setattr(model, part, made[part]())
    given = OPTIMIZERS[optimizer]
    config = {**ZEROS[zero], **given.reducer}
    return model, autopar.build_optimizer(model, given.make, config, param_group_fn=given.groups, **given.kwargs)


def train(name: str, model: nn.Module, optimizer: Any, steps: Iterable[int], units: int, micro: int) -> tuple[dict, list]:
    """(losses of this rank's unit, gradient norms); see Trained."""
    losses, norms = {}, []
    unit = next(m.mesh.unit for m in model.modules() if hasattr(m, "mesh"))
    for step in steps:
        samples = [models.sample(name, step, unit * micro + m) for m in range(micro)]
        optimizer.zero_grad()
        if name in models.PARTS:
            found = []
            for m, sample in enumerate(samples):
                with optimizer.reducer.accumulate() if m + 1 < micro else nullcontext():
                    found.append(model(sample))
                    (found[-1] / micro).backward()
        else:
            found = model.train_step(samples, scale_fn=lambda loss: loss / micro)
        optimizer.scale_grads(1 / units)
        norms.append(optimizer.clip_gnorm(CLIP).detach())
        optimizer.step()
        losses |= {(step, unit, m): loss_of(out).detach() for m, out in enumerate(found)}
    optimizer.zero_grad()
    return losses, norms


def rank_cells(name: str, layout: str, folder: Path, cells: list[Cell], micro: int = 2) -> list[Any]:
    """What one rank has of each cell: (losses, norms, state dict), or the reason why it cannot be built."""
    made, out = compile_in(folder, name, layout), []
    for zero, optimizer in cells:
        try:
            model, opt = build(name, layout, made, zero, optimizer)
        except ConfigError as e:
            out.append(str(e))
            continue
        losses, norms = train(name, model, opt, range(STEPS), LAYOUTS[layout].units, micro)
        out.append((losses, norms, copy.deepcopy(autopar.sharded_state_dict(model, opt))))
    return out


# -- cells


@dataclass(frozen=True)
class Result:
    """error: the worst, and what has it. skipped: why there is none."""

    error: float = 0.0
    where: str = ""
    skipped: str = ""

    def __str__(self) -> str:
        return "skip" if self.skipped else f"{self.error:.1e}"


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference of two tensors, relative to the largest entry wanted."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if not got.is_floating_point() or not want.numel() or not want.any():
        return 0.0 if torch.equal(got, want) else float("inf")
    error = float((got.double() - want.double()).abs().max()) / float(want.abs().max())
    return error if error == error else float("inf")


def compare(ranks: list[Any], want: Trained) -> Result:
    """Of one cell, what all ranks have against plain PyTorch."""
    if isinstance(ranks[0], str):
        return Result(skipped=ranks[0])
    errors = {}
    for rank, (losses, norms, _) in enumerate(ranks):
        errors |= {f"loss of rank {rank}, step {k[0]}, sample {k[2]}": relative(loss, want.losses[k]) for k, loss in losses.items()}
        errors |= {f"norm on rank {rank}, step {i}": relative(n, w) for i, (n, w) in enumerate(zip(norms, want.norms, strict=True))}
    assert {k for losses, _, _ in ranks for k in losses} == want.losses.keys()
    merged, _ = autopar.merge_state_dicts([state for _, _, state in ranks])
    errors |= {n: relative(merged[n], t) for n, t in want.state.items()}
    where = max(errors, key=errors.get)
    return Result(errors[where], where)


def row(name: str, layout: str, cells: list[Cell] = CELLS, folder: Path | None = None) -> dict[Cell, Result]:
    """The cells of one model under one layout, in one set of processes. Raises ProcessesFailed if one of them fails."""
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as folder:
        compile_in(Path(folder), name, layout, load_module=False)
        given = LAYOUTS[layout]
        ranks = run_processes(lambda rank: rank_cells(name, layout, Path(folder), cells), given.world, timeout=600)
    return {cell: compare([r[i] for r in ranks], plain(name, cell[1], given.units)) for i, cell in enumerate(cells)}


def main(chosen: list[str]) -> int:
    """Print the table; 1 if a cell is above the tolerance or failed."""
    rows = [(n, layout) for n in NAMES for layout in LAYOUTS if not chosen or n in chosen or layout in chosen]
    print("| model, layout | " + " | ".join(f"{o} {z}" for z, o in CELLS) + " | float32 itself | s |")
    print("|---" * (len(CELLS) + 3) + "|")
    done, skips, bad, begun = 0, {}, [], time.time()
    for name, layout in rows:
        start = time.time()
        try:
            found = row(name, layout)
        except (ProcessesFailed, autopar.AutoparError) as e:
            bad.append(f"{name} {layout}: {e}")
            print(f"| {name} {layout} | FAILED", flush=True)
            continue
        done += sum(not r.skipped for r in found.values())
        for cell, r in found.items():
            if r.skipped:
                skips.setdefault(r.skipped, []).append(f"{name} {layout} {cell[1]} {cell[0]}")
            elif r.error > TOLERANCE:
                bad.append(f"{name} {layout} {cell[1]} {cell[0]}: {r.error:.2e} in {r.where}")
        cells = " | ".join(map(str, found.values()))
        print(f"| {name} {layout} | {cells} | {itself(name, layout):.1e} | {time.time() - start:.1f} |", flush=True)
    print(f"\n{done} cells run, {sum(map(len, skips.values()))} skipped, {len(bad)} failed; {time.time() - begun:.0f} s")
    for reason, cells in skips.items():
        print(f"skipped: {', '.join(cells)}: {reason}")
    for text in bad:
        print(f"FAILED {text}")
    return 1 if bad else 0


def itself(name: str, layout: str) -> float:
    """How far plain PyTorch in float32 is from itself in float64: below this no comparison says anything."""
    worst = 0.0
    for o in OPTIMIZERS:
        a, b = (plain(name, o, LAYOUTS[layout].units, dtype=d) for d in (torch.float32, torch.float64))
        pairs = [*((a.losses[k], b.losses[k]) for k in a.losses), *zip(a.norms, b.norms), *((a.state[n], b.state[n]) for n in a.state)]
        worst = max([worst, *(relative(x.double(), y.double()) for x, y in pairs if x.is_floating_point())])
    return worst


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
