"""Core: a run from its first phase to its end, whoever makes its parts; front-ends are subclasses that make them.
Must not know how a step or an epoch goes (loop.py), nor class paths, YAML or configurations: it reads a RunSpec.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autopar.errors import ConfigError
from autopar.runtime import faults, groups, launch
from autopar.runtime.mesh import RankMesh
from autopar.runtime.module import ParallelModule
from autopar.train import events
from autopar.train.data import Feed, example
from autopar.train.events import Events
from autopar.train.gradients import CompiledPasses, Gradients, ModulePasses, Passes
from autopar.train.hooks import TrainHook, connect
from autopar.train.interrupts import Interrupts
from autopar.train.loggers import Loggers
from autopar.train.loop import Loop
from autopar.train.metrics import Meter
from autopar.train.phases import Phases
from autopar.train.profiler import Profiler
from autopar.train.spec import RunSpec
from autopar.train.state import TrainStatus

log = logging.getLogger("autopar.train")


class Core:
    """A run. A front-end overrides the configure_* methods it has something to say about; configure_dataloaders, configure_model and
    configure_optimizer it has to. More steps are added to self.phases before run().

    .spec; .mesh: where this rank is. For hooks: .model, .optimizer, .lr_scheduler, .dataloader (by split, 'train' and 'val'),
    .train_status, .rank, .world_size, .device, .sync_group (the ranks that hold the same part of the model, one in each scale unit),
    .loggers (rank 0's), .hooks.
    """

    def __init__(self, spec: RunSpec):
        if spec.run_mode == "run" and spec.max_epochs is None and spec.max_train_steps is None:
            raise ConfigError("neither max_epochs nor max_train_steps is set, and training would never end; set one of them")
        self.spec = spec
        self.events, self.interrupts = Events(), Interrupts()
        self.train_status = TrainStatus()
        self.rank, self.world_size, self.device = 0, 1, torch.device("cpu")
        self.model: Any = None
        self.optimizer: Any = None
        self.lr_scheduler: Any = None
        self.dataloader: dict[str, Any] = {}
        self.hooks: list[TrainHook] = []
        self.loggers = Loggers()
        self.aggregate_outputs_fn: Callable[..., Any] | None = None
        self.sync_group: Any = None
        self.loaded: Any = None  # a checkpoint, until the loop has gone on from it
        self.checkpointer: Any = None
        self.profiler: Any = None
        self.feeds: dict[str, Feed] = {}
        self._joined = False
        self.phases = Phases()
        self._plan()

    def _plan(self) -> None:
        add = self.phases.add
        add("launch", "join the other processes", self._launch)
        add("configure", "make the data", self._make_data)
        add("parallelise", "make the model", self._make_model)
        add("optimizers", "make the optimizer", self._make_optimizer)
        add("schedulers", "make the scheduler", self._make_scheduler)
        add("dataloaders", "feed the data", self._make_feeds)
        add("metrics", "make the loggers", self._make_loggers)
        add("metrics", "connect the hooks", self._make_hooks)
        add("resume", "load the checkpoint", self._resume)
        add("fit", "train", self._train)
        add("finalise", "end the run", self._finalise)

    # -- running

    def run(self) -> None:
        """Build everything, resume, train. In run_mode 'compile' only generate code.

        A signal (SIGTERM, Ctrl-C) ends it on all ranks with SystemExit(128 + signal), after a checkpoint if checkpoints are written.
        """
        status = "failed"
        try:
            if self.spec.run_mode == "compile":
                self.phases.run(last="parallelise")
                return
            self.phases.run()
            status = "interrupted" if self.loop.signal else "finished"
        except BaseException as e:
            self.events.emit(events.Interrupted, e)
            raise
        finally:
            self._end(status)
        if self.loop.signal:
            raise SystemExit(128 + self.loop.signal)

    fit = run

    def _launch(self) -> None:
        if self.spec.run_mode == "run" or not groups.alone():
            self._joined = not dist.is_initialized()
            if groups.alone():
                backend = "nccl" if torch.cuda.is_available() else "gloo"
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            groups.init()
            self.rank, self.world_size, self.device = dist.get_rank(), dist.get_world_size(), groups.local_device()
        self.configure_environment()

    def _make_data(self) -> None:
        self.dataloader = self.configure_dataloaders()
        self._example = example(self.dataloader["train"], self.spec.micro_batch_size)

    def _make_model(self) -> None:
        self.model = self.configure_model(self._example)
        if self.spec.run_mode == "run":
            parts = [m for m in self.model.modules() if isinstance(m, ParallelModule)]
            self.mesh: RankMesh = parts[0].mesh if parts else groups.rank_mesh(())
            self.device = self.mesh.device
            self.sync_group = _sync_group(self.mesh)

    def _make_optimizer(self) -> None:
        self.optimizer = self.configure_optimizer(self.model)

    def _make_scheduler(self) -> None:
        self.lr_scheduler = self.configure_lr_scheduler(self.optimizer)

    def _make_feeds(self) -> None:
        s, mesh, prepare = self.spec, self.mesh, self.configure_inputs()
        self.meter = Meter(self.model, device=self.device, sample=self._example)
        layout = {"unit": mesh.unit, "units": mesh.units, "samples": s.micro_batch_size, "window": s.grad_accumulation_steps}
        for split, loader in self.dataloader.items():
            if loader is not None:
                self.feeds[split] = Feed(
                    loader, s.grad_accumulation_steps, device=self.device, prepare=prepare, layout=layout, spare=self._example,
                    waiting=self.meter.data_wait,
                )  # fmt: skip

    def _make_loggers(self) -> None:
        self.loggers = Loggers(self.configure_loggers() if self.rank == 0 else ())
        self.profiler = Profiler(self.spec.profile, rank=self.rank, device=self.device)

    def _make_hooks(self) -> None:
        self.hooks = self.configure_hooks()
        connect(self.events, self, self.hooks)
        self.aggregate_outputs_fn = self.configure_aggregation()
        self.passes = self.configure_passes()
        self.gradients = self.configure_gradients()

    def _resume(self) -> None:
        c = self.spec.checkpoint
        if not c.no_save or c.resume_from:
            self.checkpointer = self.configure_checkpointer()
        path = self.checkpointer.find(c.resume_from) if c.resume_from else None
        if path is not None:
            self.loaded = self.checkpointer.load(path, module=self.model, optimizer=self.optimizer)
            self.train_status = TrainStatus.from_dict(self.loaded.status)
            if self.lr_scheduler is not None and self.loaded.lr_scheduler is not None:
                self.lr_scheduler.load_state_dict(self.loaded.lr_scheduler)
            log.info("resumed from %s, after step %d", path, self.train_status.finished_train_steps)
            self.events.emit(events.LoadCheckpoint, self.loaded.custom)
        self.events.emit(events.SetUp)

    def _train(self) -> None:
        self.loop = Loop(self)
        with faults.guarded(self.mesh, "outside of forward and backward"), self.interrupts.watched():
            self.loop.measure()
            self.loggers.setup(
                {
                    "args": self.describe(),
                    "finished_train_steps": self.train_status.finished_train_steps,
                    "total_train_steps": self.loop.total_steps(),
                    "device": self.meter.describe(),
                }
            )
            if self.loop.over() and self.rank == 0:
                log.warning("nothing to train: %d steps are finished, and that is the limit", self.train_status.finished_train_steps)
            self.loop.run()
            if self.checkpointer is not None:
                self.checkpointer.wait()

    def _finalise(self) -> None:
        self.events.emit(events.Finalize)

    def _end(self, status: str) -> None:
        """What has to be closed however the run ended."""
        if self.checkpointer is not None:
            self.checkpointer.close()
        self.loggers.finalize(status)
        if self.profiler is not None:
            self.profiler.close()
        if self._joined and dist.is_initialized():
            self._joined, self.sync_group = False, None
            if status != "failed" or dist.get_backend() != "nccl":  # NB: NCCL would wait for ranks that do not come
                launch.leave()

    def save(self, epoch: int, val_loss: float | None, *, ended: bool) -> None:
        """Write a checkpoint. NB: collective; between steps only. ended: the epoch is over."""
        status = self.train_status
        if val_loss is not None:
            best = status.best_val_loss
            status.best_val_loss = val_loss if best is None else min(best, val_loss)
        custom: dict[str, Any] = {}
        self.events.emit(events.SaveCheckpoint, custom)
        self.checkpointer.save(
            module=self.model,
            optimizer=self.optimizer,
            status=status.to_dict(),
            lr_scheduler=None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            dataloader=self.feeds["train"].state(ended=ended),
            custom=custom,
            step=status.finished_train_steps,
            epoch=epoch,
            val_loss=val_loss,
            args=self.describe(),
        )
        self.loggers.flush()

    # -- plug points

    def describe(self) -> dict[str, Any]:
        """The configuration as plain data, for loggers and checkpoints."""
        return {}

    def configure_environment(self) -> None:
        """Before anything is built, on every rank alike: seeds."""

    def configure_dataloaders(self) -> dict[str, Any]:
        """The loaders by split; None for a split that there is not. Each gives this rank's scale unit its part of the data."""
        raise NotImplementedError

    def configure_inputs(self) -> Callable[[Any], Any] | None:
        """A function: a batch of a loader, on this rank's device -> what goes through the model."""
        return None

    def configure_model(self, sample: Any) -> nn.Module:
        """The model on this rank's device; sample: a collated micro batch. In run_mode 'compile' generate code, and return anything."""
        raise NotImplementedError

    def configure_optimizer(self, model: nn.Module) -> Any:
        raise NotImplementedError

    def configure_lr_scheduler(self, optimizer: Any) -> Any:
        return None

    def configure_loggers(self) -> list[Any]:
        """Called on rank 0 only."""
        return []

    def configure_hooks(self) -> list[Any]:
        """In the order in which they are called."""
        return []

    def configure_aggregation(self) -> Callable[[list[Any], Any], Any] | None:
        """A function (outputs, sync_group) -> AggregatedOutputs, in place of sums of losses and numbers of batches."""
        return None

    def configure_passes(self) -> Passes:
        """How micro batches go through the model."""
        if isinstance(self.model, ParallelModule) and self.model.end2end:
            return CompiledPasses(self.model, self.optimizer, self.events)
        return ModulePasses(self.model, self.optimizer, self.mesh, self.events)

    def configure_gradients(self) -> Gradients:
        """What is done to gradients until parameters are updated."""
        s, own = self.spec, self.aggregate_outputs_fn is not None
        return Gradients(
            self.optimizer, self.events, reduction=s.grad_reduction, max_norm=s.clip_gnorm, check_finite=s.check_finite, early=not own
        )

    def configure_checkpointer(self) -> Any:
        from autopar.train.checkpoint import Checkpointer

        return Checkpointer(self.spec.checkpoint, rank=self.rank, world_size=self.world_size)


def _sync_group(mesh: RankMesh) -> Any:
    """NB: collective."""
    if mesh.world_size == 1 or mesh.units == mesh.world_size:
        return dist.group.WORLD
    if mesh.units > 1:
        return mesh.replicas.comm.group
    made = [dist.new_group([r]) for r in range(mesh.world_size)]
    return made[mesh.rank]
