"""Trainer: a run that TrainerArgs describe; its parts are made from them.
Must not know phases or loops (core.py, loop.py), nor how components are built (build.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from autopar.train import build
from autopar.train.args import TrainerArgs
from autopar.train.core import Core
from autopar.train.hooks import ModelHook, TrainHook


class Trainer(Core):
    """Trains what TrainerArgs describe: `Trainer(args).run()`, on every rank. args: TrainerArgs, a dict, a YAML path, command-line words.

    .train_args, and for hooks: .model, .optimizer, .lr_scheduler, .dataset and .dataloader (by split, 'train' and 'val'), .train_status,
    .rank, .world_size, .device, .sync_group (the ranks that hold the same part of the model, one in each scale unit), .loggers (rank 0's).
    """

    def __init__(self, args: TrainerArgs | Mapping[str, Any] | str | Path | Sequence[str]):
        self.train_args = TrainerArgs.of(args)
        self.dataset: dict[str, Any] = {}
        super().__init__(self.train_args.spec())

    @classmethod
    def merge_checkpoint(cls, checkpoint_files: Sequence[str | Path], output_file: str | Path) -> None:
        """Put the files of a sharded or deduped checkpoint, one per rank, together into one that any layout loads."""
        from autopar.train.checkpoint import merge_checkpoint

        merge_checkpoint(checkpoint_files, output_file)

    def describe(self) -> dict[str, Any]:
        return self.train_args.to_dict()

    def configure_environment(self) -> None:
        build.init_env(self.train_args, self)

    def configure_inputs(self) -> Callable[[Any], Any]:
        return build.cast_input(self.train_args)

    def configure_dataloaders(self) -> dict[str, Any]:
        args, size = self.train_args, self.train_args.compute_config.plan_ngpus
        out = {}
        for split in ("train", "val"):
            self.dataset[split] = dataset = build.make_dataset(args, split)
            if dataset is not None:
                sampler = build.make_sampler(args, split, dataset, args.units, self.rank // size)
                out[split] = build.make_dataloader(args, split, dataset, sampler)
        return out

    def configure_model(self, sample: Any) -> nn.Module:
        return build.make_model(self.train_args, sample)

    def configure_optimizer(self, model: nn.Module) -> Any:
        return build.make_optimizer(self.train_args, model)

    def configure_lr_scheduler(self, optimizer: Any) -> Any:
        return build.make_lr_scheduler(self.train_args, optimizer)

    def configure_loggers(self) -> list[Any]:
        return build.make_loggers(self.train_args)

    def configure_aggregation(self) -> Callable[..., Any] | None:
        """A function whose first parameter is called `self` gets the trainer there."""
        fn = build.aggregate_fn(self.train_args)
        return fn.__get__(self) if fn is not None and next(iter(signature(fn).parameters), None) == "self" else fn

    def configure_hooks(self) -> list[TrainHook]:
        cls, model = build.model_class(self.train_args), self.model
        if issubclass(cls, TrainHook) and not isinstance(model, TrainHook):
            model = ModelHook(cls, model)
        optimizer = self.optimizer
        while not isinstance(optimizer, TrainHook) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        found = [model, optimizer, self.lr_scheduler, build.make_hook(self.train_args)]
        return [h for h in found if isinstance(h, (TrainHook, ModelHook))]
