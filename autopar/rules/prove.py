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
from dataclasses import dataclass, field
from typing import Any

import torch

from autopar.errors import RuleError, VerifyError
from autopar.ir.graph import AxisRef, op_inputs, op_outputs
from autopar.ir.types import R, Type, dual, is_valid, with_nest
from autopar.rules.names import canonical
from autopar.rules.oneop import OneOp, _map, run
from autopar.rules.recipe import Emitted, Recipe, Split
from autopar.rules.registry import localise, recipe_of

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
        parts = [torch.randn(x.shape, dtype=x.dtype, generator=rng) for _ in range(k - 1)]
        parts.append(x - sum(parts))
    else:
        parts = [x] * k
    return {(r, *rest): v for r, p in enumerate(parts) for rest, v in distribute(p, t[1:], sizes[1:], rng).items()}


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
    a, b = (torch.view_as_real(v).double() if v.is_complex() else v.double() for v in (a, b))
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

    def __init__(self, one: OneOp, seed: int = 0) -> None:
        self.one, self.rng = one, torch.Generator().manual_seed(seed)
        self.ins, self.outs = op_inputs(one.block, one.op), op_outputs(one.block, one.op)
        values = {v.id: one.values[v.id] for v in self.ins}
        self.out, self.seeds = self.forward(Emitted(one.op.fn, one.op.args, one.op.kwargs), values, None)
        self.grads = self.backward(self.out, self.seeds)
        self.out = [o.detach() for o in self.out]

    def forward(self, form: Emitted, values: dict[int, torch.Tensor], seeds: Any, axes: Any = None) -> tuple[list, list]:
        self.leaves = {i: v.detach().clone().requires_grad_(v.is_floating_point() or v.is_complex()) for i, v in values.items()}
        # NB: clones, so that ops in place may write them.
        given = {**self.one.values, **{i: v.clone() for i, v in self.leaves.items()}}
        out = run(self.one, form.fn, form.args, form.kwargs, given, axes)
        if form.divide != 1:
            out = [o / form.divide for o in out]
        if seeds is None:
            seeds = [torch.randn(o.shape, dtype=o.dtype, generator=self.rng) if o.requires_grad else None for o in out]
        return out, seeds

    def backward(self, out: list[torch.Tensor], seeds: list[torch.Tensor | None]) -> dict[int, torch.Tensor]:
        wanted = {i: v for i, v in self.leaves.items() if v.requires_grad}
        pairs = [(o, g) for o, g in zip(out, seeds, strict=True) if g is not None and o.requires_grad]
        if not pairs or not wanted:
            return {i: torch.zeros_like(v) for i, v in wanted.items()}
        for o, g in pairs:
            if o.shape != g.shape:
                raise VerifyError(f"a local output is {list(o.shape)}, its type says {list(g.shape)}")
        found = torch.autograd.grad([o for o, _ in pairs], list(wanted.values()), [g for _, g in pairs], allow_unused=True)
        return {i: torch.zeros_like(v) if g is None else g.detach() for (i, v), g in zip(wanted.items(), found, strict=True)}

    def error(self, recipe: Recipe, choice: tuple[str, ...], sizes: Coords) -> float:
        """Largest error of outputs and input gradients under a choice. Raises VerifyError where ranks disagree."""
        columns = [recipe.types(c) for c in choice]
        in_types = [with_nest(tuple(c[0][i] for c in columns)) for i in range(len(self.ins))]
        out_types = [with_nest(tuple(c[1][i] for c in columns)) for i in range(len(self.outs))]
        names = [f"a{i}" for i in range(len(sizes))]
        splits = tuple(
            Split(n, k, c) for n, k, c in zip(names, sizes, choice, strict=True) if recipe.parse(c)[0] in recipe.factors
        )
        form = localise(self.one.block, self.one.op, recipe, splits)
        given = [distribute(self.one.values[v.id], t, sizes, self.rng) for v, t in zip(self.ins, in_types, strict=True)]
        seeds = [
            None if g is None else distribute(g, dual(t), sizes, self.rng) for g, t in zip(self.seeds, out_types, strict=True)
        ]
        ranks = list(itertools.product(*map(range, sizes)))

        def one_rank(at: Coords, axes: Any) -> tuple[list, dict]:
            values = {v.id: g[at] for v, g in zip(self.ins, given, strict=True)}
            out, _ = self.forward(form, values, [])
            return [o.detach() for o in out], self.backward(out, [None if s is None else s[at] for s in seeds])

        def in_process(axes: Any, rank: int) -> tuple[list, dict]:
            at = tuple(axes[n].rank for n in names)
            values = {v.id: g[at] for v, g in zip(self.ins, given, strict=True)}
            other = object.__new__(Whole)
            other.__dict__.update(self.__dict__)
            out, _ = other.forward(form, values, [], axes)
            return [o.detach() for o in out], other.backward(out, [None if s is None else s[at] for s in seeds])

        if communicates(form):
            from autopar.runtime.inproc import run_ranks

            results = dict(zip(ranks, run_ranks(tuple(zip(names, sizes, strict=True)), in_process), strict=True))
        else:
            results = {at: one_rank(at, None) for at in ranks}
        worst = 0.0
        for j, t in enumerate(out_types):
            both = combine({at: r[0][j] for at, r in results.items()}, t, sizes)
            worst = max(worst, error(both, self.out[j]))
            if worst > TOLERANCE:
                raise VerifyError(f"output {j} of type {t[0] if len(t) == 1 else t} differs from the whole op by {worst:.1e}")
        for v, t in zip(self.ins, in_types, strict=True):
            if v.id in self.grads:
                both = combine({at: r[1][v.id] for at, r in results.items()}, dual(t), sizes)
                worst = max(worst, error(both, self.grads[v.id]))
                if worst > TOLERANCE:
                    raise VerifyError(f"the gradient of input {v.name} ({t}) differs by {worst:.1e}")
        return worst


def communicates(form: Emitted) -> bool:
    found: list[Any] = []
    _map((form.args, form.kwargs), lambda x: found.append(x) if isinstance(x, AxisRef) else None)
    return form.fn.startswith("ap.") or bool(found)


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
    whole, fn, out = Whole(one), one.op.fn, []
    for sizes in meshes:
        for choice in choices(recipe, sizes):
            if recipe.random and any(c in recipe.factors for c in choice):
                continue  # shards draw other numbers: proven with the random streams of the runtime
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
    seconds: float = 0.0


def prove_samples(only: Iterable[str] = ()) -> dict[str, Row]:
    """Prove all samples (of the given canonical names)."""
    from autopar.rules.samples import samples

    rows: dict[str, Row] = {}
    wanted = set(only)
    for make in samples():
        if wanted and canonical(make.fn) not in wanted:
            continue
        start = time.perf_counter()
        one = make()
        row = rows.setdefault(canonical(make.fn), Row(canonical(make.fn)))
        recipe = recipe_of(one.block, one.op, strict=True)
        row.samples += 1
        row.factors += sum(map(recipe.legal, recipe.factors)) if recipe else 0
        row.proofs += prove(one, recipe)
        row.seconds += time.perf_counter() - start
    return rows


def main(names: list[str]) -> int:
    rows = prove_samples(names)
    print(f"{'op':28}{'samples':>8}{'factors':>8}{'choices':>8}{'failed':>7}{'seconds':>9}")
    for r in sorted(rows.values(), key=lambda r: r.name):
        print(f"{r.name:28}{r.samples:8}{r.factors:8}{len(r.proofs):8}{sum(not p.ok for p in r.proofs):7}{r.seconds:9.2f}")
    bad = [p for r in rows.values() for p in r.proofs if not p.ok]
    for p in bad[:40]:
        print("FAILED", p)
    total = (sum(getattr(r, n) for r in rows.values()) for n in ("samples", "factors", "seconds"))
    n, f, s = total
    count = sum(len(r.proofs) for r in rows.values())
    print(f"{len(rows)} ops, {n} samples, {f} legal factors, {count} choices proven forward and backward, {len(bad)} failed, {s:.1f} s")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
