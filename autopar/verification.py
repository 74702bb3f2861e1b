"""verify: run all ranks of a plan in this process and compare outputs and gradients with the original module.
Must not know how the program was derived; the original module is the only oracle.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autopar.config import ComputeConfig
from autopar.errors import VerifyError
from autopar.ir.graph import Graph
from autopar.ir.mesh import Mesh
from autopar.ir.types import Type, nesting
from autopar.progress import stage

MODES = ("train", "eval")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
FLOOR = 0.1  # errors are relative to the tensor's largest entry, but to no less than this (1 in float64, whose bound is far tighter)


@dataclass(frozen=True)
class Difference:
    """The largest error of one output, gradient or buffer over all ranks, relative to the tensor's largest entry (see FLOOR)."""

    what: str  # 'output [loss]', 'gradient model.embed.weight', 'buffer bn.running_mean'
    mode: str  # 'train' | 'eval'
    rank: int
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # NB: false for NaN

    def __str__(self) -> str:
        return f"{self.mode} {self.what}: error {self.error:.2e} on rank {self.rank} (at most {self.tolerance:.0e})"


@dataclass(frozen=True)
class Report:
    """What was compared. `ok` if every difference is within its tolerance."""

    mesh: Mesh
    units: int
    differences: tuple[Difference, ...]
    collectives: dict[str, int] = field(default_factory=dict)  # name -> calls of rank 0 in one training step

    @property
    def ok(self) -> bool:
        return bool(self.differences) and all(d.ok for d in self.differences)

    @property
    def worst(self) -> Difference:
        return max(self.differences, key=lambda d: d.error / (d.tolerance or 1e-300) if d.error == d.error else float("inf"))

    def __str__(self) -> str:
        calls = ", ".join(f"{v} {k}" for k, v in sorted(self.collectives.items())) or "none"
        head = f"{len(self.differences)} tensors compared on {self.mesh.size * self.units} ranks ({self.mesh}, units={self.units})"
        bad = [d for d in self.differences if not d.ok]
        tail = "\n".join(f"  WRONG {d}" for d in bad[:20]) or f"  all equal; worst: {self.worst}"
        return f"{head}\n  collectives of a training step on rank 0: {calls}\n{tail}"

    def check(self) -> Report:
        """Raise VerifyError unless everything is equal within tolerance; otherwise return self."""
        if not self.ok:
            raise VerifyError(str(self))
        return self


def verify(
    module: nn.Module,
    dummy_forward_args: Mapping[str, Any],
    policy_or_plan: Any = "tp",
    compute_config: ComputeConfig | None = None,
    *,
    modes: tuple[str, ...] | None = None,
    seed: int = 0,
    tolerance: float | None = None,
    timeout: float = 300.0,
) -> Report:
    """Compile the module and run every rank in this process, taking turns; compare with the module itself.

    Compared are all tensor outputs on every rank, the gradient of every parameter and floating input under a random
    cotangent, and every buffer after the step; in train mode random ops draw the same numbers for the whole tensor on
    both sides (runtime/exact.py). In a float64 module casts to float32 become casts to float64 on both sides, so that
    everything is comparable to 1e-12. The module is not changed. With several scale units all take the same batch, so
    gradients are `units` times the original's.

    modes: of 'train' and 'eval'; None: both, or the one of the module where the generated code refuses the other.

    tolerance: None: by the dtype of each tensor, or by the coarsest in which the model computes (autocast): a sum in bfloat16 that is
    split rounds otherwise. A float64 module is compared to 1e-12 even then, because autocast leaves float64 alone.

    Returns the report; raises whatever compiling raises. `report.check()` raises VerifyError on a difference.
    """
    from autopar.driver import compile_module

    config = compute_config or ComputeConfig()
    compiled = compile_module(module, dummy_forward_args, policy_or_plan, config)
    return verify_compiled(module, dummy_forward_args, compiled, config, modes=modes, seed=seed, tolerance=tolerance, timeout=timeout)


def verify_compiled(
    module: nn.Module,
    args: Mapping[str, Any],
    compiled: Any,
    config: ComputeConfig,
    *,
    modes: tuple[str, ...] | None = None,
    seed: int = 0,
    tolerance: float | None = None,
    timeout: float = 300.0,
) -> Report:
    """As verify, for a module that is compiled already (autopar.driver.Compiled)."""
    from autopar.runtime import inproc

    program = compiled.program
    tolerance = tolerance or _coarsest(compiled.graph)
    differences: list[Difference] = []
    counted: dict[str, int] = {}
    if modes is None:
        modes = MODES if compiled.graph.branch is None else (MODES[not compiled.graph.training],)
    for mode in modes:
        original = copy.deepcopy(module).train(mode == "train")
        with stage(f"{mode} step of the original"), _exact(), _widen(module), _keep_rng():
            torch.manual_seed(seed)
            expected = _step(original, args, seed)
        grads = {n: p.grad for n, p in original.named_parameters(remove_duplicate=False)}
        buffers = dict(original.named_buffers())

        def run(mesh: Any, rank: int, mode: str = mode) -> tuple:
            return rank_step(module, args, compiled, mesh, mode, seed)

        with stage(f"{mode} step of {program.mesh.size * config.units} ranks"):
            ranks = inproc.run_ranks(program.mesh, run, timeout, seed, units=config.units)
        if mode == modes[0]:
            for r in ranks[0][3]:
                counted[r.name] = counted.get(r.name, 0) + 1
        for rank, (outs, local_grads, local_buffers, _) in enumerate(ranks):
            device = rank % program.mesh.size
            for what, a, b in _pairs(expected, outs):
                differences.append(_difference(what, mode, rank, a, b, tolerance))
            for t in compiled.graph.tensors:
                where = program.placement(t.name)
                if t.kind == "param":
                    g = grads.get(t.name)
                    want = None if g is None else shard(g * config.units, where, program.mesh, device)
                    differences.append(_difference(f"gradient {t.name}", mode, rank, want, local_grads.get(t.name), tolerance))
                elif t.kind == "buffer" and t.name in buffers:
                    want = shard(buffers[t.name], where, program.mesh, device)
                    differences.append(_difference(f"buffer {t.name}", mode, rank, want, local_buffers.get(t.name), tolerance))
    return Report(program.mesh, config.units, _worst_per_tensor(differences), counted)


def rank_step(
    module: nn.Module, args: Mapping[str, Any], compiled: Any, mesh: Any, mode: str, seed: int
) -> tuple[list[tuple[str, Tensor | None]], dict[str, Tensor | None], dict[str, Tensor], list]:
    """One rank's part of a step of the compiled module, in a process or a thread of its own: (outputs and input gradients,
    parameter gradients, buffers, collectives of this rank).
    """
    from autopar.codegen.load import load_module_class
    from autopar.runtime.axis import record

    weights = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    weights |= compiled.graph.constants
    local = load_module_class(compiled.texts)(mesh)
    local.end2end = False  # one forward and backward, with a cotangent of our own
    local.load(lambda name, slices: weights[name].detach()[slices], mesh.device)
    local.train(mode == "train")
    with _exact(), _widen(module), record() as log:
        outs = _step(local, args, seed)
        local.sync_grads()
    return outs, {n: p.grad for n, p in local.named_parameters()}, dict(local.named_buffers()), log


def shard(x: Tensor, t: Type, mesh: Mesh, device: int) -> Tensor:
    """The slice of a whole tensor that a device holds under a type (I, R and S axes)."""
    coords = mesh.coords(device)
    for dim in sorted({a.dim for a in t if a.kind == "S"}):
        for axis in nesting(t, dim):  # outermost first
            outer, k = t[axis].outer, mesh.sizes[axis]
            parts = x.unflatten(dim, (outer, x.shape[dim] // outer)).chunk(k, dim + 1)
            x = parts[coords[axis]].flatten(dim, dim + 1)
    return x


def _step(module: nn.Module, args: Mapping[str, Any], seed: int) -> list[tuple[str, Tensor | None]]:
    """Forward, and backward from a random cotangent; named outputs and input gradients, detached."""
    leaves = pytree.tree_map(lambda t: _leaf(t) if isinstance(t, Tensor) else t, dict(args))
    out = _call(module, leaves)
    named = [(f"output {_path(p)}", t) for p, t in pytree.tree_flatten_with_path(out)[0] if isinstance(t, Tensor)]
    gen = torch.Generator().manual_seed(seed + 7)
    total = None
    for _, t in named:
        if t.is_floating_point():
            weight = torch.rand(t.shape, generator=gen, dtype=torch.float64) + 0.5
            if t.requires_grad:
                term = (t * (weight.to(t) / max(1, t.numel()) ** 0.5)).sum()
                total = term if total is None else total + term
    if total is not None:
        total.backward()
    named += [
        (f"gradient of input {_path(p)}", t.grad)
        for p, t in pytree.tree_flatten_with_path(leaves)[0]
        if isinstance(t, Tensor) and t.requires_grad
    ]
    return [(n, None if t is None else t.detach()) for n, t in named]


def _call(module: nn.Module, given: dict[str, Any]) -> Any:
    """module(...) with arguments by name, positional-only ones, *args and **kwargs among them."""
    given = dict(given)
    args: list[Any] = []
    for p in inspect.signature(module.forward).parameters.values():
        if p.kind is p.POSITIONAL_ONLY and p.name in given:
            args.append(given.pop(p.name))
        elif p.kind is p.VAR_POSITIONAL and p.name in given:
            rest = given.pop(p.name)
            args += [given.pop(n) for n in _before(module, p.name) if n in given]
            args += rest
        elif p.kind is p.VAR_KEYWORD and isinstance(given.get(p.name), Mapping):
            given |= given.pop(p.name)
    return module(*args, **given)


def _before(module: nn.Module, name: str) -> list[str]:
    """Arguments that may be given by position and come before one."""
    params = list(inspect.signature(module.forward).parameters.values())
    return [p.name for p in params[: [p.name for p in params].index(name)] if p.kind is p.POSITIONAL_OR_KEYWORD]


def _leaf(t: Tensor) -> Tensor:
    """A fresh tensor of the same values; floating inputs ask for a gradient, so that theirs is compared too."""
    t = t.detach().clone()
    return t.requires_grad_() if t.is_floating_point() else t


def _pairs(a: list, b: list) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    mine, theirs = dict(b), dict(a)
    for name in [*theirs, *(n for n in mine if n not in theirs)]:
        yield name, theirs.get(name), mine.get(name)


def _difference(what: str, mode: str, rank: int, want: Tensor | None, got: Tensor | None, tolerance: float | None) -> Difference:
    if want is None or got is None:
        # a parameter without gradient on one side only is wrong, unless the other side's is zero
        other = got if want is None else want
        error = 0.0 if other is None else float(other.abs().max()) if other.numel() else 0.0
        return Difference(what, mode, rank, error, tolerance or 1e-12)
    limit = tolerance or TOLERANCE.get(want.dtype, 0.0)
    if want.shape != got.shape or want.dtype != got.dtype:
        what += f" (shape {tuple(got.shape)} {got.dtype}, expected {tuple(want.shape)} {want.dtype})"
        return Difference(what, mode, rank, float("inf"), limit)
    if not want.numel():
        return Difference(what, mode, rank, 0.0, limit)
    a, b = want.to(torch.float64), got.to(torch.float64)
    same = (a == b) | (a.isnan() & b.isnan())
    finite = a[a.isfinite()]
    floor = 1.0 if limit < 1e-6 else FLOOR
    scale = max(floor, float(finite.abs().max())) if finite.numel() else floor
    error = float(torch.where(same, 0.0, (a - b).abs() / scale).max())
    return Difference(what, mode, rank, error, limit)


def _coarsest(graph: Graph) -> float | None:
    """The tolerance of bfloat16 or float16 where the model computes in it anywhere; None where it does not."""
    found = {getattr(torch, v.dtype, None) for b in graph.blocks.values() for v in b.values}
    return max((TOLERANCE[d] for d in found & {torch.bfloat16, torch.float16}), default=None)


def _worst_per_tensor(differences: list[Difference]) -> tuple[Difference, ...]:
    worst: dict[tuple[str, str], Difference] = {}
    for d in differences:
        known = worst.get((d.mode, d.what))
        if known is None or not d.error <= known.error:
            worst[d.mode, d.what] = d
    return tuple(worst.values())


def _path(path: Any) -> str:
    return pytree.keystr(path) or "value"


class _Widen(TorchFunctionMode):
    """Casts to float32 become casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            func = Tensor.double
        if any(a is torch.float32 for a in args):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def _widen(module: nn.Module) -> Any:
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    return _Widen() if dtypes == {torch.float64} else nullcontext()


def _exact() -> Any:
    from autopar.runtime.exact import exact

    return exact()


@contextmanager
def _keep_rng() -> Iterator[Callable | None]:
    state = torch.get_rng_state()
    try:
        yield None
    finally:
        torch.set_rng_state(state)
