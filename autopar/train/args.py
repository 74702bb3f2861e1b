"""TrainerArgs and its component configs: every setting of a run, its default and what it means; checked into a RunSpec.
Must not know how components are built, nor how YAML and command lines are read. docs/configuration.md is made from this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from autopar.config import ComputeConfig
from autopar.train.fill import AtLeast, fill
from autopar.train.sources import read_words
from autopar.train.spec import CheckpointSpec, ProfileSpec, RunSpec

Count = Annotated[int, AtLeast(1)]
Name = str | Callable[..., Any]  # of a class or function: 'package.module.Name' or 'path/to/file.py:Name'; in Python also the object
Precision = Literal["fp32", "fp16", "bf16", "none"]
TensorKind = Literal["param", "buffer", "input"]
Reuse = Literal["auto", "match", "override", "moo", "graph"]
Broadcast = Literal["none", "all", "no_weights", "code"]


@dataclass
class OptionalComputeConfig:
    """What a parallel module compiles with; what is left out is taken from the trainer's `compute_config`."""

    constant_folding: bool | None = None
    """As in `compute_config`."""
    trace_strategy: str | None = None
    """As in `compute_config`."""
    guards: str | None = None
    """As in `compute_config`."""
    use_zero: bool | int | None = None
    """As in `compute_config`. Gradients of a whole model are summed by one reducer: all parallel modules need the same."""
    zero_ngroups: int | None = None
    """As `use_zero`."""
    zero_use_reduce_scatter: bool | None = None
    """As `use_zero`."""
    use_async_reducer: bool | None = None
    """As `use_zero`."""
    reducer_bucket_cap_mb: float | None = None
    """As `use_zero`."""
    pas_config: dict[str, Any] | None = None
    """As in `compute_config`; replaces that of the trainer."""
    user_config: dict[str, Any] | None = None
    """As in `compute_config`; replaces that of the trainer."""


@dataclass
class ModuleParallelizeConfig:
    """A class of submodules to parallelise. Every instance of exactly this class is replaced, with its own initial weights.

    One class can be listed once. To treat some instances differently, make them of a subclass and list that as well.
    """

    type: Name | None = None
    """The class of the submodules; no factory function. Required."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of its constructor. May be left out: the instances inside the model are what is compiled. Where given, an instance
    with other parameters than these arguments make is an error."""
    forward_args_gen_fn: Name | None = None
    """A function `(TrainerArgs) -> dict` that makes dummy arguments of the submodule's forward. Required."""
    tracing_from_weights: str | None = None
    """Weights that all instances of the class start from: a `.safetensors` file, a folder of them, or what `torch.save` wrote."""
    tracing_from_weights_prefix: str | None = None
    """Take these weights from the trainer's `tracing_from_weights`, from the entries whose names begin with this prefix."""
    compute_config: OptionalComputeConfig | None = None
    """Settings that differ from the trainer's `compute_config`."""
    gen_savedir: str | None = None
    """Default: the trainer's."""
    gen_reuse: Reuse | None = None
    """Default: the trainer's."""
    pas_policy: Name | None = None
    """Default: the trainer's."""
    broadcast_strategy: Broadcast | None = None
    """Default: the trainer's."""
    instance_name: str | None = None
    """Default: the trainer's."""
    precision: Precision | dict[TensorKind, Precision] | None = None
    """Default: the trainer's."""


@dataclass
class ModelConfig:
    """The model."""

    type: Name | None = None
    """The class of the model, a `torch.nn.Module`; no factory function. Required."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of its constructor."""
    parallel_modules: list[ModuleParallelizeConfig] = field(default_factory=list)
    """Submodules to parallelise instead of the whole model, which then stays an ordinary module around them."""


@dataclass
class OptimizerConfig:
    """The optimizer, and how losses and gradients of micro batches are put together."""

    type: Name | None = None
    """A class, or a function that makes one; its first parameter takes the parameters. Required."""
    args: dict[str, Any] = field(default_factory=dict)
    """Its other arguments."""
    clip_gnorm: Annotated[float, AtLeast(0)] | None = 0.0
    """Gradients are clipped to this norm of the whole model. 0 or null: no clipping."""
    loss_reduction: Literal["mean", "sum"] = "mean"
    """The training loss that is reported: mean or sum over all micro batches. Validation always reports a mean."""
    grad_reduction: Literal["mean", "sum", "per-token-mean"] = "mean"
    """Gradients: mean or sum over all micro batches, or mean over all tokens, which needs `aggregate_outputs_fn`."""
    aggregate_outputs_fn: Name | None = None
    """A function `(loss_outputs, sync_group) -> AggregatedOutputs`: the sum of losses, the number of batches and of tokens over all
    ranks of the group, from this rank's list of model outputs."""
    master_weights: bool = False
    """Keep float32 copies of 16-bit parameters, and update those."""
    param_group_fn: Name | None = None
    """A function `(parameter name) -> dict | None`: options of that parameter's group, such as `{'weight_decay': 0.0}`."""


@dataclass
class DatasetConfig:
    """The data sets for training and validation, made by one class or function."""

    type: Name | None = None
    """A class, or a function that makes one. Required."""
    train_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the training set."""
    val_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the validation set. Empty: there is none, and nothing is validated."""


@dataclass
class DataloaderConfig:
    """The loaders. `dataset`, `batch_size` (`micro_batch_size`) and `sampler` are given by the trainer; here they are ignored."""

    type: Name = "torch.utils.data.DataLoader"
    """A class, or a function that makes one; takes at least `dataset`, `batch_size` and `sampler`."""
    train_args: dict[str, Any] = field(default_factory=dict)
    """Other arguments of the training loader. `drop_last: true` is recommended, so that all batches have one size."""
    val_args: dict[str, Any] = field(default_factory=dict)
    """Other arguments of the validation loader. Empty: `train_args`."""
    test_args: dict[str, Any] = field(default_factory=dict)
    """Accepted for configurations that have it. The trainer has no test stage."""


@dataclass
class DatasetSamplerConfig:
    """The samplers. `dataset`, `num_replicas` (scale units) and `rank` (this one) are given by the trainer; here they are ignored.

    An `IterableDataset` takes no sampler, and none is made: it has to give every scale unit its own part.
    """

    type: Name = "torch.utils.data.DistributedSampler"
    """A class, or a function that makes one; takes at least `dataset`, `num_replicas` and `rank`."""
    train_args: dict[str, Any] = field(default_factory=dict)
    """Other arguments of the training sampler."""
    val_args: dict[str, Any] = field(default_factory=dict)
    """Other arguments of the validation sampler."""
    test_args: dict[str, Any] = field(default_factory=dict)
    """Accepted for configurations that have it. The trainer has no test stage."""


@dataclass
class LRSchedulerConfig:
    """The learning-rate scheduler."""

    type: Name | None = None
    """A class, or a function that makes one; its first parameter takes the optimizer. Required."""
    args: dict[str, Any] = field(default_factory=dict)
    """Its other arguments."""
    interval: Literal["epoch", "step"] = "epoch"
    """It steps at the end of each epoch, or after each training step."""


@dataclass
class LogConfig:
    """A logger."""

    type: Name | None = None
    """A class, or a function that makes one. Those of autopar need no path: `ConsoleLogger`, `JsonLinesLogger`, `TensorBoardLogger`,
    `WandbLogger`. Required."""
    args: dict[str, Any] = field(default_factory=dict)
    """Its arguments."""


@dataclass
class HookConfig:
    """A hook object."""

    type: Name | None = None
    """A subclass of `autopar.train.TrainHook`, or a function that makes an object of one. Required."""
    args: dict[str, Any] = field(default_factory=dict)
    """Its arguments."""


@dataclass
class HookMapConfig:
    """Hook functions, each by its name. All take the trainer first."""

    after_setup: Name | None = None
    """`(trainer)`: all is built, nothing has been trained. Not in `run_mode: compile`."""
    on_finalize: Name | None = None
    """`(trainer)`: the run is over."""
    on_train_start: Name | None = None
    """`(trainer)`: training begins."""
    on_train_end: Name | None = None
    """`(trainer)`: training has ended."""
    on_val_start: Name | None = None
    """`(trainer)`: a validation begins."""
    on_val_end: Name | None = None
    """`(trainer, val_loss)`: a validation has ended."""
    on_epoch_start: Name | None = None
    """`(trainer, epoch)`."""
    on_epoch_end: Name | None = None
    """`(trainer, epoch)`."""
    on_train_step_start: Name | None = None
    """`(trainer, batches)`: before forward and backward of the micro batches of a step."""
    on_train_step_end: Name | None = None
    """`(trainer, outputs)`: after them."""
    on_val_step_start: Name | None = None
    """`(trainer, batches)`."""
    on_val_step_end: Name | None = None
    """`(trainer, outputs)`."""
    on_step_start: Name | None = None
    """`(trainer, epoch, idx)`: before an optimizer step, number `idx` of its epoch."""
    on_step_end: Name | None = None
    """`(trainer, epoch, idx, step_metrics, aggregated_outputs)`: after it."""
    after_aggregate_train_step_outputs: Name | None = None
    """`(trainer, aggregated_outputs, train_loss)`: losses of all ranks have been put together."""
    after_aggregate_val_step_outputs: Name | None = None
    """`(trainer, aggregated_outputs, val_loss)`."""
    before_zero_grad: Name | None = None
    """`(trainer)`."""
    after_zero_grad: Name | None = None
    """`(trainer)`."""
    before_sync_grad: Name | None = None
    """`(trainer)`: before gradients are summed over the ranks; where that begins during the backward, before the last backward."""
    after_sync_grad: Name | None = None
    """`(trainer)`: after it."""
    before_gnorm_clip: Name | None = None
    """`(trainer)`."""
    after_gnorm_clip: Name | None = None
    """`(trainer, gnorm)`: with the norm that the gradient had."""
    before_optimizer_step: Name | None = None
    """`(trainer)`."""
    after_optimizer_step: Name | None = None
    """`(trainer)`."""
    before_log_train_metrics: Name | None = None
    """`(trainer, step_metrics, aggregated_outputs)`: the metrics may be changed before they are logged."""
    before_log_val_metrics: Name | None = None
    """`(trainer, metrics)`: as above."""
    on_load_checkpoint: Name | None = None
    """`(trainer, checkpoint)`: a checkpoint was loaded. In a merged one, what ranks have added is a list of all ranks'."""
    on_save_checkpoint: Name | None = None
    """`(trainer, checkpoint)`: a checkpoint is about to be written; what is added to the dict is saved with it."""


@dataclass
class CheckpointConfig:
    """When and how checkpoints are written, and what a run resumes from."""

    save_dir: str = "./checkpoints"
    """The folder of all checkpoints of the run."""
    no_save: bool = False
    """Write none."""
    save_type: Literal["sharded", "deduped", "merged", "dcp"] = "dcp"
    """`dcp` (torch.distributed.checkpoint) loads under any plan and number of processes. `sharded`: a file per rank, of all it holds.
    `deduped`: a file per rank, without copies of what other ranks write. `merged`: one file, for use anywhere; it keeps no random state."""
    save_last: bool = True
    """Keep `last`, the newest checkpoint."""
    save_best: bool = True
    """Keep `best`, the checkpoint with the lowest validation loss."""
    symlink_best_and_last: bool = True
    """`best` and `last` are links, not copies."""
    every_n_train_steps: Count | None = None
    """Save after every so many training steps."""
    every_n_epochs: Count | None = None
    """Save after every so many epochs."""
    keep_last_n_checkpoints: Count | None = None
    """Remove older ones than the last so many. Default: all are kept."""
    resume_from: str | None = None
    """`last`, `best`, or the path of a checkpoint. With `last` and `best` a run that finds none starts anew; a path has to exist."""
    async_save: bool = False
    """Write in the background while training goes on."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """What happens when a checkpoint cannot be written (a full disk). The last good one stays in any case."""
    save_on_interrupt: bool = True
    """Save on SIGTERM and Ctrl-C before the run ends."""


@dataclass
class ProfileConfig:
    """torch.profiler, and memory snapshots."""

    every_n_train_steps: Count | None = None
    """Record again after every so many training steps. Default: never."""
    active_steps: Count = 1
    """Steps that are recorded each time."""
    folder: str = "./profile"
    """Where traces are written."""
    memory_snapshot: bool = False
    """Write a snapshot of CUDA memory as well."""


@dataclass
class TrainerArgs:
    """A training run."""

    vars: dict[str, Any] = field(default_factory=dict)
    """Anything, for other settings to refer to: `$(vars.width)`."""

    compute_config: ComputeConfig | None = None
    """How the model is traced, split and run. Required, with `use_end2end: true` unless `model.parallel_modules` is used."""

    gen_savedir: str = "./.autopar"
    """Where generated code is kept."""
    gen_reuse: Reuse = "auto"
    """When generated code is used again: `match`, `override`, `moo` or `graph`, as in `autopar.parallelize`; `auto` is `moo` for
    `run_mode: compile` and `match` for `run`."""
    pas_policy: Name = "tp"
    """How the model is split: `dp`, `tp`, `data`, the path of a `plan.json`, or a function `(graph, config) -> Plan`. With one device
    in a scale unit (`plan_ngpus: 1`) the default splits nothing: that is data parallelism."""
    broadcast_strategy: Broadcast = "all"
    """What is sent to nodes that do not share a disk with rank 0."""
    instance_name: str | None = None
    """Keeps several compiles of one model apart."""
    run_mode: Literal["run", "compile"] = "run"
    """`compile` generates code and ends. `run` trains, from code that was generated before or is now; with `runtime_ngpus` above 1 it
    needs torchrun or `autopar train`. `compile` needs neither; under torchrun, generated code is sent to the other nodes unless
    `broadcast_strategy` is `none`."""
    tracing_from_weights: str | None = None
    """Weights that the model starts from: a `.safetensors` file, a folder of them, or what `torch.save` wrote of a state dict."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    """The data sets."""
    dataloader: DataloaderConfig = field(default_factory=DataloaderConfig)
    """The data loaders."""
    dataset_sampler: DatasetSamplerConfig = field(default_factory=DatasetSamplerConfig)
    """The samplers."""
    lr_scheduler: LRSchedulerConfig | None = None
    """The learning-rate scheduler. Default: none."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    log: list[LogConfig] = field(default_factory=list)
    """Loggers, any number of them."""
    hook: HookConfig | HookMapConfig | None = None
    """A hook object (with `type`) or a map of hook functions. It is called after the hooks of model, optimizer and scheduler."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """The profiler."""

    precision: Precision | dict[TensorKind, Precision] | None = None
    """Floating-point type of everything, or by kind of tensor (`param`, `buffer`, `input`). `none`, and kinds left out: as it is."""

    micro_batch_size: Count = 1
    """Samples in one forward of one scale unit."""
    global_batch_size: Count | None = None
    """Samples in one optimizer step: `micro_batch_size` x scale units x `grad_accumulation_steps`. Give this or the latter, or both
    if they agree."""
    grad_accumulation_steps: Count | None = None
    """Micro batches of one scale unit in one optimizer step. Default: 1, or what `global_batch_size` asks for."""

    max_epochs: Count | None = None
    """Default: no limit."""
    max_train_steps: Count | None = None
    """Default: no limit."""
    max_val_steps: Count | None = None
    """Steps of a validation: `grad_accumulation_steps` micro batches of each scale unit, as in training. Default: all."""

    val_every_n_train_steps: Count | None = None
    """Default: not after a number of steps."""
    val_every_n_epochs: Count | None = 1
    """null: not after epochs."""

    enable_progress_bar: bool = True
    """A progress bar on rank 0, on a terminal; lines of text elsewhere."""
    log_progress_every_n_train_steps: Count = 100
    """Interval of those lines."""
    check_finite: bool = True
    """A loss or gradient that is not finite ends the run on all ranks before it changes a parameter. Off: it is trained on."""

    seed: int | None = None
    """Of Python's, NumPy's and torch's random numbers, on every rank alike. This or `init_env_fn` is required."""
    init_env_fn: Name | None = None
    """A function `(trainer)` called before anything is built: seeds, flags, environment."""

    @classmethod
    def of(cls, x: TrainerArgs | Mapping[str, Any] | str | Path | Sequence[str]) -> TrainerArgs:
        """From TrainerArgs, a dict, the path of a YAML file, or command-line words (`-f config.yaml --max_epochs 2`).

        Raises ConfigError for an unknown key, naming the nearest, for a wrong type, and for YAML that does not parse.
        """
        if isinstance(x, (cls, Mapping)):
            return fill(cls, x)
        return cls.read(["-f", str(x)] if isinstance(x, (str, Path)) else x)[0]

    @classmethod
    def read(cls, words: Sequence[str]) -> tuple[TrainerArgs, dict[str, str]]:
        """From command-line words, with where every key was set: dotted key -> 'config.yaml:12' or 'command line'."""
        config = read_words(words, plain(cls()))
        return fill(cls, config.tree, "", config.origins), config.origins

    def spec(self, *, launched: bool = True) -> RunSpec:
        """The checked description of the run. launched=False: processes are started later, which are then checked by themselves.

        Raises ConfigError for missing parts, settings that contradict, and `run` without the processes it needs.
        """
        from autopar.train.checks import check

        accumulation, total = check(self, launched=launched)
        own = {f.name for f in fields(RunSpec)}
        same = {f.name: getattr(self, f.name) for f in fields(self) if f.name in own}
        return RunSpec(
            **same
            | {
                "grad_accumulation_steps": accumulation,
                "global_batch_size": total,
                "loss_reduction": self.optimizer.loss_reduction,
                "grad_reduction": self.optimizer.grad_reduction,
                "clip_gnorm": self.optimizer.clip_gnorm or None,
                "lr_interval": self.lr_scheduler.interval if self.lr_scheduler else "epoch",
                "checkpoint": CheckpointSpec(**vars(self.checkpoint)),
                "profile": ProfileSpec(**vars(self.profile)),
            }
        )

    @property
    def units(self) -> int:
        """Scale units of the run."""
        assert self.compute_config is not None
        return self.compute_config.units

    def to_dict(self) -> dict[str, Any]:
        """Plain data: nested dicts and lists; classes and functions by their names."""
        return plain(self)


def plain(x: Any) -> Any:
    """Dataclasses as dicts, classes and functions as 'module.Name'; other objects as they are."""
    if is_dataclass(x) and not isinstance(x, type):
        return {f.name: plain(getattr(x, f.name)) for f in fields(x)}
    if isinstance(x, Mapping):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    return f"{x.__module__}.{x.__qualname__}" if callable(x) and hasattr(x, "__qualname__") else x
