"""The model of a run: built from its class and parallelised, as a whole or some of its parts.
Must not know how code is generated or trained, nor how weights are read (initial.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from autopar.codegen.identity import structure
from autopar.config import BroadcastStrategy, ComputeConfig
from autopar.driver import compile_to, parallelize
from autopar.errors import ConfigError, suggest
from autopar.runtime.groups import alone, fail_together, init, local_device
from autopar.runtime.launch import distribute
from autopar.runtime.module import ParallelModule
from autopar.train.checks import check_policy
from autopar.train.components import create, locate, resolve
from autopar.train.initial import cast, convert, load_weights

if TYPE_CHECKING:
    from autopar.train.args import ModuleParallelizeConfig, TrainerArgs

REDUCER = ("use_zero", "zero_ngroups", "zero_use_reduce_scatter", "use_async_reducer", "reducer_bucket_cap_mb")


def make_model(args: TrainerArgs, sample: Any) -> nn.Module | None:
    """The model on this rank's device; None after compiling in run_mode 'compile'. NB: collective.

    sample: one collated micro batch, which the whole model is traced with. Seeds are set before, on every rank alike.
    """
    cls = model_class(args)

    def make() -> nn.Module:
        return create(cls, args.model.args, "model.args")

    if args.model.parallel_modules:
        return _with_parallel_parts(args, make())

    def prepared() -> nn.Module:
        model = make()
        if args.tracing_from_weights:
            load_weights(model, args.tracing_from_weights, "tracing_from_weights")
        return convert(model, args.precision)

    assert args.compute_config is not None
    dummy = {_first_argument(cls): cast(sample, args.precision)}
    return _Compile.of(args).run(cls, prepared, dummy)


def model_class(args: TrainerArgs) -> type[nn.Module]:
    """The class that model.type names. Raises ConfigError for anything else."""
    return _module_class(args.model.type, "model.type")


def _module_class(name: Any, where: str) -> type[nn.Module]:
    found = locate(name, where)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        kind = "a class, but no torch.nn.Module" if isinstance(found, type) else "no class (a function that makes one will not do)"
        raise ConfigError(f"{where} {name!r} is {kind}; name a subclass of torch.nn.Module")
    return found


def _first_argument(cls: type[nn.Module]) -> str:
    names = list(inspect.signature(cls.forward).parameters)[1:]
    if not names:
        raise ConfigError(f"the forward of {cls.__qualname__} takes no argument; it has to take one sample and return the loss first")
    return names[0]


# ---- compiling ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Compile:
    """The settings of one compile: the trainer's, with a parallel module's own in front."""

    config: ComputeConfig
    policy: Any
    gen_savedir: str
    reuse: str
    broadcast_strategy: str
    instance_name: str | None
    compile_only: bool

    @classmethod
    def of(cls, args: TrainerArgs, part: ModuleParallelizeConfig | None = None, where: str = "") -> _Compile:
        def pick(name: str) -> Any:
            own = getattr(part, name) if part else None
            return getattr(args, name) if own is None else own

        config = args.compute_config
        assert config is not None
        if part is not None:
            own = asdict(part.compute_config) if part.compute_config else {}
            try:
                config = replace(config, use_end2end=False, **{k: v for k, v in own.items() if v is not None})
            except ConfigError as e:
                raise ConfigError(f"{where}.compute_config: {e}") from e
        config = replace(config, **{k: resolve(getattr(config, k), f"compute_config.{k}") for k in ("pas_config", "user_config")})
        compiling = args.run_mode == "compile"
        reuse = pick("gen_reuse")
        reuse = ("moo" if compiling else "match") if reuse == "auto" else reuse
        own_policy = where if part and part.pas_policy is not None else ""
        policy = find_policy(pick("pas_policy"), f"{own_policy}.pas_policy".lstrip("."))
        return cls(config, policy, pick("gen_savedir"), reuse, pick("broadcast_strategy"), pick("instance_name"), compiling)

    def run(self, cls: type[nn.Module], make: Callable[[], nn.Module], dummy: Mapping[str, Any]) -> Any:
        """The parallel module of what make() makes, an instance of cls; None where code is generated only."""
        settings: dict[str, Any] = {"gen_savedir": self.gen_savedir, "reuse": self.reuse, "instance_name": self.instance_name}
        if not self.compile_only:
            settings["broadcast_strategy"] = self.broadcast_strategy
            return parallelize(cls, dummy, self.policy, self.config, module_fn=make, **settings)()

        def build() -> Path:
            return compile_to(make(), dummy, self.policy, self.config, **settings)

        if alone():
            build()
            return None
        init()
        box = [fail_together("compile", lambda: build() if dist.get_rank() == 0 else None)]
        dist.broadcast_object_list(box, src=0)
        assert box[0] is not None
        here = Path(self.gen_savedir).absolute() / box[0].relative_to(self.gen_savedir)
        distribute(box[0].absolute(), here, BroadcastStrategy.of(self.broadcast_strategy))
        return None


def find_policy(policy: Any, where: str) -> Any:
    """A built-in policy's name, the path of a plan.json, or the function that a name stands for. Raises ConfigError."""
    if not isinstance(policy, str) or policy.endswith(".json"):
        return policy
    check_policy(policy, where)
    return locate(policy, where) if "." in policy or ":" in policy else policy


# ---- parts of a model -----------------------------------------------------------------------------------------


def _with_parallel_parts(args: TrainerArgs, model: nn.Module) -> nn.Module | None:
    parts = args.model.parallel_modules
    wheres = [f"model.parallel_modules.{i}" for i in range(len(parts))]
    classes = [_module_class(p.type, f"{w}.type") for p, w in zip(parts, wheres, strict=True)]
    compiles = [_Compile.of(args, p, w) for p, w in zip(parts, wheres, strict=True)]
    _check_reducers(compiles, wheres)
    if args.tracing_from_weights and not any(p.tracing_from_weights_prefix is not None for p in parts):
        load_weights(model, args.tracing_from_weights, "tracing_from_weights")
    places = list(_places(model, classes))
    for cls, part, compiled, where in zip(classes, parts, compiles, wheres, strict=True):
        mine = [p for p in places if type(p.module) is cls]
        if not mine:
            names = {type(m).__qualname__ for m in model.modules()} - {type(model).__qualname__}
            raise ConfigError(f"{where}.type: the model has no part of the class {cls.__qualname__}: {suggest(cls.__qualname__, names)}")
        precision = args.precision if part.precision is None else part.precision
        first: dict[int, _Place] = {}
        for p in mine:
            first.setdefault(id(p.module), p)
        for p in first.values():
            _check_like_args(part, cls, p, where)
            _own_weights(args, part, p.module, where)
            convert(p.module, precision)
        dummy = cast(_forward_args(args, part, where), precision)
        _replace(mine, cls, compiled, dummy)
    if args.run_mode == "compile":
        return None
    parallel = [m for m in model.modules() if isinstance(m, ParallelModule)]
    inside = {id(t) for m in parallel for t in [*m.parameters(), *m.buffers()]}
    return convert(model, args.precision, skip=inside).to(local_device())


@dataclass(frozen=True)
class _Place:
    parent: nn.Module
    name: str
    path: str
    module: nn.Module


def _places(model: nn.Module, classes: Collection[type], path: str = "") -> Iterator[_Place]:
    """Where modules of the classes are, the outermost ones. NB: exactly these classes: a subclass is another one."""
    for name, child in model._modules.items():
        if child is not None:
            full = f"{path}.{name}".lstrip(".")
            if type(child) in classes:
                yield _Place(model, name, full, child)
            else:
                yield from _places(child, classes, full)


def _replace(places: list[_Place], cls: type[nn.Module], compiled: _Compile, dummy: Mapping[str, Any]) -> None:
    """Put a parallel module at every place, with the weights of the one that is there.

    Modules that differ in nothing but weights share generated code; another kind gets a folder with its place in the name.
    """
    made: dict[int, Any] = {}
    kinds: list[tuple[dict[str, Any], _Compile]] = []
    for p in places:
        if id(p.module) not in made:
            kind = structure(p.module)
            known = next((c for k, c in kinds if k == kind), None)
            if known is None:
                name = compiled.instance_name if not kinds else f"{compiled.instance_name or 'at'}-{p.path}"
                known = replace(compiled, instance_name=name)
                kinds.append((kind, replace(known, reuse="match")))  # the next of the kind uses what is made now
            made[id(p.module)] = known.run(cls, lambda m=p.module: m, dummy)
        if not compiled.compile_only:
            p.parent._modules[p.name] = made[id(p.module)]


def _check_reducers(compiles: list[_Compile], wheres: list[str]) -> None:
    first = compiles[0].config
    for c, where in zip(compiles, wheres, strict=True):
        for name in REDUCER:
            mine, others = getattr(c.config, name), getattr(first, name)
            if mine != others:
                raise ConfigError(
                    f"{where}.compute_config.{name} is {mine}, and {others} for {wheres[0]}; gradients of the whole model are summed by "
                    f"one reducer, so that all parallel modules need the same"
                )


def _check_like_args(part: ModuleParallelizeConfig, cls: type[nn.Module], place: _Place, where: str) -> None:
    if not part.args:
        return
    with torch.random.fork_rng(devices=[]):
        like = {n: tuple(p.shape) for n, p in create(cls, part.args, f"{where}.args").named_parameters()}
    here = {n: tuple(p.shape) for n, p in place.module.named_parameters()}
    for name in {**like, **here}:
        if like.get(name) != here.get(name):
            raise ConfigError(
                f"{where}.args describe another {cls.__qualname__} than the one at {place.path}: {name} is {like.get(name, 'absent')} by "
                f"args, {here.get(name, 'absent')} in the model; leave args out, or name a subclass for each kind"
            )


def _forward_args(args: TrainerArgs, part: ModuleParallelizeConfig, where: str) -> Mapping[str, Any]:
    with torch.random.fork_rng(devices=[]):  # dummy values are no part of the run
        made = locate(part.forward_args_gen_fn, f"{where}.forward_args_gen_fn")(args)
    if not isinstance(made, Mapping):
        raise ConfigError(f"{where}.forward_args_gen_fn returned {type(made).__name__}; it must return a dict: argument name to value")
    return made


def _own_weights(args: TrainerArgs, part: ModuleParallelizeConfig, module: nn.Module, where: str) -> None:
    if part.tracing_from_weights:
        load_weights(module, part.tracing_from_weights, f"{where}.tracing_from_weights")
    elif part.tracing_from_weights_prefix is not None:
        assert args.tracing_from_weights is not None
        load_weights(module, args.tracing_from_weights, f"{where}.tracing_from_weights_prefix", part.tracing_from_weights_prefix)
