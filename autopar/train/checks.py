"""What a run's settings have to be together: parts that are missing, batch sizes, the processes that a run needs.
Must not know how components are built; the types of single values are checked by fill.py.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from autopar.errors import ConfigError

if TYPE_CHECKING:
    from autopar.train.args import TrainerArgs


def check(args: TrainerArgs, *, launched: bool) -> tuple[int, int]:
    """Raise ConfigError for settings that cannot be; return gradient accumulation and global batch size."""
    _parts(args)
    config = args.compute_config
    assert config is not None
    check_policy(args.pas_policy, "pas_policy")
    if args.seed is None and args.init_env_fn is None:
        raise ConfigError("seed is missing: set seed to a number, or init_env_fn to a function that seeds every rank alike")
    if args.optimizer.grad_reduction == "per-token-mean" and args.optimizer.aggregate_outputs_fn is None:
        raise ConfigError("optimizer.grad_reduction 'per-token-mean' needs optimizer.aggregate_outputs_fn, which counts the tokens")
    if args.run_mode == "run":
        if config.inference_only:
            raise ConfigError("compute_config.inference_only is true: the model cannot be trained; leave it out, or set run_mode: compile")
        if launched and config.runtime_ngpus > 1 and "RANK" not in os.environ:
            n = config.runtime_ngpus
            raise ConfigError(
                f"run_mode 'run' on {n} devices needs {n} processes, and this is a single one: launch it with `autopar train -f ...` or "
                f"`torchrun --nproc_per_node {n} -m autopar.cli.train -f ...`; or only generate code, with run_mode: compile"
            )
    return batch_sizes(args)


def batch_sizes(args: TrainerArgs) -> tuple[int, int]:
    """(grad_accumulation_steps, global_batch_size), each from the other where it is not given. Raises ConfigError if they disagree."""
    one = args.micro_batch_size * args.units
    steps, total = args.grad_accumulation_steps, args.global_batch_size
    product = f"micro_batch_size {args.micro_batch_size} x {args.units} scale units"
    if total is None:
        return steps or 1, one * (steps or 1)
    if total % one:
        near = max(1, round(total / one)) * one
        raise ConfigError(f"global_batch_size {total} is not a multiple of {product} = {one}; use for example {near}")
    if steps is not None and one * steps != total:
        raise ConfigError(
            f"global_batch_size {total} and grad_accumulation_steps {steps} contradict: {product} x {steps} = {one * steps}; "
            f"leave one of them out, or set grad_accumulation_steps to {total // one}"
        )
    return total // one, total


def check_policy(policy: Any, where: str) -> None:
    """Raise ConfigError for a name that is no built-in policy's and no path."""
    if isinstance(policy, str) and not {".", ":"} & set(policy):
        from autopar.pas.policies import get_policy

        try:
            get_policy(policy)
        except ConfigError as e:
            raise ConfigError(f"{where}: {e}, by its name 'package.module.name'") from e


def _parts(args: TrainerArgs) -> None:
    if args.compute_config is None:
        raise ConfigError("compute_config is missing; give at least plan_ngpus, runtime_ngpus and use_end2end: true")
    needed: dict[str, Any] = {"model": args.model, "optimizer": args.optimizer, "dataset": args.dataset}
    needed |= {f"model.parallel_modules.{i}": m for i, m in enumerate(args.model.parallel_modules)}
    needed |= {"lr_scheduler": args.lr_scheduler} if args.lr_scheduler else {}
    needed |= {f"log.{i}": logger for i, logger in enumerate(args.log)}
    needed |= {"hook": args.hook} if hasattr(args.hook, "type") else {}
    for where, part in needed.items():
        if part.type is None:
            raise ConfigError(f"{where}.type is missing: the name of a class or function, such as 'package.module.Name'")
    if not args.compute_config.use_end2end and not args.model.parallel_modules:
        raise ConfigError(
            "compute_config.use_end2end is not set, and a model is trained as a whole only with it: set compute_config.use_end2end: true "
            "(forward takes one sample and returns the loss first), or name the parts to parallelise in model.parallel_modules"
        )
    known: dict[str, int] = {}
    for i, m in enumerate(args.model.parallel_modules):
        where, name = f"model.parallel_modules.{i}", str(m.type)
        if name in known:
            raise ConfigError(
                f"{where}.type {name!r} is listed already, as model.parallel_modules.{known[name]}; a class is parallelised once. "
                f"For other arguments use a subclass of it (class Alias({name.rpartition('.')[2]}): pass) in the model and here"
            )
        known[name] = i
        check_policy(m.pas_policy, f"{where}.pas_policy")
        if m.forward_args_gen_fn is None:
            raise ConfigError(f"{where}.forward_args_gen_fn is missing: a function (TrainerArgs) -> dict of dummy arguments of its forward")
        if m.tracing_from_weights_prefix is not None:
            if m.tracing_from_weights is not None:
                raise ConfigError(f"{where}: tracing_from_weights and tracing_from_weights_prefix exclude each other; give one")
            if args.tracing_from_weights is None:
                raise ConfigError(f"{where}.tracing_from_weights_prefix is a prefix of names in tracing_from_weights, which is not set")
