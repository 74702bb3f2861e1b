"""The prover: a split op on shards, put together again, must equal the whole op, forward and backward, in float64.
Must not know any op: it reads recipes and runs local forms. `python -m autopar.rules.prove` proves the samples of all tables.

Inputs are distributed by their types and outputs combined by theirs; output gradients are distributed by the dual types
and input gradients combined by theirs. So one pair of functions, distribute and combine, states what R, I, S and P mean.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from autopar.errors import RuleError, VerifyError
from autopar.ir.graph import AxisRef, op_inputs, op_outputs
from autopar.ir.types import Type, dual, is_valid, with_nest
from autopar.rules.names import canonical
from autopar.rules.oneop import OneOp, _map, run
from autopar.rules.recipe import Emitted, Recipe, Split
from autopar.rules.registry import localise, recipe_of
from autopar.runtime.exact import exact

Coords = tuple[int, ...]
TOLERANCE = 1e-12


def distribute(x: torch.Tensor, t: Type, sizes: Coords, rng: torch.Generator) -> dict[Coords, torch.Tensor]:
    """What each rank holds of a value of type t; addends are random."""
    if not t:
        return {(): x}
    k, parts = sizes[0], []
    if t[0].kind == "S":
        d, outer = t[0].dim, t[0].outer
        parts = [p.flatten(d, d + 1) for p in x.unflatten(d, (outer, -1)).chunk(k, d + 1)]
    elif t[0].kind == "P":
        parts = [noise(x, rng) for _ in range(k - 1)]
        parts.append(x - sum(parts))
    else:
        parts = [x] * k
    return {(r, *rest): v for r, p in enumerate(parts) for rest, v in distribute(p, t[1:], sizes[1:], rng).items()}


def noise(like: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Random numbers; whole ones where the dtype is too short for 1e-12, so that samples of whole numbers are computed exactly."""
    x = torch.randn(like.shape, dtype=torch.complex128 if like.is_complex() else torch.float64, generator=rng)
    return x if like.dtype == x.dtype else (2 * x).round().to(like.dtype)


def combine(parts: dict[Coords, torch.Tensor], t: Type, sizes: Coords) -> torch.Tensor:
    """The value of type t that the ranks hold together. Raises VerifyError if ranks that must agree do not."""
    if not t:
        return parts[()]
    rows = [combine({c[1:]: v for c, v in parts.items() if c[0] == r}, t[1:], sizes[1:]) for r in range(sizes[0])]
    if t[0].kind == "S":
        d = t[0].dim
        return torch.cat([v.unflatten(d, (t[0].outer, -1)) for v in rows], d + 1).flatten(d, d + 1)
    if t[0].kind == "P":
        return torch.stack(rows).sum(0).to(rows[0].dtype) if rows[0].dtype != torch.bool else torch.stack(rows).any(0)
    for r, v in enumerate(rows):
        if error(v, rows[0]) > TOLERANCE:
            raise VerifyError(f"rank {r} holds another value than rank 0 on an axis of type {t[0]}")
    return rows[0]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the size of b; infinite if shapes or dtypes differ."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.numel() or torch.equal(a, b):
        return 0.0
    if a.dtype == torch.bool:
        return 1.0
    a, b = (torch.view_as_real(v.resolve_conj()).double() if v.is_complex() else v.double() for v in (a, b))
    same = (a == b) | (a.isnan() & b.isnan())
    diff = torch.where(same, 0.0, (a - b).abs()).max().item()
    scale = torch.where(b.isfinite(), b.abs(), 0.0).max().item()
    return float("inf") if diff != diff else diff / max(1.0, scale)


@dataclass(frozen=True)
class Proof:
    """One choice per axis, proven or not."""

    fn: str
    choice: tuple[str, ...]
    sizes: Coords
    error: float
    why: str = ""

    @property
    def ok(self) -> bool:
        return not self.why

    def __str__(self) -> str:
        axes = " ".join(f"{c}@{k}" for c, k in zip(self.choice, self.sizes, strict=True))
        return f"{self.fn} [{axes}]: {self.why or f'error {self.error:.1e}'}"


class Whole:
    """An op run on whole tensors, with the gradients of its inputs for random gradients of its outputs."""

    def __init__(self, one: OneOp, seed: int = 0, random: bool = False) -> None:
        self.random = random  # draws: run in exact mode, from one seed
        self.one, self.rng = one, torch.Generator().manual_seed(seed)
        self.ins, self.outs = op_inputs(one.block, one.op), op_outputs(one.block, one.op)
        values = {v.id: one.values[v.id] for v in self.ins}
        out, leaves = self.forward(Emitted(one.op.fn, one.op.args, one.op.kwargs), values)
        self.seeds = [noise(o, self.rng) if o.requires_grad else None for o in out]
        self.grads = backward(out, self.seeds, leaves)
        self.out = [o.detach() for o in out]

    def forward(self, form: Emitted, values: dict[int, torch.Tensor], axes: Any = None) -> tuple[list, dict]:
        """Outputs, and the leaves that stand for the inputs."""
        leaves = {i: v.detach().clone().requires_grad_(self.one.block.values[i].grad) for i, v in values.items()}
        # NB: clones, so that ops in place may write them.
        given = {**self.one.values, **{i: v.clone() for i, v in leaves.items()}}
        with exact() if self.random else nullcontext():
            if self.random:
                torch.manual_seed(0)
            out = run(self.one, form.fn, form.args, form.kwargs, given, axes)
        return [o / form.divide for o in out] if form.divide != 1 else out, leaves

    def error(self, recipe: Recipe, choice: tuple[str, ...], sizes: Coords) -> float:
        """Largest error of outputs and input gradients under a choice. Raises VerifyError where it is too large."""
        columns = [recipe.types(c) for c in choice]
        in_types = [with_nest(tuple(c[0][i] for c in columns)) for i in range(len(self.ins))]
        out_types = [with_nest(tuple(c[1][i] for c in columns)) for i in range(len(self.outs))]
        names = [f"a{i}" for i in range(len(sizes))]
        axes = list(zip(names, sizes, choice, strict=True))
        splits = tuple(Split(n, k, c) for n, k, c in axes if recipe.parse(c)[0] in recipe.factors)
        form = localise(self.one.block, self.one.op, recipe, splits)
        given = [distribute(self.one.values[v.id], t, sizes, self.rng) for v, t in zip(self.ins, in_types, strict=True)]
        seeds = [None if g is None else distribute(g, dual(t), sizes, self.rng) for g, t in zip(self.seeds, out_types, strict=True)]

        def rank(at: Coords, axes: Any = None) -> tuple[list, dict]:
            out, leaves = self.forward(form, {v.id: g[at] for v, g in zip(self.ins, given, strict=True)}, axes)
            return [o.detach() for o in out], backward(out, [None if s is None else s[at] for s in seeds], leaves)

        ranks = list(itertools.product(*map(range, sizes)))
        if communicates(form):
            from autopar.runtime.inproc import run_ranks

            mesh = tuple(zip(names, sizes, strict=True))
            found = run_ranks(mesh, lambda axes, _: rank(tuple(axes[n].rank for n in names), axes))
            results = dict(zip(ranks, found, strict=True))
        else:
            results = {at: rank(at) for at in ranks}
        checks = [(f"output {j}", t, {at: r[0][j] for at, r in results.items()}, self.out[j]) for j, t in enumerate(out_types)]
        for v, t in zip(self.ins, in_types, strict=True):
            if v.id in self.grads:
                checks.append((f"the gradient of {v.name}", dual(t), {at: r[1][v.id] for at, r in results.items()}, self.grads[v.id]))
        worst = 0.0
        for what, t, parts, whole in checks:
            worst = max(worst, error(combine(parts, t, sizes), whole))
            if worst > TOLERANCE:
                raise VerifyError(f"{what}, held as {', '.join(map(repr, t))}, differs from the whole op's by {worst:.1e}")
        return worst


def backward(out: list, seeds: list, leaves: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Gradients of the leaves, zero where none flows."""
    wanted = {i: v for i, v in leaves.items() if v.requires_grad}
    pairs = [(o, g) for o, g in zip(out, seeds, strict=True) if g is not None and o.requires_grad]
    for o, g in pairs:
        if o.shape != g.shape:
            raise VerifyError(f"a local output is {list(o.shape)}, its type says {list(g.shape)}")
    if not pairs or not wanted:
        return {i: torch.zeros_like(v) for i, v in wanted.items()}
    found = torch.autograd.grad([o for o, _ in pairs], list(wanted.values()), [g for _, g in pairs], allow_unused=True)
    return {i: torch.zeros_like(v) if g is None else g.detach() for (i, v), g in zip(wanted.items(), found, strict=True)}


def communicates(form: Emitted) -> bool:
    found: list[Any] = []
    _map((form.args, form.kwargs), lambda x: found.append(x) if isinstance(x, AxisRef) else None)
    return form.fn.startswith("ap.") or bool(found)


def draws_elsewhere(one: OneOp, recipe: Recipe, choice: tuple[str, ...], sizes: Coords) -> bool:
    """Whether a random op is split, and not emitted in a form that knows exact mode."""
    splits = tuple(Split(f"a{i}", k, c) for i, (k, c) in enumerate(zip(sizes, choice, strict=True)) if recipe.parse(c)[0] in recipe.factors)
    return bool(splits) and not localise(one.block, one.op, recipe, splits).fn.startswith("ap.")


def choices(recipe: Recipe, sizes: Coords) -> Iterator[tuple[str, ...]]:
    """All ways to run the op on a mesh of these sizes that its recipe allows."""
    grouped = [g for n in recipe.factors for g in (n, f"{n}/2") if recipe.legal(g)]
    linear = [f"P:{i}" for i in range(len(recipe.linear))]
    for pick in itertools.product([*grouped, *linear, "R"], repeat=len(sizes)):
        per_factor: dict[str, int] = {}
        for c, k in zip(pick, sizes, strict=True):
            if recipe.parse(c)[0] in recipe.factors:
                per_factor[c] = per_factor.get(c, 1) * k
        if not all(recipe.divides(c, k) for c, k in per_factor.items()):
            continue
        columns = [recipe.types(c) for c in pick]
        types = [with_nest(row) for side in (0, 1) for row in zip(*(c[side] for c in columns), strict=True)]
        if all(is_valid(t) for t in types) and len({recipe.parse(c)[0] for c in per_factor}) == len(per_factor):
            yield pick


def prove(one: OneOp, recipe: Recipe | None = None, meshes: Iterable[Coords] = ((2,), (4,), (2, 2))) -> list[Proof]:
    """A Proof for every choice on every mesh; failed ones say why."""
    recipe = recipe_of(one.block, one.op, strict=True) if recipe is None else recipe
    if recipe is None:
        return []
    whole, fn, out = Whole(one, random=recipe.random), one.op.fn, []
    for sizes in meshes:
        for choice in choices(recipe, sizes):
            if recipe.random and draws_elsewhere(one, recipe, choice, sizes):
                continue  # shards draw other numbers, and the op has no exact form
            try:
                out.append(Proof(fn, choice, sizes, whole.error(recipe, choice, sizes)))
            except (VerifyError, RuleError) as e:
                out.append(Proof(fn, choice, sizes, float("inf"), str(e)))
            except Exception as e:
                out.append(Proof(fn, choice, sizes, float("inf"), f"{type(e).__name__}: {e}"))
    return out


@dataclass
class Row:
    """The proofs of one canonical op."""

    name: str
    samples: int = 0
    factors: int = 0
    proofs: list[Proof] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, sample: Any) -> None:
        start = time.perf_counter()
        try:
            one = sample.make()
            recipe = recipe_of(one.block, one.op, strict=True)
            legal = [n for n in recipe.factors if recipe.legal(n)] if recipe else []
            if sample.splits is not None and sorted(legal) != sorted(sample.splits.split()):
                self.complaints.append(f"{sample} can be split on {' '.join(legal) or 'nothing'}, should on {sample.splits or 'nothing'}")
            proofs = prove(one, recipe)
            self.complaints += [f"{sample}: {p}" for p in proofs if not p.ok]
            self.proofs += proofs
            self.factors += len(legal)
        except Exception as e:
            self.complaints.append(f"{sample}: {type(e).__name__}: {e}")
        self.samples += 1
        self.seconds += time.perf_counter() - start


def prove_samples(only: Iterable[str] = ()) -> dict[str, Row]:
    """Prove all samples (of the given canonical names), by canonical name."""
    from autopar.rules.samples import samples

    rows: dict[str, Row] = {}
    wanted = set(only)
    for sample in samples():
        name = canonical(sample.fn)
        if not wanted or name in wanted:
            rows.setdefault(name, Row(name)).add(sample)
    return rows


def main(names: list[str]) -> int:
    rows = sorted(prove_samples(names).values(), key=lambda r: r.name)
    print(f"{'op':28}{'samples':>8}{'factors':>8}{'choices':>8}{'wrong':>7}{'seconds':>9}")
    for r in rows:
        print(f"{r.name:28}{r.samples:8}{r.factors:8}{len(r.proofs):8}{len(r.complaints):7}{r.seconds:9.2f}")
    for line in (x for r in rows for x in r.complaints):
        print("WRONG", line)
    samples, factors, seconds = (sum(getattr(r, n) for r in rows) for n in ("samples", "factors", "seconds"))
    proofs = [p for r in rows for p in r.proofs]
    worst = max((p.error for p in proofs if p.ok), default=0.0)
    print(
        f"{len(rows)} ops, {samples} samples, {factors} legal factors, {len(proofs)} choices forward and backward, "
        f"{sum(len(r.complaints) for r in rows)} wrong, largest error {worst:.1e}, {seconds:.1f} s"
    )
    return any(r.complaints for r in rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
