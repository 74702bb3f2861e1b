"""build_optimizer and ParallelOptimizer: any torch optimizer over a model with parallel modules inside.
Must not know how gradients are summed (reducer.py) nor how a norm is made (norm.py): it calls them in the right order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autopar.config import ComputeConfig
from autopar.errors import ConfigError, LayoutError, suggest
from autopar.runtime.axis import Axis
from autopar.runtime.buckets import Item, Piece, collect_items
from autopar.runtime.elementwise import why_not_elementwise
from autopar.runtime.mesh import UNITS
from autopar.runtime.mixed import MixedPrecision
from autopar.runtime.module import ParallelModule
from autopar.runtime.norm import GradNorm, count_copies
from autopar.runtime.reducer import GradReducer
from autopar.runtime.wrapper import Wrapper

FREE_KEYS = ("name", "initial_lr", "params")  # of a parameter group, besides the optimizer's and those that begin with '_'


def build_optimizer(
    module: nn.Module,
    optimizer_fn: Callable[..., Optimizer],
    compute_config: ComputeConfig | Mapping[str, Any] | None = None,
    *,
    param_group_fn: Callable[[str], Mapping[str, Any] | None] | None = None,
    **kwargs: Any,
) -> ParallelOptimizer:
    """The optimizer of a model: a ParallelModule, or an ordinary module with ParallelModules inside. NB: collective.

    optimizer_fn: a torch.optim class, mixed_precision of one, or a function (groups, **kwargs) -> torch Optimizer.
    compute_config: says how gradients are summed (use_zero, zero_ngroups, zero_use_reduce_scatter, use_async_reducer,
        reducer_bucket_cap_mb); without it, the configuration the module was compiled with, if it knows it.
    param_group_fn: original parameter name -> options of its group, or None for kwargs alone; equal options make one group.

    Raises ConfigError where the optimizer updates other parameters than the module's, and where it needs a parameter whole
    (Adafactor, Muon, LBFGS, ...) that is sharded or cut up by ZeRO.
    """
    config = _config(module, compute_config)
    for path, m in module.named_modules():
        if "_grad_reducer" in vars(m):
            raise ConfigError(f"{path or 'the module'} has an optimizer already; build one for the whole model")
    if isinstance(optimizer_fn, Optimizer) or not callable(optimizer_fn):
        raise ConfigError(f"optimizer_fn is {optimizer_fn!r:.60}; give a class, e.g. torch.optim.AdamW, and its settings as arguments")
    unloaded = [n for n, p in module.named_parameters() if p.is_meta]
    if unloaded:
        raise ConfigError(f"parameter {unloaded[0]} has no memory yet (device meta); load weights before the optimizer is built")
    items = collect_items(module)
    if not items:
        raise ConfigError("the module has no parameter that requires a gradient")
    shapes = _whole_shapes(module, items)
    options = {i.name: _options(i.name, param_group_fn) for i in items}
    _check_elementwise(optimizer_fn, config, items, shapes, options, kwargs)
    reducer = _Reducer(
        module,
        items,
        zero=int(config.use_zero),
        zero_ngroups=config.zero_ngroups,
        use_reduce_scatter=getattr(config, "zero_use_reduce_scatter", False),
        use_async=getattr(config, "use_async_reducer", False),
        bucket_mb=getattr(config, "reducer_bucket_cap_mb", None) or 25.0,
    )
    optimizer = optimizer_fn(_groups(items, reducer.pieces, options), **kwargs)
    _check_parameters(optimizer, reducer.pieces)
    _check_keys(optimizer, options)
    mesh = items[0].mesh
    return ParallelOptimizer(module, optimizer, reducer, mesh.join((UNITS, *mesh.names)), {n: prod(s) for n, s in shapes.items()})


class _Reducer(GradReducer):
    """Knows what has become of this step's gradients, whoever asked for it: the optimizer or train_step."""

    seen = summed = stepped = False
    forget: Callable[[], None] | None = None  # what else to do when gradients are forgotten

    def reduce(self) -> None:
        super().reduce()
        self.summed = True

    def zero_grad(self) -> None:
        super().zero_grad()
        self.seen = self.summed = self.stepped = False
        if self.forget is not None:
            self.forget()


class ParallelOptimizer(Wrapper):
    """See build_optimizer. As any torch optimizer, of which learning-rate schedulers and GradScaler ask no more.

    .optimizer: the wrapped one; .param_groups, .state and .defaults are its. .reducer, .module.
    Gradients are summed over scale units, once per step, at the first of sync_shard_grad, scale_grads, clip_gnorm and step.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, reducer: _Reducer, world: Axis, numels: Mapping[str, int]):
        super().__init__(optimizer)
        self.module, self.reducer = module, reducer
        held = dict.fromkeys(numels, 0)
        for p in reducer.pieces:
            held[p.name] += p.stop - p.start
        names, device = [p.name for p in reducer.pieces], reducer.items[0].param.device
        copies = dict(zip(numels, count_copies(list(held.values()), list(numels.values()), list(numels), world, device), strict=True))
        mixed = optimizer if isinstance(optimizer, MixedPrecision) else None
        updated = [mixed.masters[p.param] if mixed else p.param for p in reducer.pieces]
        self._norm = GradNorm(updated, [copies[n] for n in names], names, world, device)
        self._other = torch.zeros((), device=device)  # stands for the gradients of other ranks; see _groups_to_unscale
        reducer.forget = optimizer.zero_grad
        known = {id(i.param) for i in reducer.items}
        self._left_out = [(n, p) for n, p in module.named_parameters() if id(p) not in known]
        for m in module.modules():
            if m is module or isinstance(m, ParallelModule):
                m._grad_reducer = reducer
        for i in reducer.items:
            i.param.register_post_accumulate_grad_hook(self._backward_ran)

    # -- gradients

    def _backward_ran(self, param: Tensor) -> None:
        if self.reducer.summed:
            raise LayoutError(
                "a backward ran after the gradients were summed over the ranks: call zero_grad() after each step, "
                "and clip_gnorm(), scale_grads() or sync_shard_grad() after its last backward"
            )
        self.reducer.seen = True

    def sync_shard_grad(self) -> None:
        """Sum the gradients over the ranks and put them on the parameters of the groups. Once per step; a second call does nothing."""
        if not self.reducer.summed:
            if not self.reducer.seen and all(i.param.grad is None for i in self.reducer.items):
                raise LayoutError("no parameter has a gradient: call backward() on the loss before the optimizer's step")
            late = [n for n, p in self._left_out if p.grad is not None]
            if late:
                raise LayoutError(f"{late[0]} has a gradient, but was frozen when the optimizer was built; unfreeze it before that")
            self.reducer.reduce()
        if isinstance(self.optimizer, MixedPrecision):
            self.optimizer.collect()

    def scale_grads(self, factor: float | Tensor) -> None:
        """Multiply all gradients, e.g. by 1 / number of scale units: gradients are summed over units, not averaged."""
        self.sync_shard_grad()
        self._norm.scale(factor)

    def clip_gnorm(self, max_norm: float | None = None, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the gradient of the whole model to a norm (None: leave it) and return the norm it had, the same on every rank.

        Every entry of the original model counts once, wherever it is held. The norm may be infinite or NaN, as torch's;
        error_if_nonfinite makes that an AutoparError on every rank, which names the parameters.
        """
        self.sync_shard_grad()
        return self._norm.clip(max_norm, error_if_nonfinite)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not set_to_none:
            raise ConfigError("gradients live in buckets that stay; zero_grad(set_to_none=False) is not supported, leave it out")
        self.reducer.zero_grad()

    def register_reducer_pre_hook(self, fn: Callable[[GradReducer, Tensor], None]) -> Any:
        """fn(reducer, flat gradients of a bucket) before each bucket is summed."""
        return self.reducer.register_pre_hook(fn)

    def register_reducer_post_hook(self, fn: Callable[[GradReducer, Tensor], None]) -> Any:
        """fn(reducer, flat gradients of a bucket) after each bucket has been summed."""
        return self.reducer.register_post_hook(fn)

    def _groups_to_unscale(self) -> list[dict[str, Any]]:
        """For GradScaler: summed gradients; and where another rank has an infinite one, so has this: all skip the step, or none."""
        self.sync_shard_grad()
        found = self._norm.found_inf()
        self._other.grad = torch.where(found > 0, torch.inf, torch.zeros_like(found))
        return [*self.optimizer.param_groups, {"params": [self._other]}]

    # -- the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Sum gradients if that is not done, update this rank's pieces, and give them to all ranks that hold the parameter.

        Raises LayoutError before any backward, and for a second step on the same gradients.
        """
        if closure is not None:
            evaluations = 0

            def evaluate() -> Any:
                nonlocal evaluations
                if evaluations:
                    self.reducer.publish()  # what the optimizer has made of its pieces meanwhile
                evaluations += 1
                with torch.enable_grad():
                    loss = closure()
                self.sync_shard_grad()
                return loss

            out = self.optimizer.step(evaluate)
        else:
            if self.reducer.stepped:
                raise LayoutError("step() a second time on the same gradients; call zero_grad() and backward() between two steps")
            self.sync_shard_grad()
            out = self.optimizer.step()
        self.reducer.stepped = True
        self.reducer.publish()
        return out

    # -- state by piece

    def named_pieces(self) -> list[tuple[Piece, dict[str, Any]]]:
        """What this rank updates, and its state: scalars, and tensors shaped like the piece's parameter (the float32 master among them)."""
        mixed = isinstance(self.optimizer, MixedPrecision)
        return [(p, self.optimizer.state_of(p.param) if mixed else self.state.get(p.param, {})) for p in self.reducer.pieces]

    def load_piece(self, piece: Piece, state: Mapping[str, Any]) -> None:
        """Replace the state of one piece by what named_pieces gave."""
        if isinstance(self.optimizer, MixedPrecision):
            self.optimizer.load_state_of(piece.param, dict(state))
        else:
            self.state[piece.param] = dict(state)


# -- building


def _config(module: nn.Module, given: ComputeConfig | Mapping[str, Any] | None) -> ComputeConfig:
    """The given configuration; a dict changes settings of the one that the module was compiled with."""
    parts = [m for m in module.modules() if isinstance(m, ParallelModule)]
    known = next((c for m in parts if (c := m.compute_config) is not None), None)
    config = given if isinstance(given, ComputeConfig) else ComputeConfig.of({**(known.to_dict() if known else {}), **(given or {})})
    if config.inference_only:
        raise ConfigError("the module was compiled with inference_only=True; it cannot be trained")
    for m in parts:
        if isinstance(given, ComputeConfig) and m.mesh.unit_size != config.plan_ngpus:
            raise ConfigError(f"compute_config says plan_ngpus={config.plan_ngpus}, but the module was compiled for {m.mesh.unit_size}")
    return config


def _whole_shapes(module: nn.Module, items: list[Item]) -> dict[str, tuple[int, ...]]:
    """The shape of every trained parameter in the original model."""
    found = {i.name: tuple(i.param.shape) for i in items}
    for path, m in module.named_modules():
        if isinstance(m, ParallelModule):
            prefix = path + "." if path else ""
            found |= {prefix + n: p.shape for n, p in m.named_placements().items() if prefix + n in found}
    return found


def _options(name: str, param_group_fn: Callable[[str], Mapping[str, Any] | None] | None) -> dict[str, Any]:
    options = param_group_fn(name) if param_group_fn else None
    if options is not None and (not isinstance(options, Mapping) or "params" in options):
        raise ConfigError(f"param_group_fn({name!r}) returned {options!r:.60}; it returns a dict of options such as lr, or None")
    return dict(options or {})


def _groups(items: list[Item], pieces: tuple[Piece, ...], options: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups in order of their first parameter, the same on all ranks: one of which this rank updates no piece is empty."""
    groups: list[dict[str, Any]] = []
    index: dict[str, int] = {}
    for i in items:
        mine = options[i.name]
        known = next((k for k, g in enumerate(groups) if {a: b for a, b in g.items() if a != "params"} == mine), None)
        if known is None:
            known = len(groups)
            groups.append({"params": [], **mine})
        index[i.name] = known
    for p in pieces:
        groups[index[p.name]]["params"].append(p.param)
    return groups


def _check_elementwise(make: Any, config: ComputeConfig, items: Any, shapes: Any, options: Any, kwargs: Mapping[str, Any]) -> None:
    """NB: on every rank alike, though ZeRO may leave this one a parameter whole."""
    tried: list[tuple[dict, str | None]] = []
    for i in items:
        cut = tuple(i.param.shape) != tuple(shapes[i.name])
        if not cut and not config.use_zero:
            continue
        mine = options[i.name]
        why = next((w for o, w in tried if o == mine), "")
        if why == "":
            why = why_not_elementwise(make, mine, kwargs)
            tried.append((mine, why))
        if why is None:
            continue
        name = _name(make)
        where = "the plan shards it" if cut else "use_zero cuts it into pieces"
        instead = "a plan that keeps parameters whole (dp)" if cut else "use_zero=False"
        raise ConfigError(
            f"{name} cannot update {i.name}: it needs the parameter whole, and {where}. Found by trying: {why}. "
            f"Use an optimizer that treats every entry by itself (AdamW, SGD, ...), or {instead}"
        )


def _name(make: Any) -> str:
    if isinstance(make, partial):
        return _name(make.args[0]) if make.func is MixedPrecision else _name(make.func)
    return getattr(make, "__name__", None) or repr(make)


def _check_parameters(optimizer: Any, pieces: tuple[Piece, ...]) -> None:
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"optimizer_fn returned {type(optimizer).__name__}; it must return a torch.optim.Optimizer")
    sources = optimizer.sources if isinstance(optimizer, MixedPrecision) else [p for g in optimizer.param_groups for p in g["params"]]
    known = {id(p.param): p.name for p in pieces}
    foreign = [p for p in sources if id(p) not in known]
    if foreign:
        shapes = ", ".join(str(tuple(p.shape)) for p in foreign[:3])
        raise ConfigError(
            f"the optimizer updates {len(foreign)} tensors that are not parameters of the module (shapes {shapes}, ...); "
            f"it has to be made over the groups that optimizer_fn is given: lambda groups, **kwargs: torch.optim.AdamW(groups, **kwargs)"
        )
    left = known.keys() - {id(p) for p in sources}
    if left:
        names = sorted(known[i] for i in left)
        raise ConfigError(f"the optimizer leaves out {', '.join(names[:3])}; freeze what is not to be trained with requires_grad_(False)")


def _check_keys(optimizer: Optimizer, options: dict[str, dict[str, Any]]) -> None:
    for name, mine in options.items():
        for key in mine:
            if key not in optimizer.defaults and key not in FREE_KEYS and not key.startswith("_"):
                raise ConfigError(f"param_group_fn({name!r}) sets {key!r}, which the optimizer has not: {suggest(key, optimizer.defaults)}")
