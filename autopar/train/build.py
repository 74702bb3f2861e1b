"""The components of a run, made from TrainerArgs: what the trainer's configure_* methods call.
Must not know the loop, nor how a model is made (modelling.py).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import nn
from torch.utils.data import IterableDataset

from autopar.errors import ConfigError, suggest
from autopar.runtime.mixed import mixed_precision
from autopar.runtime.module import ParallelModule
from autopar.runtime.optimizer import ParallelOptimizer, build_optimizer
from autopar.train.args import HookMapConfig, LogConfig, Name, TrainerArgs
from autopar.train.components import check_call, create, locate, resolve
from autopar.train.initial import cast
from autopar.train.modelling import find_policy, make_model, model_class

if TYPE_CHECKING:
    from autopar.train.hooks import TrainHook

__all__ = [
    "aggregate_fn",
    "cast_input",
    "init_env",
    "make_dataloader",
    "make_dataset",
    "make_hook",
    "make_loggers",
    "make_lr_scheduler",
    "make_model",
    "make_optimizer",
    "make_sampler",
    "model_class",
]
log = logging.getLogger("autopar")
SAMPLER_GIVEN = ("dataset", "num_replicas", "rank")
LOADER_GIVEN = ("dataset", "batch_size", "sampler")
LOGGERS = {
    "ConsoleLogger": "autopar.train.console.ConsoleLogger",
    "JsonLinesLogger": "autopar.train.loggers.JsonLinesLogger",
    "TensorBoardLogger": "autopar.train.loggers.TensorBoardLogger",
    "WandbLogger": "autopar.train.loggers.WandbLogger",
}


def init_env(args: TrainerArgs, trainer: Any) -> None:
    """Seed Python, NumPy and torch, and call init_env_fn(trainer): on every rank alike, before anything is built.

    First all classes and functions that are named are imported: a wrong name is not met after a long compile only, and what an import
    draws is drawn before the seed is set.
    """
    check_names(args)
    if args.seed is not None:
        import numpy

        random.seed(args.seed)
        numpy.random.seed(args.seed % 2**32)
        torch.manual_seed(args.seed)
    if args.init_env_fn is not None:
        locate(args.init_env_fn, "init_env_fn")(trainer)


def check_names(config: Any, where: str = "") -> None:
    """Raise ConfigError for the first class or function of a configuration that cannot be found."""
    hints = get_type_hints(type(config), include_extras=True)
    for f in fields(config):
        value, here = getattr(config, f.name), f"{where}.{f.name}".lstrip(".")
        if f.name == "pas_policy":
            find_policy(value, here) if value is not None else None
        elif hints[f.name] in (Name, Name | None):
            locate(_logger(value, here) if isinstance(config, LogConfig) else value, here) if value is not None else None
        for i, inner in [("", value)] if is_dataclass(value) else enumerate(value) if isinstance(value, list) else ():
            check_names(inner, f"{here}.{i}".rstrip("."))


def make_optimizer(args: TrainerArgs, model: nn.Module) -> ParallelOptimizer:
    """NB: collective."""
    o = args.optimizer
    make = locate(o.type, "optimizer.type")
    own = {k: resolve(v, f"optimizer.args.{k}") for k, v in o.args.items()}
    check_call(make, own, "optimizer.args", (None,), {})
    groups = locate(o.param_group_fn, "optimizer.param_group_fn") if o.param_group_fn else None
    config = next((m.compute_config for m in model.modules() if isinstance(m, ParallelModule)), args.compute_config)
    return build_optimizer(model, mixed_precision(make) if o.master_weights else make, config, param_group_fn=groups, **own)


def make_lr_scheduler(args: TrainerArgs, optimizer: Any) -> Any | None:
    if args.lr_scheduler is None:
        return None
    return create(locate(args.lr_scheduler.type, "lr_scheduler.type"), args.lr_scheduler.args, "lr_scheduler.args", optimizer)


def make_dataset(args: TrainerArgs, split: str) -> Any | None:
    """The data set of a split; None for validation where it has no arguments."""
    own = getattr(args.dataset, f"{split}_args")
    if split != "train" and not own:
        return None
    return create(locate(args.dataset.type, "dataset.type"), own, f"dataset.{split}_args")


def make_sampler(args: TrainerArgs, split: str, dataset: Any, num_replicas: int, rank: int) -> Any | None:
    """The sampler; None for an IterableDataset, which takes none."""
    if isinstance(dataset, IterableDataset):
        return None
    s, where = args.dataset_sampler, f"dataset_sampler.{split}_args"
    own = _without(getattr(s, f"{split}_args"), SAMPLER_GIVEN, where)
    return create(locate(s.type, "dataset_sampler.type"), own, where, dataset=dataset, num_replicas=num_replicas, rank=rank)


def make_dataloader(args: TrainerArgs, split: str, dataset: Any, sampler: Any) -> Any:
    d = args.dataloader
    where = f"dataloader.{split if getattr(d, f'{split}_args') else 'train'}_args"
    own = _without(getattr(d, where.partition(".")[2]), LOADER_GIVEN, where)
    return create(locate(d.type, "dataloader.type"), own, where, dataset=dataset, batch_size=args.micro_batch_size, sampler=sampler)


def _without(own: Mapping[str, Any], given: tuple[str, ...], where: str) -> dict[str, Any]:
    for key in (k for k in own if k in given):
        log.warning("%s.%s is ignored: the trainer sets it%s", where, key, " to micro_batch_size" if key == "batch_size" else "")
    return {k: v for k, v in own.items() if k not in given}


def make_loggers(args: TrainerArgs) -> list[Any]:
    """The console, then those of the configuration. For rank 0 only."""
    console = {"progress_bar": args.enable_progress_bar, "every_n_steps": args.log_progress_every_n_train_steps}
    made = [create(locate(LOGGERS["ConsoleLogger"], ""), {}, "console", **console)]
    for i, config in enumerate(args.log):
        where = f"log.{i}"
        logger = create(locate(_logger(config.type, f"{where}.type"), f"{where}.type"), config.args, f"{where}.args")
        absent = [m for m in ("setup", "log_metrics", "flush", "finalize") if not callable(getattr(logger, m, None))]
        if absent:
            raise ConfigError(f"{where}.type {config.type!r} made a {type(logger).__name__}, which has no {', '.join(absent)}")
        made.append(logger)
    return made


def _logger(name: Any, where: str) -> Any:
    """The full name of a logger of autopar's; others as they are."""
    if not isinstance(name, str) or "." in name or ":" in name:
        return name
    if name not in LOGGERS:
        raise ConfigError(f"{where}: unknown logger {name!r}: {suggest(name, LOGGERS)}, or 'package.module.Name' of your own")
    return LOGGERS[name]


def make_hook(args: TrainerArgs) -> TrainHook | None:
    """The configured hook: an object, or a map of functions as one."""
    from autopar.train.hooks import HookMap, TrainHook

    if args.hook is None:
        return None
    if isinstance(args.hook, HookMapConfig):
        named = {f.name: getattr(args.hook, f.name) for f in fields(args.hook)}
        return HookMap({n: locate(fn, f"hook.{n}") for n, fn in named.items() if fn is not None})
    made = create(locate(args.hook.type, "hook.type"), args.hook.args, "hook.args")
    if not isinstance(made, TrainHook):
        raise ConfigError(f"hook.type {args.hook.type!r} made a {type(made).__name__}; it must be a subclass of autopar.train.TrainHook")
    return made


def aggregate_fn(args: TrainerArgs) -> Callable[..., Any] | None:
    """The user's aggregate_outputs(loss_outputs, sync_group)."""
    name = args.optimizer.aggregate_outputs_fn
    return None if name is None else locate(name, "optimizer.aggregate_outputs_fn")


def cast_input(args: TrainerArgs) -> Callable[[Any], Any]:
    """A function that brings the floating tensors of a sample to the input precision."""
    return partial(cast, precision=args.precision)
