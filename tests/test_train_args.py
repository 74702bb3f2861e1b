"""The trainer's settings: defaults, YAML, the command line, references, and every kind of bad input with its message.
Must not know how a run is trained; nothing here makes a model.
"""

import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml

from autopar.cli.train import describe, main
from autopar.errors import ConfigError
from autopar.train import args as config
from autopar.train.args import TrainerArgs, plain
from autopar.train.docs import field_texts, page

ROOT = Path(__file__).parent.parent
YAML = """\
compute_config:
  plan_ngpus: 2
  runtime_ngpus: 4
  use_end2end: true
seed: 3
micro_batch_size: 5
model:
  type: a.Model
  args:
    dim: 16
    sizes: [1, 2, 3]
optimizer:
  type: torch.optim.SGD
  args: {lr: 1e-1}
dataset:
  type: a.Data
lr_scheduler:
  type: a.Schedule
log:
- type: a.Log
  args: {name: first}
- type: a.Other
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    return path


def read(file, *words):
    return TrainerArgs.of(["-f", str(file), *words])


def at(args, key):
    """The value at a dotted key of the plain tree."""
    here = args.to_dict()
    for name in key.split("."):
        here = here[int(name)] if isinstance(here, list) else here[name]
    return here


# ---- fields and defaults of the reference document

# fmt: off
HOOKS = (
    "after_setup", "on_finalize", "on_train_start", "on_train_end", "on_val_start", "on_val_end", "on_epoch_start", "on_epoch_end",
    "on_train_step_start", "on_train_step_end", "on_val_step_start", "on_val_step_end", "on_step_start", "on_step_end",
    "after_aggregate_train_step_outputs", "after_aggregate_val_step_outputs", "before_zero_grad", "after_zero_grad", "before_sync_grad",
    "after_sync_grad", "before_gnorm_clip", "after_gnorm_clip", "before_optimizer_step", "after_optimizer_step",
    "before_log_train_metrics", "before_log_val_metrics", "on_load_checkpoint", "on_save_checkpoint",
)
REFERENCE = {
    "TrainerArgs": dict(
        compute_config=None, gen_savedir="./.autopar", gen_reuse="auto", pas_policy="tp", broadcast_strategy="all", instance_name=None,
        run_mode="run", tracing_from_weights=None, lr_scheduler=None, log=[], hook=None, precision=None, micro_batch_size=1,
        global_batch_size=None, grad_accumulation_steps=None, max_epochs=None, max_train_steps=None, max_val_steps=None,
        val_every_n_train_steps=None, val_every_n_epochs=1, enable_progress_bar=True, seed=None, init_env_fn=None,
    ),
    "ModelConfig": dict(type=None, args={}, parallel_modules=[]),
    "OptionalComputeConfig": dict(
        constant_folding=None, trace_strategy=None, use_zero=None, zero_ngroups=None, zero_use_reduce_scatter=None, use_async_reducer=None,
        reducer_bucket_cap_mb=None, pas_config=None, user_config=None,
    ),
    "ModuleParallelizeConfig": dict(
        type=None, args={}, forward_args_gen_fn=None, tracing_from_weights=None, tracing_from_weights_prefix=None, compute_config=None,
        gen_savedir=None, gen_reuse=None, pas_policy=None, broadcast_strategy=None, instance_name=None, precision=None,
    ),
    "OptimizerConfig": dict(type=None, args={}, clip_gnorm=0.0, loss_reduction="mean", grad_reduction="mean", aggregate_outputs_fn=None),
    "DatasetConfig": dict(type=None, train_args={}, val_args={}),
    "DataloaderConfig": dict(type="torch.utils.data.DataLoader", train_args={}, val_args={}, test_args={}),
    "DatasetSamplerConfig": dict(type="torch.utils.data.DistributedSampler", train_args={}, val_args={}, test_args={}),
    "LRSchedulerConfig": dict(type=None, args={}, interval="epoch"),
    "LogConfig": dict(type=None, args={}),
    "HookConfig": dict(type=None, args={}),
    "HookMapConfig": dict.fromkeys(HOOKS),
    "CheckpointConfig": dict(
        save_dir="./checkpoints", no_save=False, save_type="dcp", save_last=True, save_best=True, symlink_best_and_last=True,
        every_n_train_steps=None, every_n_epochs=None, keep_last_n_checkpoints=None, resume_from=None,
    ),
}
# fmt: on


@pytest.mark.parametrize("name", REFERENCE)
def test_fields_and_defaults(name):
    have = {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(getattr(config, name))}
    assert {k: v for k, v in have.items() if k in REFERENCE[name]} == REFERENCE[name]


def test_components_of_the_trainer_are_their_configs():
    parts = {f.name: type(getattr(TrainerArgs(), f.name)).__name__ for f in fields(TrainerArgs)}
    for key, kind in dict(
        model="ModelConfig", optimizer="OptimizerConfig", dataset="DatasetConfig", dataloader="DataloaderConfig",
        dataset_sampler="DatasetSamplerConfig", checkpoint="CheckpointConfig",
    ).items():  # fmt: skip
        assert parts[key] == kind


def test_the_page_is_up_to_date():
    text = (ROOT / "docs/configuration.md").read_text()
    assert text == page(), "python -m autopar.train.docs > docs/configuration.md"
    example = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert TrainerArgs.of(example).spec(launched=False).grad_accumulation_steps == 2
    for name in REFERENCE:
        assert all(field_texts(getattr(config, name)).values())


# ---- what can be given


def test_of_takes_args_dict_path_and_words(file):
    tree = yaml.safe_load(YAML)
    one = TrainerArgs.of(file)
    assert one == TrainerArgs.of(str(file)) == TrainerArgs.of(tree) == TrainerArgs.of(["-f", str(file)]) == TrainerArgs.of(one)
    assert one.optimizer.args == {"lr": "1e-1"} and one.log[1] == config.LogConfig("a.Other")
    assert one.compute_config.units == one.units == 2
    spec = one.spec(launched=False)
    assert (spec.micro_batch_size, spec.global_batch_size, spec.seed, spec.lr_interval, spec.clip_gnorm) == (5, 10, 3, "epoch", None)
    assert TrainerArgs.of(one.to_dict()) == one


def test_python_objects_in_place_of_names():
    tree = yaml.safe_load(YAML) | {"model": {"type": dict}, "hook": {"on_epoch_end": plain}}
    args = TrainerArgs.of(tree)
    assert args.model.type is dict and args.hook.on_epoch_end is plain
    assert args.to_dict()["model"]["type"] == "builtins.dict" and args.to_dict()["hook"]["on_epoch_end"] == "autopar.train.args.plain"


def test_spec_takes_settings_from_all_parts():
    tree = yaml.safe_load(YAML) | {"checkpoint": {"save_dir": "x", "every_n_epochs": 2}, "profile": {"every_n_train_steps": 7}}
    tree["optimizer"] |= {"clip_gnorm": 2, "loss_reduction": "sum", "grad_reduction": "sum"}
    tree["lr_scheduler"]["interval"] = "step"
    spec = TrainerArgs.of(tree | {"max_epochs": 3, "max_train_steps": 5, "max_val_steps": 6}).spec(launched=False)
    assert (spec.clip_gnorm, spec.loss_reduction, spec.grad_reduction, spec.lr_interval) == (2.0, "sum", "sum", "step")
    assert (spec.checkpoint.save_dir, spec.checkpoint.every_n_epochs, spec.profile.every_n_train_steps) == ("x", 2, 7)
    assert (spec.max_epochs, spec.max_train_steps, spec.max_val_steps) == (3, 5, 6)


@pytest.mark.parametrize(
    "given, want",
    [
        ({}, (1, 10)),
        ({"grad_accumulation_steps": 3}, (3, 30)),
        ({"global_batch_size": 40}, (4, 40)),
        ({"global_batch_size": 40, "grad_accumulation_steps": 4}, (4, 40)),
    ],
)
def test_batch_sizes(given, want):
    spec = TrainerArgs.of(yaml.safe_load(YAML) | given).spec(launched=False)
    assert (spec.grad_accumulation_steps, spec.global_batch_size) == want


@pytest.mark.parametrize("kind", ["on_epoch_end", "type"])
def test_hook_is_an_object_or_a_map(kind):
    hook = TrainerArgs.of(yaml.safe_load(YAML) | {"hook": {kind: "a.b"}}).hook
    assert type(hook).__name__ == {"type": "HookConfig", "on_epoch_end": "HookMapConfig"}[kind]


# ---- the command line


@pytest.mark.parametrize(
    "words, key, want",
    [
        ("--max_epochs 2", "max_epochs", 2),
        ("--max_epochs=2", "max_epochs", 2),
        ("--max_train_steps 1e3", "max_train_steps", 1000),
        ("--optimizer.clip_gnorm 1", "optimizer.clip_gnorm", 1.0),
        ("--optimizer.clip_gnorm null", "optimizer.clip_gnorm", None),
        ("--val_every_n_epochs None", "val_every_n_epochs", None),
        ("--seed -1", "seed", -1),
        ("--model.args.dim 32", "model.args.dim", "32"),
        ("--model.args.new.deep x", "model.args.new", {"deep": "x"}),
        ("--model.args.sizes.1 7", "model.args.sizes", [1, "7", 3]),
        ("--log.0.type x.Y", "log.0", {"type": "x.Y", "args": {"name": "first"}}),
        ("--log.2.type x.Y", "log.2", {"type": "x.Y", "args": {}}),
        ("--log.1!", "log", [{"type": "a.Log", "args": {"name": "first"}}]),
        ("--log!", "log", []),
        ("--lr_scheduler!", "lr_scheduler", None),
        ("--lr_scheduler null", "lr_scheduler", None),
        ("--model.args.dim! --model.args.dim 4", "model.args", {"sizes": [1, 2, 3], "dim": "4"}),
        ("--model.parallel_modules.0.type a.B", "model.parallel_modules.0.type", "a.B"),
        ("--checkpoint.no_save", "checkpoint.no_save", True),
        ("--checkpoint.no_save --seed 4", "checkpoint.no_save", True),
        ("--enable_progress_bar false", "enable_progress_bar", False),
        ("--enable_progress_bar False", "enable_progress_bar", False),
        ("--instance_name 12", "instance_name", "12"),
        ("--log [{'type':'q.R'}]", "log", [{"type": "q.R", "args": {}}]),
        ("--compute_config.use_zero 3", "compute_config.use_zero", 3),
        ("--compute_config.use_zero true", "compute_config.use_zero", True),
        ("--precision bf16", "precision", "bf16"),
        ("--precision none", "precision", "none"),
        ("--precision.param fp16 --precision.input fp32", "precision", {"param": "fp16", "input": "fp32"}),
        ("--pas_policy $(model.type)", "pas_policy", "a.Model"),
        ("--seed $(model.args.dim)", "seed", 16),
        ("--seed $(model.args.sizes.2)", "seed", 3),
        ("--model.args.copy $(model.args.sizes)", "model.args.copy", [1, 2, 3]),
        ("--gen_savedir gen-$(seed)-$(model.args.dim)", "gen_savedir", "gen-3-16"),
        ("--checkpoint.save_dir $(gen_savedir)/x", "checkpoint.save_dir", "./.autopar/x"),
        ("--vars.a 3 --seed $(vars.b) --vars.b $(vars.a)", "seed", 3),
        ("--seed ${SEED_OF_TEST}", "seed", 77),
        ("--gen_savedir ${SEED_OF_TEST}/x", "gen_savedir", "77/x"),
        ("--gen_savedir $$(seed)$x", "gen_savedir", "$(seed)$x"),
    ],
)
def test_command_line(file, monkeypatch, words, key, want):
    monkeypatch.setenv("SEED_OF_TEST", "77")
    assert at(read(file, *words.split()), key) == want


def test_files_are_merged_and_the_command_line_wins(file, tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text("model: {args: {dim: 8}}\nlog: []\nlr_scheduler: null\nseed: 4\nmax_epochs: 2\n")
    args = TrainerArgs.of(["-f", str(file), "-f", str(more), "--seed", "5"])
    assert args.model == config.ModelConfig("a.Model", {"dim": 8, "sizes": [1, 2, 3]})
    assert (args.log, args.lr_scheduler, args.seed, args.max_epochs) == ([], None, 5, 2)


def test_what_yaml_aliases_share_is_changed_in_one_place(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("dataset:\n  train_args: &a {size: [1, 2]}\n  val_args: *a\n")
    args = read(path, "--dataset.train_args.size.0", "9")
    assert args.dataset.train_args == {"size": ["9", 2]} and args.dataset.val_args == {"size": [1, 2]}


# ---- bad input


@pytest.mark.parametrize(
    "words, says",
    [
        # unknown keys, at any depth
        ("--max_epoch 2", "max_epoch (command line): unknown key 'max_epoch': did you mean 'max_epochs'? Valid: "),
        ("--model.arg.dim 2", "model.arg (command line): unknown key 'arg': did you mean 'args'? Valid: args, parallel_modules, type"),
        ("--log.1.agrs.x 2", "log.1.agrs (command line): unknown key 'agrs': did you mean 'args'?"),
        ("--compute_config.plan_gpus 2", "unknown key 'plan_gpus': did you mean 'plan_ngpus'?"),
        ("--model.parallel_modules.0.compute_config.use_zer 1", "unknown key 'use_zer': did you mean 'use_zero'?"),
        ("--hook.on_epoch_strat a.b", "unknown key 'on_epoch_strat': did you mean 'on_epoch_start'?"),
        ("--hook.typ a.b", "unknown key 'typ': did you mean 'type'?"),
        ("--precision.parm bf16", "precision.parm (command line): unknown name 'parm': did you mean 'param'? Valid: buffer, input, param"),
        # wrong types
        ("--max_epochs two", "max_epochs (command line) is 'two'; it must be a whole number of at least 1 or null"),
        ("--max_epochs 1.5", "max_epochs (command line) is '1.5'; it must be a whole number"),
        ("--max_epochs 0", "it must be a whole number of at least 1"),
        ("--max_epochs true", "it must be a whole number of at least 1"),
        ("--optimizer.clip_gnorm -1", "it must be a number of at least 0"),
        ("--checkpoint.keep_last_n_checkpoints 0", "it must be a whole number of at least 1"),
        ("--enable_progress_bar maybe", "it must be true or false"),
        ("--enable_progress_bar 1", "it must be true or false"),
        ("--model a.Model", "model (command line) is 'a.Model'; it must be a dict of settings"),
        ("--model.args 3", "model.args (command line) is '3'; it must be a dict"),
        ("--log a.Log", "log (command line) is 'a.Log'; it must be a list"),
        ("--instance_name", "instance_name (command line) is True; it must be a text"),
        # names from a list
        ("--gen_reuse mach", "gen_reuse (command line): unknown name 'mach': did you mean 'match'? Valid: auto, graph"),
        ("--broadcast_strategy al", "unknown name 'al': did you mean 'all'? Valid: all, code, no_weights, none"),
        ("--checkpoint.save_type shared", "unknown name 'shared': did you mean 'sharded'? Valid: dcp, deduped, merged, sharded"),
        ("--lr_scheduler.interval steps", "unknown name 'steps': did you mean 'step'? Valid: epoch, step"),
        ("--run_mode runs", "unknown name 'runs': did you mean 'run'?"),
        ("--optimizer.loss_reduction men", "unknown name 'men': did you mean 'mean'?"),
        ("--optimizer.grad_reduction per-token", "did you mean 'per-token-mean'?"),
        ("--precision bf15", "precision (command line): unknown name 'bf15': did you mean 'bf16'? Valid: bf16, fp16, fp32, none"),
        ("--precision.param int8", "precision.param (command line): unknown name 'int8'"),
        ("--checkpoint.on_save_error stopp", "did you mean 'stop'?"),
        ("--pas_policy tpp", "pas_policy: unknown policy 'tpp': did you mean 'tp'? Valid: data, dp, tp"),
        # parts that are missing
        ("--compute_config!", "compute_config is missing; give at least plan_ngpus, runtime_ngpus and use_end2end: true"),
        ("--compute_config.use_end2end!", "compute_config.use_end2end is not set, and a model is trained as a whole only with it: set"),
        ("--model.type!", "model.type is missing: the name of a class or function, such as 'package.module.Name'"),
        ("--optimizer!", "optimizer.type is missing"),
        ("--dataset!", "dataset.type is missing"),
        ("--lr_scheduler.type!", "lr_scheduler.type is missing"),
        ("--log.1.type!", "log.1.type is missing"),
        ("--hook.args.x 1", "hook.type is missing"),
        ("--seed!", "seed is missing: set seed to a number, or init_env_fn to a function that seeds every rank alike"),
        ("--optimizer.grad_reduction per-token-mean", "'per-token-mean' needs optimizer.aggregate_outputs_fn, which counts the tokens"),
        # what contradicts
        ("--global_batch_size 25", "global_batch_size 25 is not a multiple of micro_batch_size 5 x 2 scale units = 10; use for example 20"),
        ("--global_batch_size 20 --grad_accumulation_steps 3", "20 and grad_accumulation_steps 3 contradict: micro_batch_size 5 x 2 scale"),
        ("--compute_config.plan_ngpus 3", "runtime_ngpus 4 is not a multiple of plan_ngpus 3; use for example 3"),
        ("--compute_config.inference_only", "inference_only is true: the model cannot be trained"),
        # the command line itself
        ("max_epochs 2", "unexpected word 'max_epochs' on the command line; settings are `--key value`, files `-f config.yaml`"),
        ("--seed 1 2", "unexpected word '2'"),
        ("-f", "-f needs the path of a YAML file"),
        ("--log.5.type x", ": log ("),
        ("--log.x.type x", "is a list of 2; 'x' is no index of it"),
        ("--log.2!", "is a list of 2; '2' is no index of it"),
        ("--model.args.dim.x 1", "model.args.dim ("),
        ("--model.args.dmi!", "there is no model.args.dmi to remove; did you mean 'dim'?"),
        ("--hook.type!", "there is no hook to remove"),
        ("--model..args 1", "has an empty part"),
        # references
        ("--seed $(model.args.dmi)", "seed (command line) refers to $(model.args.dmi), but model.args has no 'dmi': did you mean 'dim'?"),
        ("--seed $(modle.args)", "but the configuration has no 'modle': did you mean 'model'?"),
        ("--vars.a $(vars.b) --vars.b $(vars.a)", "values refer to each other in a circle: vars.a -> vars.b -> vars.a"),
        ("--seed ${NOT_SET_ANYWHERE}", "seed (command line): the environment variable 'NOT_SET_ANYWHERE' is not set"),
    ],
)
def test_errors(file, words, says):
    with pytest.raises(ConfigError) as e:
        read(file, *words.split()).spec(launched=False)
    assert says in str(e.value)


def test_errors_name_file_and_line(tmp_path):
    path = tmp_path / "config.yaml"
    for text, says in {
        "seed: 1\nmodel:\n  args: {}\n  tpye: x\n": f"model.tpye ({path}:4): unknown key 'tpye': did you mean 'type'?",
        "seed: 1\nlog:\n- type: x\n- type: x\n  agrs: 1\n": f"log.1.agrs ({path}:5): unknown key 'agrs'",
        "seed: x\n": f"seed ({path}:1) is 'x'; it must be a whole number",
        "seed: 1\ncheckpoint: {save_type: x}\n": f"checkpoint.save_type ({path}:2): unknown name 'x'",
        "compute_config:\n  plan_ngpus: 0\n": f"compute_config ({path}:1): plan_ngpus is 0",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError) as e:
            TrainerArgs.of(path)
        assert says in str(e.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("model:\n  type: x\n args: {}\n", ":3:2: this is no valid YAML: "),
        ("model: [1, 2\n", ":2:1: this is no valid YAML: while parsing a flow sequence"),
        ("seed: 1\nmodel:\n  type: x\nseed: 2\n", ":4: the key 'seed' is in line 1 already"),
        ("- a\n- b\n", " holds a list; a configuration is a dict of settings"),
        ("\ttype: x\n", ":1:1: this is no valid YAML"),
    ],
)
def test_yaml_errors(tmp_path, text, says):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as e:
        TrainerArgs.of(path)
    assert f"{path}{says}" in str(e.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none.yaml: No such file or directory"):
        TrainerArgs.of(tmp_path / "none.yaml")


PARTS = {"type": "a.B", "forward_args_gen_fn": "a.f"}


@pytest.mark.parametrize(
    "parts, more, says",
    [
        ([{**PARTS, "type": None}], {}, "model.parallel_modules.0.type is missing"),
        ([{"type": "a.B"}], {}, "model.parallel_modules.0.forward_args_gen_fn is missing: a function (TrainerArgs) -> dict"),
        ([PARTS, PARTS], {}, "parallel_modules.1.type 'a.B' is listed already, as model.parallel_modules.0; a class is parallelised"),
        ([PARTS | {"tracing_from_weights": "a", "tracing_from_weights_prefix": "b"}], {"tracing_from_weights": "c"}, "exclude each other"),
        ([PARTS | {"tracing_from_weights_prefix": "b"}], {}, "is a prefix of names in tracing_from_weights, which is not set"),
        ([PARTS | {"pas_policy": "dpp"}], {}, "model.parallel_modules.0.pas_policy: unknown policy 'dpp': did you mean 'dp'?"),
    ],
)
def test_errors_of_parallel_modules(parts, more, says):
    tree = yaml.safe_load(YAML) | more
    tree["model"] = {"type": "a.Model", "parallel_modules": parts}
    with pytest.raises(ConfigError) as e:
        TrainerArgs.of(tree).spec(launched=False)
    assert says in str(e.value)


def test_parallel_modules_need_no_end2end():
    tree = yaml.safe_load(YAML) | {"compute_config": {"plan_ngpus": 1}}
    tree["model"] = {"type": "a.Model", "parallel_modules": [PARTS]}
    assert TrainerArgs.of(tree).spec().run_mode == "run"


# ---- run and compile


@pytest.mark.parametrize(
    "mode, ngpus, torchrun, strategy, right",
    [
        ("run", 4, False, "all", False),
        ("run", 4, True, "all", True),
        ("run", 1, False, "all", True),
        ("compile", 4, False, "none", True),
        ("compile", 4, False, "all", True),
        ("compile", 4, True, "all", True),
    ],
)
def test_which_modes_need_torchrun(file, monkeypatch, mode, ngpus, torchrun, strategy, right):
    monkeypatch.delenv("RANK", raising=False)
    if torchrun:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(ngpus))
    sizes = [f"--compute_config.plan_ngpus={min(2, ngpus)}", f"--compute_config.runtime_ngpus={ngpus}"]
    args = read(file, *sizes, "--run_mode", mode, "--broadcast_strategy", strategy)
    if right:
        assert args.spec().run_mode == mode
    else:
        says = "'run' on 4 devices needs 4 processes, and this is a single one: launch it with `autopar train -f ...` or `torchrun --nproc"
        with pytest.raises(ConfigError, match=re.escape(says)):
            args.spec()
        assert args.spec(launched=False)


# ---- --print-config


def test_print_config(file, capsys):
    words = ["-f", str(file), "--max_epochs", "2", "--model.args.dim", "$(seed)", "--log.2.type", "x.Y", "--lr_scheduler!"]
    assert main([*words, "--print-config"]) == 0
    out, err = capsys.readouterr()
    assert not err and yaml.safe_load(out) == TrainerArgs.of(words).to_dict()
    where = {re.sub(r"\s*#.*", "", line).strip(): line.partition("#")[2].strip() for line in out.splitlines()}
    assert where["max_epochs: 2"] == "command line" and where["dim: 3"] == "command line"
    assert where["seed: 3"] == f"{file}:5" and where["sizes:"] == "" and where["- 2"] == f"{file}:11"
    assert where["gen_savedir: ./.autopar"] == "default" and where["lr_scheduler: null"] == "default"
    assert where["- type: a.Other"] == f"{file}:22" and where["- type: x.Y"] == "command line"
    assert where["parallel_modules: []"] == "default" and where["plan_ngpus: 2"] == f"{file}:2"
    assert TrainerArgs.of(yaml.safe_load(out)) == TrainerArgs.of(words)


def test_print_config_of_python_objects():
    tree = yaml.safe_load(YAML)
    tree["model"]["args"] = {"x": object()}
    assert "x: <object object" in describe(TrainerArgs.of(tree), {})


def test_print_config_shows_the_tree_before_an_error(file, capsys):
    assert main(["-f", str(file), "--print-config", "--seed!"]) == 2
    out, err = capsys.readouterr()
    assert "seed: null" in out and err == "autopar: error: seed is missing: set seed to a number, or init_env_fn to a function that " + (
        "seeds every rank alike\n"
    )


def test_command_errors_are_one_line(file, capsys):
    assert main(["-f", str(file), "--max_epoch", "2"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("autopar: error: max_epoch (command line): unknown key")
    assert main(["-f", str(file), "--max_epoch", "2", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.procs
def test_settings_are_read_without_torch(file):
    script = f"import sys; from autopar.cli.train import main; code = main(['-f', {str(file)!r}, '--seed', 'x']); "
    script += "sys.exit(code != 2 or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], stderr=subprocess.DEVNULL).returncode == 0


def test_help_of_the_command(capsys):
    from autopar.cli.main import main as autopar

    for words in (["train", "--help"], ["train"]):
        assert autopar(words) == 0
        assert "--a.b!" in capsys.readouterr().out
