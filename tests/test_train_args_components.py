"""Components from a configuration: names that import or say which part does not, arguments, __type, __value_type, casts, precision.
Must not know the loop. What is built here runs in this process.
"""

import logging
import random
import sys
from dataclasses import fields
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DistributedSampler, SequentialSampler

from autopar.errors import ConfigError
from autopar.importing import find
from autopar.runtime.mixed import MixedPrecision
from autopar.train import AggregatedOutputs, build
from autopar.train.args import TrainerArgs
from autopar.train.components import create, locate, resolve
from autopar.train.hooks import HookMap, TrainHook
from autopar.train.initial import convert
from tests import train_cases as cases

HERE = __name__


class Point:
    def __init__(self, x, y=0, *, inner=None):
        self.x, self.y, self.inner = x, y, inner

    def __eq__(self, other):
        return vars(self) == vars(other)


def fails(x=1):
    raise RuntimeError("no disk")


class OwnLogger:
    def __init__(self, name="own"):
        self.name = name

    def setup(self, run): ...

    def log_metrics(self, metrics, step, *, tag): ...

    def flush(self): ...

    def finalize(self, status): ...


class OwnHook(TrainHook):
    def __init__(self, n):
        self.n = n

    def on_epoch_end(self, trainer, epoch):
        trainer.append((self.n, epoch))


def end_of_epoch(trainer, epoch):
    trainer.append(("map", epoch))


def no_decay(name):
    return {"weight_decay": 0.0} if name.endswith("bias") else None


def make_sgd(params, lr):
    return torch.optim.SGD(params, lr=lr)


def warmup(optimizer, steps=10):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / steps))


def make_data(size):
    return cases.SimpleDataset(size=size)


def sequential(dataset, num_replicas, rank):
    return SequentialSampler(dataset)


def seed_it(trainer):
    trainer.append(torch.initial_seed())


def args(folder=".", **changes):
    return TrainerArgs.of(cases.mlp_args(folder, **changes))


# ---- names


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Modules in a folder that is the current one: good, broken and a package."""
    for name, text in {
        "cfg_good.py": "class Net:\n    class Inner:\n        pass\nNUMBER = 3\n",
        "cfg_broken.py": "import no_such_thing_at_all\n",
        "cfg_raises.py": "x = 1 / 0\n",
        "cfg_pkg/__init__.py": "def same(): return 'function'\n",
        "cfg_pkg/same.py": "class Deep:\n    pass\n",
        "folder/cfg_file.py": "class Net:\n    pass\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.startswith("cfg_"):
            del sys.modules[name]


@pytest.mark.parametrize(
    "name, want",
    [
        ("cfg_good.Net", "Net"),
        ("cfg_good.Net.Inner", "Net.Inner"),
        ("cfg_good:Net", "Net"),
        ("folder/cfg_file.py:Net", "Net"),
        ("cfg_pkg.same", "same"),
        ("cfg_pkg.same.Deep", "Deep"),
        ("torch.optim.AdamW", "AdamW"),
        ("torch.utils.data.DataLoader", "DataLoader"),
    ],
)
def test_names_that_import(modules, name, want):
    assert find(name, name).__qualname__ == want


@pytest.mark.parametrize(
    "name, says",
    [
        ("cfg_none.Net", "model.type 'cfg_none.Net': there is no module 'cfg_none' (searched "),
        ("cfg_good.Nett", "model.type 'cfg_good.Nett': cfg_good was imported, but it has no 'Nett': did you mean 'Net'?"),
        ("cfg_good.Net.Iner", "cfg_good.Net has no 'Iner': did you mean 'Inner'?"),
        ("cfg_pkg.mod.Net", "cfg_pkg was imported, but it has no 'mod'"),
        ("cfg_broken.Net", "cfg_broken failed to import: ModuleNotFoundError: No module named 'no_such_thing_at_all' ("),
        ("cfg_raises.Net", "cfg_raises failed to import: ZeroDivisionError: division by zero ("),
        ("folder/none.py:Net", "there is no file"),
        ("Net", "model.type 'Net' is not of the form 'package.module.Name' or 'path/to/file.py:Name'"),
        ("cfg_good.NUMBER", "model.type 'cfg_good.NUMBER' is 3; it must be a class or function"),
    ],
)
def test_names_that_do_not(modules, name, says):
    with pytest.raises(ConfigError) as e:
        locate(name, "model.type")
    assert says in str(e.value)


def test_the_folder_of_the_config_is_searched(modules):
    (modules / "conf").mkdir()
    (modules / "conf/cfg_beside.py").write_text("class Net:\n    pass\n")
    (modules / "conf/c.yaml").write_text("model: {type: cfg_beside.Net}\n")
    assert locate(TrainerArgs.of("conf/c.yaml").model.type, "model.type").__name__ == "Net"


# ---- arguments


@pytest.mark.parametrize(
    "given, want",
    [
        ("1", 1),
        ("1e-3", 1e-3),
        ("[1, 'a']", [1, "a"]),
        ("(1, 2)", (1, 2)),
        ("{'a': '1'}", {"a": "1"}),
        ("None", None),
        ("true", True),
        ("plain text", "plain text"),
        ("007", "007"),
        (["1", {"a": "2"}], [1, {"a": 2}]),
        ({"__value_type": "str", "value": "1"}, "1"),
        ({"__value_type": "str", "value": 1}, "1"),
        ({"__value_type": "float", "value": "1e3"}, 1000.0),
        ({"__value_type": "bool", "value": "false"}, False),
        ({"__value_type": "tuple", "value": [1, 2]}, (1, 2)),
        ({"__value_type": "torch.device", "value": "cpu"}, torch.device("cpu")),
        ({"__value_type": "import", "value": "torch.bfloat16"}, torch.bfloat16),
        ({"__value_type": "import", "value": f"{HERE}.warmup"}, warmup),
        ({"__type": f"{HERE}.Point", "x": "3"}, Point(3)),
        ({"__type": f"{HERE}.Point", "x": [1], "inner": {"__type": f"{HERE}.Point", "x": {"__value_type": "str", "value": "2"}}},
         Point([1], inner=Point("2"))),
        ([{"__type": f"{HERE}.Point", "x": 1}], [Point(1)]),
    ],
)  # fmt: skip
def test_values(given, want):
    made = resolve(given, "model.args.x")
    assert made == want and type(made) is type(want)


@pytest.mark.parametrize(
    "given, says",
    [
        ({"__value_type": "int", "value": "x"}, "model.args.x: int('x') failed: "),
        ({"__value_type": "int"}, "model.args.x has the keys __value_type; a cast has __value_type and value, and no others"),
        ({"__value_type": "int", "value": 1, "more": 2}, "and no others"),
        ({"__value_type": "inte.ger", "value": 1}, "model.args.x.__value_type 'inte.ger': there is no module 'inte'"),
        ({"__value_type": "import", "value": "torch.bfloat17"}, "torch was imported, but it has no 'bfloat17': did you mean 'bfloat16'?"),
        ({"__type": "torch.nn.Liner"}, "model.args.x.__type 'torch.nn.Liner': torch.nn was imported, but it has no 'Liner': did you mean"),
        ({"__type": f"{HERE}.Point", "x": 1, "z": 2}, "model.args.x.z: Point has no argument 'z': "),
        ({"__type": f"{HERE}.Point"}, "model.args.x: Point: missing a required argument: 'x'"),
        ([{"a": {"__type": "no.such"}}], "model.args.x.0.a.__type 'no.such': there is no module 'no'"),
    ],
)
def test_values_that_cannot_be_made(given, says):
    with pytest.raises(ConfigError) as e:
        resolve(given, "model.args.x")
    assert says in str(e.value)


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match=r"optimizer.args.lrr: AdamW has no argument 'lrr': did you mean 'lr'\?"):
        create(torch.optim.AdamW, {"lrr": 1}, "optimizer.args", [nn.Parameter(torch.ones(1))])
    with pytest.raises(RuntimeError, match="no disk") as e:
        create(fails, {}, "dataset.train_args")
    assert e.value.__notes__ == ["while making dataset (fails)"]


# ---- components


def test_datasets(tmp_path):
    a = args(tmp_path, dataset={"train_args": {"size": 6}})
    assert len(build.make_dataset(a, "train")) == 6 and build.make_dataset(a, "val") is None
    a = args(tmp_path, dataset={"type": f"{HERE}.make_data", "train_args": {"size": 6}, "val_args": {"size": "4"}})
    assert len(build.make_dataset(a, "train")) == 6 and len(build.make_dataset(a, "val")) == 4
    with pytest.raises(ConfigError, match=r"dataset.train_args.siz: SimpleDataset has no argument 'siz': did you mean 'size'\?"):
        build.make_dataset(args(tmp_path, dataset={"train_args": {"siz": 6}}), "train")


def test_samplers(tmp_path, caplog):
    data = cases.SimpleDataset(size=7)
    given = {"shuffle": False, "num_replicas": 9, "rank": 8, "dataset": 7}
    a = args(tmp_path, dataset_sampler={"train_args": given})
    with caplog.at_level(logging.WARNING, "autopar"):
        made = build.make_sampler(a, "train", data, 2, 1)
    assert type(made) is DistributedSampler and list(made) == [1, 3, 5, 0]
    assert [r.getMessage() for r in caplog.records] == [
        f"dataset_sampler.train_args.{k} is ignored: the trainer sets it" for k in ("num_replicas", "rank", "dataset")
    ]
    # val_args are its own, and do not fall back to train_args
    made = build.make_sampler(
        args(tmp_path, dataset_sampler={"val_args": {"seed": 3}, "train_args": {"drop_last": True}}), "val", data, 2, 0
    )
    assert made.seed == 3 and made.drop_last is False
    a = args(tmp_path, dataset_sampler={"type": f"{HERE}.sequential", "train_args": {"shuffle": None}})
    with pytest.raises(ConfigError, match=r"dataset_sampler.train_args.shuffle: sequential has no argument 'shuffle'"):
        build.make_sampler(a, "train", data, 2, 0)
    assert build.make_sampler(a, "train", cases.Stream(), 2, 0) is None


def test_dataloaders(tmp_path, caplog):
    data = cases.SimpleDataset(size=7)
    sampler = SequentialSampler(data)
    a = args(tmp_path, micro_batch_size=3, dataloader={"train_args": {"drop_last": True, "batch_size": 5, "sampler": 1, "dataset": 2}})
    with caplog.at_level(logging.WARNING, "autopar"):
        made = build.make_dataloader(a, "train", data, sampler)
    assert made.batch_size == 3 and made.sampler is sampler and made.dataset is data and made.drop_last
    assert "dataloader.train_args.batch_size is ignored: the trainer sets it to micro_batch_size" in caplog.messages
    assert build.make_dataloader(a, "val", data, sampler).drop_last  # val_args default to train_args
    a = args(tmp_path, dataloader={"train_args": {"drop_last": True}, "val_args": {"num_workers": 0}})
    assert not build.make_dataloader(a, "val", data, sampler).drop_last
    a = args(tmp_path, dataloader={"type": f"{cases.NAME}.StatefulLoader"})
    assert type(build.make_dataloader(a, "train", data, sampler)) is cases.StatefulLoader
    collate = {"__value_type": "import", "value": "torch.stack"}
    assert (
        build.make_dataloader(args(tmp_path, dataloader={"train_args": {"collate_fn": collate}}), "train", data, sampler).collate_fn
        is torch.stack
    )


def test_loggers(tmp_path):
    log = [{"type": f"{HERE}.OwnLogger", "args": {"name": "a"}}, {"type": OwnLogger}]
    log.append({"type": "JsonLinesLogger", "args": {"path": str(tmp_path / "x.jsonl")}})
    made = build.make_loggers(args(tmp_path, log=log))
    assert [type(x).__name__ for x in made] == ["ConsoleLogger", "OwnLogger", "OwnLogger", "JsonLinesLogger"]
    assert [x.name for x in made[1:3]] == ["a", "own"]
    for kind, says in {
        "JsonLineLogger": "log.0.type: unknown logger 'JsonLineLogger': did you mean 'JsonLinesLogger'?",
        f"{HERE}.Point": "log.0.args: Point: missing a required argument: 'x'",
        f"{HERE}.seed_it": "log.0.args: seed_it: missing a required argument",
    }.items():
        with pytest.raises(ConfigError) as e:
            build.make_loggers(args(tmp_path, log=[{"type": kind}]))
        assert says in str(e.value)
    with pytest.raises(ConfigError, match="made a Point, which has no setup, log_metrics, flush, finalize"):
        build.make_loggers(args(tmp_path, log=[{"type": f"{HERE}.Point", "args": {"x": 1}}]))


def test_hooks(tmp_path):
    assert build.make_hook(args(tmp_path)) is None
    seen = []
    made = build.make_hook(args(tmp_path, hook={"type": f"{HERE}.OwnHook", "args": {"n": "5"}}))
    made.on_epoch_end(seen, 1)
    made = build.make_hook(args(tmp_path, hook={"on_epoch_end": f"{HERE}.end_of_epoch"}))
    assert isinstance(made, HookMap)
    made.on_epoch_end(seen, 2)
    assert seen == [(5, 1), ("map", 2)]
    with pytest.raises(ConfigError, match=r"made a Point; it must be a subclass of autopar.train.TrainHook"):
        build.make_hook(args(tmp_path, hook={"type": f"{HERE}.Point", "args": {"x": 1}}))
    with pytest.raises(
        ConfigError, match=r"hook.on_epoch_end 'tests.train_cases.nothing': tests.train_cases was imported, but it has no 'nothing'"
    ):
        build.make_hook(args(tmp_path, hook={"on_epoch_end": f"{cases.NAME}.nothing"}))


def test_environment(tmp_path):
    got = []
    for _ in range(2):
        build.init_env(args(tmp_path, seed=5), None)
        got.append((random.random(), numpy.random.rand(), torch.rand(1).item()))
    assert got[0] == got[1]
    torch.manual_seed(11)
    seen = []
    build.init_env(args(tmp_path, seed=None, init_env_fn=f"{HERE}.seed_it"), seen)
    assert seen == [11]  # the function has the trainer, and nothing else was seeded
    assert args(tmp_path, seed=None, init_env_fn=f"{HERE}.seed_it").spec().seed is None


@pytest.mark.parametrize(
    "key, value",
    [
        ("model.type", "no.such"),
        ("model.parallel_modules", [{"type": f"{cases.NAME}.Layer", "forward_args_gen_fn": "no.such"}]),
        ("optimizer.type", "no.such"),
        ("optimizer.param_group_fn", "no.such"),
        ("optimizer.aggregate_outputs_fn", "no.such"),
        ("dataset.type", "no.such"),
        ("dataloader.type", "no.such"),
        ("dataset_sampler.type", "no.such"),
        ("lr_scheduler.type", "no.such"),
        ("log", [{"type": "JsonLinesLogger"}, {"type": "no.such"}]),
        ("hook.on_train_end", "no.such"),
        ("hook.type", "no.such"),
        ("pas_policy", "no.such"),
        ("init_env_fn", "no.such"),
    ],
)
def test_names_are_looked_up_before_anything_is_made(tmp_path, key, value):
    first, _, second = key.partition(".")
    a = args(tmp_path, **{first: {second: value} if second else value})
    with pytest.raises(ConfigError, match=rf"^{key}[^ ]* 'no.such': there is no module 'no'"):
        build.init_env(a, None)


def test_aggregate_function(tmp_path):
    have = {f.name: f.default for f in fields(AggregatedOutputs)}
    assert have == {"loss_sum": None, "num_batches": None, "num_tokens": None, "aggregated_outputs": None}
    assert build.aggregate_fn(args(tmp_path)) is None
    a = args(tmp_path, optimizer={"grad_reduction": "per-token-mean", "aggregate_outputs_fn": f"{cases.NAME}.count_tokens_fn"})
    assert build.aggregate_fn(a) is cases.count_tokens_fn and a.spec().grad_reduction == "per-token-mean"


# ---- the model and its optimizer, in one process


def sample(n=2):
    return torch.utils.data.default_collate([cases.SimpleDataset()[i] for i in range(n)])


def model_of(a):
    build.init_env(a, None)
    return build.make_model(a, sample())


def test_a_model_has_the_weights_of_its_class(tmp_path):
    a = args(tmp_path, model={"args": {"nlayers": "3"}})
    model = model_of(a)
    after = torch.rand(1)
    torch.manual_seed(a.seed)
    plain = cases.MLP(8, 3)
    assert torch.equal(after, torch.rand(1)), "building left the random state as the plain model does"
    assert model.end2end and {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    loss = model.train_step([sample()])[0][0]
    assert torch.allclose(loss, plain(sample())[0], atol=1e-6)


@pytest.mark.parametrize(
    "name, says",
    [
        (f"{HERE}.make_data", "model.type 'NAME' is no class (a function that makes one will not do); name a subclass of torch.nn.Module"),
        (f"{HERE}.Point", "is a class, but no torch.nn.Module"),
    ],
)
def test_a_model_is_a_class(tmp_path, name, says):
    with pytest.raises(ConfigError) as e:
        model_of(args(tmp_path, model={"type": name, "args": {}}))
    assert says.replace("NAME", name) in str(e.value)


def test_model_arguments_that_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"model.args.layers: MLP has no argument 'layers': did you mean 'nlayers'\?"):
        model_of(args(tmp_path, model={"args": {"layers": 3}}))


def test_reuse_and_modes(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    folder = tmp_path / "gen"
    with pytest.raises(Exception, match="was generated from another configuration"):
        for layers in (2, 3):  # auto is match in run mode
            model_of(args(tmp_path, model={"args": {"nlayers": layers}}))
    for layers in (3, 4):  # and moo in compile mode, for which there are no processes
        config = {"plan_ngpus": 2, "runtime_ngpus": 4}
        a = args(tmp_path, run_mode="compile", pas_policy="tp", compute_config=config, model={"args": {"nlayers": layers}})
        assert model_of(a) is None
    made = list(folder.rglob("rank1.py"))
    assert len(made) == 1 and made[0].parent.parent.name == "tests.train_cases.MLP"
    model_of(args(tmp_path, instance_name="other"))
    assert (folder / "tests.train_cases.MLP/other/model.py").exists()
    model_of(args(tmp_path, gen_reuse="override"))


def test_policies(tmp_path):
    (tmp_path / "own").mkdir()
    for policy in ("dp", "tp", "data", f"{HERE}.own_policy"):
        assert model_of(args(tmp_path, pas_policy=policy, instance_name=policy.rpartition(".")[2])).end2end
    plan = next(tmp_path.rglob("tp/plan.json"))
    assert model_of(args(tmp_path, pas_policy=str(plan), instance_name="file")).end2end
    with pytest.raises(ConfigError, match=f"pas_policy '{HERE}.own_polici': {HERE} was imported, but it has no 'own_polici': did you mean"):
        model_of(args(tmp_path, pas_policy=f"{HERE}.own_polici"))


def own_policy(graph, config):
    import autopar

    return autopar.Plan(policy="own", graph=graph.fingerprint)


def test_policy_settings_from_texts(tmp_path):
    """What the command line gives as text is read as a literal, as the arguments of components are."""
    a = args(tmp_path, pas_policy="tp", compute_config={"pas_config": {"seed": "3", "_note": {"__value_type": "str", "value": "1"}}})
    assert model_of(a).compute_config.pas_config == {"seed": 3, "_note": "1"}


def test_optimizers(tmp_path):
    model = model_of(args(tmp_path))
    a = args(tmp_path, optimizer={"type": "torch.optim.AdamW", "args": {"lr": "1e-2"}, "param_group_fn": f"{HERE}.no_decay"})
    made = build.make_optimizer(a, model)
    assert [g["weight_decay"] for g in made.param_groups] == [1e-2, 0.0] and made.param_groups[0]["lr"] == 0.01
    made = build.make_optimizer(args(tmp_path, optimizer={"type": f"{HERE}.make_sgd", "args": {"lr": 0.5}}), model_of(args(tmp_path)))
    assert type(made.optimizer) is torch.optim.SGD
    with pytest.raises(ConfigError, match=r"optimizer.args.lrr: SGD has no argument 'lrr': did you mean 'lr'\?"):
        build.make_optimizer(args(tmp_path, optimizer={"args": {"lrr": 0.5}}), model_of(args(tmp_path)))


def test_schedulers(tmp_path):
    optimizer = build.make_optimizer(args(tmp_path), model_of(args(tmp_path)))
    assert build.make_lr_scheduler(args(tmp_path), optimizer) is None
    made = build.make_lr_scheduler(args(tmp_path, lr_scheduler={"type": f"{HERE}.warmup", "args": {"steps": 4}}), optimizer)
    assert made.get_last_lr() == [0.1 / 4]
    made = build.make_lr_scheduler(
        args(tmp_path, lr_scheduler={"type": "torch.optim.lr_scheduler.StepLR", "args": {"step_size": 1}}), optimizer
    )
    assert made.step_size == 1


# ---- precision


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("scale", torch.ones(8))
        self.register_buffer("count", torch.zeros(3, dtype=torch.long))
        self.tied = self.linear.weight

    def forward(self, batch):
        return (self.linear(batch["x"]) * self.scale.to(batch["x"].dtype)).float().pow(2).mean()


HALF, FULL, BRAIN = torch.float16, torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    "precision, param, buffer, given",
    [
        (None, FULL, FULL, FULL),
        ("none", FULL, FULL, FULL),
        ("bf16", BRAIN, BRAIN, BRAIN),
        ("fp16", HALF, HALF, HALF),
        ("fp32", FULL, FULL, FULL),
        ({"param": "bf16"}, BRAIN, FULL, FULL),
        ({"buffer": "fp16", "input": "none"}, FULL, HALF, FULL),
        ({"param": "bf16", "input": "bf16", "buffer": "none"}, BRAIN, FULL, BRAIN),
    ],
)
def test_precision(tmp_path, precision, param, buffer, given):
    model = convert(Buffered(), precision)
    assert (model.linear.weight.dtype, model.linear.bias.dtype, model.scale.dtype) == (param, param, buffer)
    assert model.count.dtype == torch.long and model.tied is model.linear.weight
    cast = build.cast_input(args(tmp_path, precision=precision))({"x": torch.ones(2), "ids": [torch.ones(2).long()], "n": 3})
    assert (cast["x"].dtype, cast["ids"][0].dtype, cast["n"]) == (given, torch.long, 3)


def test_precision_of_a_model_that_is_compiled(tmp_path):
    a = args(tmp_path, precision={"param": "bf16", "input": "bf16"}, model={"type": f"{HERE}.Buffered", "args": {}})
    a = TrainerArgs.of(a.to_dict() | {"model": {"type": f"{HERE}.Buffered"}})
    a.optimizer.master_weights = True
    model = model_of(a)
    assert {p.dtype for p in model.parameters()} == {BRAIN} and model.scale.dtype == FULL
    optimizer = build.make_optimizer(a, model)
    assert isinstance(optimizer.optimizer, MixedPrecision)
    loss = model.train_step([build.cast_input(a)(sample())])[0]
    torch.manual_seed(a.seed)
    plain = Buffered().bfloat16()
    plain.scale = plain.scale.float()
    assert torch.allclose(loss, plain({"x": sample()["x"].bfloat16()}), atol=1e-3)


# ---- weights


def test_tracing_from_weights(tmp_path):
    torch.manual_seed(100)
    other = cases.TinyGPT()
    torch.save(other.state_dict(), tmp_path / "w.pt")
    from safetensors.torch import save_file

    save_file({k: v for k, v in other.state_dict().items() if k != "head.weight"}, tmp_path / "w.safetensors")  # tied: saved once
    ids = {"ids": torch.arange(12).reshape(2, 6)}
    for n, file in enumerate((tmp_path / "w.pt", tmp_path / "w.safetensors", tmp_path)):
        a = args(tmp_path, tracing_from_weights=str(file), instance_name=f"w{n}")
        a = TrainerArgs.of(a.to_dict() | {"model": {"type": f"{cases.NAME}.TinyGPT"}})
        build.init_env(a, None)
        model = build.make_model(a, ids)
        assert torch.allclose(model.train_step([ids])[0], other(ids), atol=1e-6)


@pytest.mark.parametrize(
    "made, says",
    [
        (None, "tracing_from_weights: there is no file "),
        (b"text", "tracing_from_weights: cannot read "),
        ([1, 2], "holds no state dict (a dict of names to tensors); save model.state_dict() there"),
        ("few", "does not fit MLP: it has no layers.1.up.weight; it has no layers.1.up.bias"),
        ("more", "does not fit MLP: the model has no layers.2.up.weight"),
        ("wide", "does not fit MLP: Error(s) in loading state_dict for MLP:"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, made, says):
    path = tmp_path / "w.pt"
    if isinstance(made, bytes):
        path.write_bytes(made)
    elif made is not None:
        plain = {"few": (8, 1), "more": (8, 3), "wide": (4, 2)}
        torch.save(cases.MLP(*plain[made]).state_dict() if made in plain else made, path) if isinstance(made, str) else torch.save(
            made, path
        )
    with pytest.raises(ConfigError) as e:
        model_of(args(tmp_path, tracing_from_weights=str(path)))
    assert says in str(e.value) and (str(path) in str(e.value))


# ---- a Hugging Face model


class HFLlama(nn.Module):
    """End to end around a causal language model: takes a sample, returns the loss first."""

    def __init__(self, config):
        super().__init__()
        import transformers

        self.model = transformers.LlamaForCausalLM(config)

    def forward(self, batch):
        return self.model(input_ids=batch["ids"], labels=batch["ids"], use_cache=False).loss


def test_a_hugging_face_model_from_yaml(tmp_path):
    import transformers

    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=32)
    path = tmp_path / "llama.yaml"
    path.write_text(
        f"""\
compute_config: {{plan_ngpus: 1, use_end2end: true}}
gen_savedir: {tmp_path / "gen"}
pas_policy: dp
seed: 7
vars: {{vocab: 32}}
model:
  type: {HERE}.HFLlama
  args:
    config:
      __type: transformers.LlamaConfig
      hidden_size: 16
      intermediate_size: 24
      num_hidden_layers: 2
      num_attention_heads: 4
      num_key_value_heads: 2
      vocab_size: $(vars.vocab)
optimizer: {{type: torch.optim.AdamW, args: {{lr: 1e-2}}}}
dataset: {{type: {cases.NAME}.ByteDataset, train_args: {{size: 8, vocab: $(vars.vocab)}}}}
"""
    )
    a = TrainerArgs.of(path)
    a.spec()
    data = build.make_dataset(a, "train")
    loader = build.make_dataloader(a, "train", data, build.make_sampler(a, "train", data, 1, 0))
    batch = next(iter(loader))
    build.init_env(a, None)
    model = build.make_model(a, batch)
    optimizer = build.make_optimizer(a, model)
    torch.manual_seed(7)
    plain = HFLlama(transformers.LlamaConfig(**shape))
    twin = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for _ in range(3):
        loss = model.train_step([batch])[0]
        optimizer.step()
        optimizer.zero_grad()
        want = plain(batch)
        want.backward()
        twin.step()
        twin.zero_grad()
        assert torch.allclose(loss, want, atol=1e-5)
    assert Path(tmp_path, "gen").exists()
