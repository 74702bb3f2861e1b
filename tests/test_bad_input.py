"""Bad input to parallelize: one row per mistake, with the words of its error. No row may trace, compile or write in vain.
Knows the public interface only; savedirs are in test_savedir.py, processes in test_launch.py.
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import autopar
from autopar import ComputeConfig, ConfigError, GuardError, LayoutError, Mesh, Plan, PlanError, RuleError, TraceError
from autopar.driver import compile_module
from autopar.trace.leaves import unregister_leaf

X = torch.ones(4, 8)
TP2 = Mesh((("tp", 2),))
CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x, scale=1.0):
        return self.down(self.up(x)) * scale


class Branches(Net):
    def forward(self, x):
        y = self.up(x)
        if y.sum() > 0:
            y = y * 2
        return self.down(y)


class Positional(Net):
    def forward(self, x, /, y, *rest, z):
        return self.down(self.up(x + y + z + sum(rest)))


class Vmap(Net):
    def forward(self, x):
        return torch.vmap(lambda row: self.up(row))(x)


class Func(Net):
    def forward(self, x):
        return torch.func.grad(lambda w: (x @ w.T).sum())(self.up.weight)


class Scripted(Net):
    def __init__(self):
        super().__init__()
        self.down = torch.jit.script(self.down)


def parallelize(tmp_path, module=None, args=None, policy="tp", config=None, **more):
    """Compile only, from the class, as a user would write it."""
    args = {"x": X} if args is None else args
    return autopar.parallelize(module or Net(), args, policy, config, gen_savedir=tmp_path, load_module=False, **more)


def line(cls: type, text: str) -> str:
    """'<this file>:<line of that text in the class>'."""
    lines = Path(__file__).read_text().splitlines()
    start = next(i for i, row in enumerate(lines) if row.startswith(f"class {cls.__name__}("))
    return f"{__file__}:{next(i for i, row in enumerate(lines[start:], start + 1) if text in row)}"


# ---- configuration and names ---------------------------------------------------------------------------------------------------

CONFIG = [
    ({"plan_ngpus": 0}, "plan_ngpus is 0; it must be a whole number of at least 1"),
    ({"plan_ngpus": -2}, "plan_ngpus is -2; it must be"),
    ({"plan_ngpus": 1.5}, "plan_ngpus is 1.5; it must be a whole number"),
    ({"plan_ngpus": "2"}, "plan_ngpus is '2'; it must be a whole number"),
    ({"plan_ngpus": True}, "plan_ngpus is True; it must be a whole number"),
    ({"plan_ngpus": 4, "runtime_ngpus": 6}, "runtime_ngpus 6 is not a multiple of plan_ngpus 4; use for example 8"),
    ({"plan_ngpus": 4, "runtime_ngpus": 2}, "runtime_ngpus 2 is not a multiple of plan_ngpus 4; use for example 4"),
    ({"plan_ngpus": 2, "runtime_ngpus": -4}, "runtime_ngpus is -4; it must be a multiple of plan_ngpus 2"),
    ({"plan_ngpus": 2, "runtime_ngpus": "4"}, "runtime_ngpus is '4'; it must be a multiple of plan_ngpus 2"),
    (
        {"trace_strategy": "mta"},
        "unknown trace_strategy 'mta': did you mean 'meta'? Valid: auto, cpu, cuda, cuda_run_cpu_offload, meta, reuse",
    ),
    ({"guards": "eror"}, "unknown guards 'eror': did you mean 'error'? Valid: error, off, warn"),
    ({"plan_gpus": 2}, "unknown ComputeConfig key 'plan_gpus': did you mean 'plan_ngpus'? Valid: constant_folding, guards"),
    ({"constant_fold": True}, "unknown ComputeConfig key 'constant_fold': did you mean 'constant_folding'?"),
    ({"pas_config": 3}, "pas_config is 3; it must be a dict"),
    ({"user_config": "small"}, "user_config is 'small'; it must be a dict"),
]


@pytest.mark.parametrize(("settings", "message"), CONFIG, ids=lambda v: str(v)[:40])
def test_configuration(settings, message, tmp_path):
    for make in (lambda: ComputeConfig(**settings), lambda: ComputeConfig.of(settings), lambda: parallelize(tmp_path, config=settings)):
        with pytest.raises(ConfigError, match=re.escape(message)):
            make()
    assert not list(tmp_path.iterdir())


def test_a_configuration_of_another_kind():
    with pytest.raises(ConfigError, match="compute_config is 2; it must be a ComputeConfig or a dict of its settings"):
        autopar.parallelize(Net(), {"x": X}, "tp", 2, load_module=False)
    assert ComputeConfig.of(None) == ComputeConfig() and ComputeConfig.of({"plan_ngpus": 2}) == ComputeConfig(2)


class Untraceable(nn.Module):
    """Names are checked first: whoever traces this fails."""

    def forward(self, x):
        raise AssertionError("traced before the names were checked")


NAMES = [
    ({"policy": "tpp"}, ConfigError, "unknown policy 'tpp': did you mean 'tp'? Valid: data, dp, tp"),
    ({"policy": "dta"}, ConfigError, "unknown policy 'dta': did you mean 'data'?"),
    ({"policy": 3}, ConfigError, "unknown policy 3: Valid: data, dp, tp"),
    ({"policy": {"tp": 2}}, ConfigError, "unknown policy {'tp': 2}: Valid: data, dp, tp"),
    ({"policy": "none.json"}, PlanError, "cannot read plan none.json: No such file or directory"),
    ({"policy": Path("none")}, PlanError, "cannot read plan none: No such file or directory"),
    ({"reuse": "mach"}, ConfigError, "unknown reuse 'mach': did you mean 'match'? Valid: graph, match, moo, override"),
    ({"instance_name": "a/b"}, ConfigError, "instance_name 'a/b' must be a plain folder name"),
    ({"instance_name": ".."}, ConfigError, "instance_name '..' must be a plain folder name"),
    ({"module": 3}, ConfigError, "module must be a torch.nn.Module or a class of one, got 3"),
    ({"module": Untraceable, "module_fn": lambda: 3}, ConfigError, "module_fn returned int; it must return an instance of Untraceable"),
]


@pytest.mark.parametrize(("more", "kind", "message"), NAMES, ids=[f"{k}" for row in NAMES for k in [row[2][:30]]])
def test_names(more, kind, message, tmp_path):
    with pytest.raises(kind, match=re.escape(message)):
        parallelize(tmp_path, **{"module": Untraceable(), **more})


def test_a_policys_setting(tmp_path):
    with pytest.raises(ConfigError, match=r"policy 'tp' has no setting 'sed': did you mean 'seed'\? Valid: seed"):
        parallelize(tmp_path, config={"plan_ngpus": 2, "pas_config": {"sed": 1}})


def test_a_policy_that_returns_no_plan(tmp_path):
    def policy(graph, config):
        return {"up/linear": "n"}

    with pytest.raises(PlanError, match="policy policy returned dict, not a Plan"):
        parallelize(tmp_path, policy=policy)


def test_a_compiled_module(tmp_path):
    with pytest.raises(ConfigError, match=r"wrapped by torch.compile; give the original and compile what parallelize returns"):
        autopar.parallelize(torch.compile(Net()), {"x": X}, "tp", gen_savedir=tmp_path, load_module=False)


# ---- plans ---------------------------------------------------------------------------------------------------------------------

PLANS = [
    (Plan(Mesh((("tp", 4),)), {"up/linear": {"tp": "n"}}),
     "factor 'n' has size 6 (dim 1 of output 0, shape (4, 6)), which tp=4 does not divide. Its factors: *0 (size 4), k (s"),
    (Plan(Mesh((("a", 2), ("b", 2))), {"up/linear": {"a": "n", "b": "n"}}), "which a=2 x b=2 = 4 does not divide"),
    (Plan(TP2, {"up/linear": {"tp": "m"}}), "'m' on axis 'tp' is not a factor of torch.nn.functional.linear. Its factors: *0 (size 4), k"),
    (Plan(TP2, {"upp/linear": {"tp": "n"}}), "plan entry 'upp/linear' matches no op of this graph; the nearest is 'up/linear'"),
    (Plan(TP2, {"layers.*.up/linear": {"tp": "n"}}), "plan entry 'layers.*.up/linear' matches no op of this graph; the nearest is"),
    (Plan(TP2, params={"up.wieght": {"tp": "S(0)"}}), "'up.wieght' of params matches no parameter or buffer; the nearest is 'up.weight'"),
    (Plan(TP2, {"up/linear": {"pt": "n"}}), "'up/linear' names an unknown mesh axis 'pt'; did you mean 'tp'?"),
    (Plan(TP2, {"gate/linear": {"tp": "n"}}, graph="feed"),
     "the plan was made for graph feed, this one is"),
    (Plan(TP2, {"gate/linear": {"tp": "n"}}, graph="feed"), "these op addresses are not in this graph: gate/linear (for the first, the"),
    (Plan(TP2, {"up/linear": {"tp": "n"}}, graph="feed"), "shapes, arguments or constants differ; its 'graph' set to '' applies it anyway"),
    (Plan(Mesh((("tp", 8),))), "the plan's mesh(tp=8) has 8 devices, but plan_ngpus is {n}"),
]  # fmt: skip


@pytest.mark.parametrize("how", ["plan", "text", "path"])
@pytest.mark.parametrize(("plan", "message"), PLANS, ids=[p[1][:40] for p in PLANS])
def test_plans(plan, message, how, tmp_path):
    n = plan.mesh.size if "{n}" not in message else 2
    file = tmp_path / "plan.json"
    plan.save(file)
    given = {"plan": plan, "text": str(file), "path": file}[how]
    with pytest.raises(PlanError, match=re.escape(message.replace("{n}", "2"))):
        parallelize(tmp_path, policy=given, config={"plan_ngpus": n})


def test_a_factor_that_does_not_divide_names_the_users_line(tmp_path):
    with pytest.raises(
        PlanError, match=re.escape(f"up/linear ({line(Net, 'self.down(self.up(x))')}: return self.down(self.up(x)) * scale)")
    ):
        parallelize(tmp_path, policy=PLANS[0][0], config={"plan_ngpus": 4})


def test_a_plan_for_another_graph(tmp_path):
    """One that was really made for another model."""
    small = compile_module(Net(), {"x": X}, "tp", ComputeConfig(2)).plan
    with pytest.raises(
        PlanError, match=r"made for graph [0-9a-f]{12}, this one is [0-9a-f]{12}: these op addresses are not in this graph: "
    ):
        parallelize(tmp_path, nn.Sequential(nn.Linear(8, 8)), {"input": X}, small, {"plan_ngpus": 2})
    with pytest.raises(PlanError, match="shapes, arguments or constants differ"):
        parallelize(tmp_path, args={"x": torch.ones(2, 8)}, policy=small, config={"plan_ngpus": 2})
    assert parallelize(tmp_path, policy=small, config={"plan_ngpus": 2})


def test_a_corrupted_plan(tmp_path):
    """Whatever happened to the file: a PlanError, or a plan that can be applied."""
    plan = compile_module(Net(), {"x": X}, "tp", ComputeConfig(2)).plan
    graph = compile_module(Net(), {"x": X}, "dp", ComputeConfig()).graph
    good, file = plan.to_json().encode(), tmp_path / "plan.json"
    gen = torch.Generator().manual_seed(0)
    pick = lambda n: int(torch.randint(n, (), generator=gen))  # noqa: E731
    refused = 0
    for i in range(400):
        bad = bytearray(good)
        if i % 3 == 0:
            bad = bad[: pick(len(bad) - 3)]
        elif i % 3 == 1:
            bad[pick(len(bad))] = pick(256)
        else:
            at = pick(len(bad))
            bad[at : at + 1 + pick(20)] = bad[pick(len(bad)) :][: pick(10)]
        file.write_bytes(bytes(bad))
        try:
            compile_module(Net(), {"x": X}, file, ComputeConfig(2), graph=graph)
        except (PlanError, ConfigError) as e:
            assert str(e)
            refused += 1
    assert refused > 350


def test_a_plan_that_is_no_text(tmp_path):
    file = tmp_path / "plan.json"
    file.write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(PlanError, match=r"plan.json is not text: invalid start byte at byte 0"):
        parallelize(tmp_path, policy=file)


# ---- forward arguments ---------------------------------------------------------------------------------------------------------

ARGUMENTS = [
    (Net, {}, "Net.forward ({line}) needs 'x': add it to dummy_forward_args"),
    (Net, {"x": X, "scales": 2.0}, "Net.forward ({line}) has no argument 'scales': did you mean 'scale'? Valid: scale, x"),
    (Net, {"x": object()}, "the value of forward argument 'x' is a builtins.object, which generated code cannot hold"),
    (Net, (X,), "dummy_forward_args is a tuple; it must be a dict of forward argument name to value"),
    (Net, X, "dummy_forward_args is a Tensor; it must be a dict of forward argument name to value"),
    (Positional, {"y": X}, "needs 'x', 'z': add them to dummy_forward_args; positional-only arguments are given by name too"),
    (Positional, {"x": X, "y": X}, "Positional.forward ({line}) needs 'z'"),
]


@pytest.mark.parametrize(("cls", "args", "message"), ARGUMENTS, ids=[a[2][:40] for a in ARGUMENTS])
def test_arguments(cls, args, message, tmp_path):
    with pytest.raises(TraceError, match=re.escape(message.format(line=line(cls, "def forward")))):
        parallelize(tmp_path, cls(), args)


def test_positional_only_arguments_are_given_by_name(tmp_path):
    args = {"x": X, "y": X, "rest": (X, X), "z": X}
    assert autopar.verify(Positional(), args, "tp", ComputeConfig(2)).check()
    made, own = autopar.parallelize(module := Positional(), args, "dp", gen_savedir=tmp_path), module(X, X, X, X, z=X)
    assert made(X, X, X, X, z=X).equal(own)


# ---- what cannot be traced -----------------------------------------------------------------------------------------------------


def test_a_branch_on_a_value_under_meta(tmp_path):
    with pytest.raises(TraceError) as e:
        parallelize(tmp_path, Branches(), config={"trace_strategy": "meta"})
    assert str(e.value).startswith(
        f"{line(Branches, 'if y.sum() > 0')}: `if y.sum() > 0:`: torch.Tensor.__bool__ reads numbers that depend on"
    )
    named = re.findall(r"'(\w+)'", str(e.value).partition("does not compute; use ")[2])
    assert named == ["cpu", "cuda", "cuda_run_cpu_offload"]
    for strategy in ["auto", *named]:
        if torch.cuda.is_available() or "cuda" not in strategy:
            assert parallelize(tmp_path, Branches(), config={"trace_strategy": strategy}, instance_name=strategy)


@CUDA
@pytest.mark.parametrize("strategy", ["cuda", "cuda_run_cpu_offload"])
def test_no_cuda_device(strategy, tmp_path):
    message = f"trace_strategy='{strategy}' needs a CUDA device and there is none here; these work: 'auto', 'meta', 'cpu', 'reuse_cache'"
    with pytest.raises(ConfigError, match=re.escape(message)):
        parallelize(tmp_path, config={"trace_strategy": strategy})


UNSEEN = [
    (Vmap, "torch.vmap(lambda", "linear inside torch.vmap or torch.func; the tracer cannot look inside: register the"),
    (Func, "torch.func.grad(", "inside torch.vmap or torch.func; the tracer cannot look inside: register the"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "text", "message"), UNSEEN, ids=["vmap", "torch.func"])
@pytest.mark.parametrize("strategy", ["auto", "cpu"])
def test_code_the_tracer_cannot_see(cls, text, message, strategy, tmp_path):
    with pytest.raises(TraceError) as e:
        parallelize(tmp_path, cls(), config={"trace_strategy": strategy})
    assert str(e.value).startswith(f"{line(cls, text)}: `") and message in str(e.value) and "autopar.register_op" in str(e.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_module(tmp_path):
    with pytest.raises(TraceError, match="down is a ScriptModule, which the tracer cannot look into; use the module it was scripted from"):
        parallelize(tmp_path, Scripted())
    with pytest.raises(TraceError, match="the module is a ScriptModule"):
        parallelize(tmp_path, torch.jit.script(nn.Linear(8, 8)), {"input": X})


# ---- register_op ---------------------------------------------------------------------------------------------------------------


def half(x, y):
    return x / 2 + y


class Halves(Net):
    def forward(self, x):
        return self.down(half(self.up(x), torch.ones(6)))


NOTATIONS = [
    ("a b", "with one '->'"),
    ("a b -> a", "lacks b"),
    ("a (b c -> a b", "not closed"),
    ("a! b -> a b", "'!' is not understood"),
    ("a -> a c", "c of output 'a c' occurs in no input"),
]


@pytest.mark.parametrize(("notation", "message"), NOTATIONS)
def test_a_notation_that_does_not_parse(notation, message):
    with pytest.raises(RuleError) as e:
        autopar.register_op(half, notation)
    assert message in str(e.value) and repr(notation) in str(e.value)


MISFITS = [
    ("a b -> a b", "names 1 inputs and 1 outputs, the call has 2 and 1"),
    ("a b, a b -> a b", "'a b' has 2 dims, the tensor is [6]"),
    ("a b, a -> a b", "'a' of size 6 does not fit a=4"),
]


@pytest.mark.parametrize(("notation", "message"), MISFITS)
def test_a_notation_that_does_not_fit_names_the_users_line(notation, message, tmp_path):
    autopar.register_op(half, notation)
    try:
        with pytest.raises(RuleError) as e:
            parallelize(tmp_path, Halves(), config={"plan_ngpus": 2})
    finally:
        unregister_leaf(half)
    assert message in str(e.value) and line(Halves, "half(self.up(x)") in str(e.value) and repr(notation) in str(e.value)


# ---- at run time ---------------------------------------------------------------------------------------------------------------


def padded(name):
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import models

    module, args = models.build(name)
    ones = torch.ones_like(args["input_ids"])
    padding = ones.clone()
    padding[0, :5] = 0
    return module.eval(), {**args, "attention_mask": ones}, {**args, "attention_mask": padding}


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_padding_where_the_trace_saw_none(name, tmp_path):
    """The all-ones mask of the trace let the model leave it out; what then runs with padding is wrong, and is refused."""
    module, traced, padding = padded(name)
    graph = compile_module(module, traced, "dp", ComputeConfig()).graph
    run = lambda guards, args: load(module, compile_module(module, traced, "dp", ComputeConfig(guards=guards), graph=graph))(**args).loss  # noqa: E731
    with torch.no_grad():
        torch.testing.assert_close(run("error", traced), module(**traced).loss)
        with pytest.raises(GuardError, match=r"transformers.masking_utils.py:\d+: `.*padding_mask.*` is False, but was True when the"):
            run("error", padding)
        from autopar.runtime import guards

        guards._warned.clear()
        with pytest.warns(UserWarning, match=r"masking_utils.py:\d+: `.*` is False, but was True"):
            run("warn", padding)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrong = run("off", padding)
        assert abs(wrong - module(**padding).loss) > 1e-6  # what the guard is for
        again = load(module, compile_module(module, padding, "dp", ComputeConfig()))(**padding).loss
        torch.testing.assert_close(again, module(**padding).loss)


def load(module, compiled):
    """The generated module of one rank with the weights of the original."""
    from autopar.codegen.load import load_module_class
    from autopar.runtime.groups import rank_mesh

    held = dict(module.named_parameters()) | dict(module.named_buffers()) | compiled.graph.constants
    made = load_module_class(compiled.texts)(rank_mesh(()))
    return made.load(lambda name, slices: held[name].detach()[slices]).train(module.training)


def test_another_shape_with_folding(tmp_path):
    module = autopar.parallelize(Net(), {"x": X}, "dp", {"constant_folding": True}, gen_savedir=tmp_path)
    message = "input 'x' has shape (5, 8); the code was generated for (4, 8). Generate it with constant_folding=False"
    with pytest.raises(GuardError, match=re.escape(message)):
        module(torch.ones(5, 8))
    free = autopar.parallelize(Net(), {"x": X}, "dp", gen_savedir=tmp_path, instance_name="free")
    assert free(torch.ones(5, 8)).shape == (5, 8)


RUN_TIME = [
    ((X.long(),), {}, "input 'x' has dtype torch.int64; the code was generated for torch.float32"),
    ((None,), {}, "input 'x' is NoneType None; the code was generated for a tensor"),
    ((X,), {"scale": 3.0}, "argument 'scale' is 3.0, but was 1.0 when the model was traced"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), RUN_TIME, ids=["dtype", "none", "literal"])
def test_arguments_at_run_time(args, kwargs, message, tmp_path):
    module = autopar.parallelize(Net(), {"x": X}, "dp", gen_savedir=tmp_path)
    with pytest.raises(GuardError, match=re.escape(message)):
        module(*args, **kwargs)


def test_outside_of_torchrun(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    message = r"not a process of a distributed run: RANK, .*`torchrun --nproc_per_node N your_script.py`.*load_module=False.*autopar.verify"
    with pytest.raises(LayoutError, match=message):
        autopar.parallelize(Untraceable(), {"x": X}, "tp", {"plan_ngpus": 2}, gen_savedir=tmp_path)
    assert parallelize(tmp_path, config={"plan_ngpus": 2, "runtime_ngpus": 8}) and not torch.distributed.is_initialized()
