"""parallelize: its arguments, several modules in one model, classes, outputs, configurations; against plain PyTorch.
Must not know generated code."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autopar
from autopar import ComputeConfig, parallelize
from autopar.errors import ConfigError, LayoutError, SavedirError
from tests.procs import run_processes
from tests.small_models import LM, MLP, Layer

pytestmark = pytest.mark.procs
X = {"x": torch.arange(64.0).reshape(2, 4, 8).sin()}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Plain(nn.Module):
    def __init__(self, d=8, h=16):
        super().__init__()
        self.up, self.down = nn.Linear(d, h), nn.Linear(h, d)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("shift", torch.full((d,), 0.5), persistent=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x))) * self.scale + self.shift


def whole(module, name):
    """A parameter's gradient (or value) put together again, on every rank."""
    p, place = module.get_parameter(name), module.named_placements()[name]
    t = p.grad.clone()
    for axis, kind in zip(module.mesh.names, place.types, strict=True):
        if kind.startswith("S"):
            t = module.mesh[axis].all_gather(t, int(kind[2]))
    return t


def compare_gradients(local, original, times=1):
    aliases = local.named_aliases()
    for name, p in original.named_parameters():
        name = aliases.get(name, name)
        close(whole(local, name), p.grad * times)


def seeded(cls, *args, **kwargs):
    torch.manual_seed(3)
    return cls(*args, **kwargs)


# ---- the module is not changed, and neither is anything else ------------------------------------------------


def test_nothing_of_the_users_is_changed(tmp_path):
    torch.manual_seed(0)
    module = LM(recompute=False).train()
    module.layers[1].eval()
    module.norm.weight.requires_grad_(False)
    args = {"ids": torch.randint(0, 16, (2, 4)), "labels": torch.randint(0, 16, (2, 4))}
    before, state, python = copy.deepcopy(module), torch.get_rng_state(), random.getstate()
    attributes = {n: sorted(vars(m)) for n, m in module.named_modules()}
    local = parallelize(module, args, "dp", gen_savedir=tmp_path)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert attributes == {n: sorted(vars(m)) for n, m in module.named_modules()}
    assert [m.training for m in module.modules()] == [m.training for m in before.modules()]
    for (n, p), q in zip(module.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q) and p.grad is None and p.requires_grad == q.requires_grad
        assert local.get_parameter(local.named_aliases().get(n, n)).requires_grad == q.requires_grad
        assert local.get_parameter(local.named_aliases().get(n, n)).data_ptr() != p.data_ptr()
    local(**args)["loss"].backward()
    assert all(p.grad is None for p in module.parameters())


def test_the_module_given_can_be_let_go(tmp_path):
    """What parallelize returns does not keep the whole weights alive."""
    module = MLP()
    gone = weakref.ref(module)
    local = parallelize(module, X, "dp", gen_savedir=tmp_path)
    del module
    gc.collect()
    assert gone() is None and local(**X).requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_training_flag(training, tmp_path):
    assert parallelize(MLP().train(training), X, "dp", gen_savedir=tmp_path).training is training


def test_module_dtype_makes_a_copy(tmp_path):
    module = seeded(MLP, p=0.0)
    args = {"x": X["x"].bfloat16()}
    local = parallelize(module, args, "dp", gen_savedir=tmp_path, module_dtype=torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.float32} and {p.dtype for p in local.parameters()} == {torch.bfloat16}
    assert torch.equal(local(**args), copy.deepcopy(module).bfloat16()(**args))


def test_parameters_can_be_left_to_be_loaded(tmp_path):
    local = parallelize(seeded(Plain), X, "dp", gen_savedir=tmp_path, init_module_params=False)
    assert all(p.isnan().all() for p in local.parameters()) and local.scale.isnan()
    assert torch.equal(local.shift, torch.full((8,), 0.5)), "what no checkpoint holds has its value"
    local.load_state_dict(seeded(Plain).state_dict())
    close(local(**X), seeded(Plain)(**X))


def test_without_loading(tmp_path):
    folder = parallelize(MLP(), X, "tp", {"plan_ngpus": 2}, gen_savedir=tmp_path, load_module=False, instance_name="a")
    assert folder == tmp_path / "tests.small_models.MLP" / "a" and (folder / "rank1.py").exists()


# ---- initial weights and reuse ------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", ["match", "moo", "graph", "override"])
def test_weights_are_those_of_the_module_given(reuse, tmp_path):
    for seed in range(3):
        torch.manual_seed(seed)
        module = Plain()
        module.shift.fill_(seed)
        local = parallelize(module, X, "dp", gen_savedir=tmp_path, reuse=reuse)
        assert torch.equal(local(**X), module(**X))


def test_weights_from_files_or_a_function(tmp_path):
    from safetensors.torch import save_file

    wanted = seeded(LM)
    save_file({k: v.clone() for k, v in wanted.state_dict().items() if k != "embed.weight"}, tmp_path / "w.safetensors")
    args = {"ids": torch.arange(8).reshape(2, 4)}
    held = wanted.state_dict()
    for weights in (tmp_path / "w.safetensors", lambda name, slices: held[name][slices].double()):
        local = parallelize(LM(), args, "dp", gen_savedir=tmp_path / "gen", weights=weights).eval()
        assert torch.equal(local(**args), wanted.eval()(**args))
    save_file({"pos": held["pos"].clone()}, tmp_path / "few.safetensors")
    with pytest.raises(SavedirError, match=r"no weights for '[\w.]+' in .*few"):
        parallelize(LM(), args, "dp", gen_savedir=tmp_path / "gen", weights=tmp_path / "few.safetensors")


POLICIES = [("dp", 1), ("tp", 2), ("data", 2), ("tp", 4)]


def test_the_same_seed_gives_the_same_weights_for_every_plan(tmp_path):
    """Of an object, of a class, and of ordinary modules made afterwards."""

    torch.manual_seed(7)
    wanted, after = LM().state_dict(), nn.Linear(3, 3).weight

    def run(rank, policy, n, kind):
        torch.manual_seed(7)
        config, folder = ComputeConfig(plan_ngpus=n), tmp_path / f"{policy}{n}{kind}"
        made = parallelize(LM() if kind == "object" else LM, {"ids": torch.arange(8).reshape(2, 4)}, policy, config, gen_savedir=folder)
        local = made if kind == "object" else made()
        assert torch.equal(nn.Linear(3, 3).weight, after)
        for name, place in local.named_placements().items():
            if place.kind == "param":
                assert torch.equal(local.get_parameter(name), place.shard(local.mesh, lambda s, name=name: wanted[name][s]))
        return len(list(local.parameters()))

    for policy, n in (("dp", 1), ("tp", 2), ("data", 2), ("tp", 4)):
        for kind in ("object", "class"):
            run_processes(lambda r, p=policy, n=n, k=kind: run(r, p, n, k), max(n, 2))


# ---- several modules in one model ---------------------------------------------------------------------------


class Mixed(nn.Module):
    """Ordinary, parallel, ordinary, parallel (called three times), ordinary."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.first, self.second, self.again = Layer(), Layer(), MLP(p=0.0)
        self.between, self.head = nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, ids):
        x = self.between(self.first.eval()(self.embed(ids)))
        x = self.second.eval()(x)
        for _ in range(3):
            x = self.again(x) + 0.1
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("n,units", [(2, 1), (2, 2)])
def test_parallel_modules_inside_an_ordinary_one(n, units, tmp_path):
    ids = torch.arange(8).reshape(2, 4)

    def run(rank):
        model = seeded(Mixed).train()
        original = copy.deepcopy(model)
        config = ComputeConfig(plan_ngpus=n, runtime_ngpus=n * units)
        for name in ("first", "second", "again"):  # two of a class share a folder
            sub = getattr(model, name)
            setattr(model, name, parallelize(sub, X, "tp", config, gen_savedir=tmp_path))
        assert model.first.mesh is model.again.mesh, "one mesh, one set of process groups"
        assert all(a.training == b.training for a, b in ((model.first, original.first), (model.again, original.again)))
        for _ in range(2):
            loss, want = model(ids), original(ids)
            close(loss, want)
            loss.backward()
            want.backward()
        for name in ("first", "second", "again"):
            getattr(model, name).sync_grads()
            compare_gradients(getattr(model, name), getattr(original, name), units)
        for name in ("embed", "between", "head"):
            close(getattr(model, name).weight.grad, getattr(original, name).weight.grad)
        return set(dict(model.named_parameters())) == set(dict(original.named_parameters()))

    assert all(run_processes(run, n * units))


@pytest.mark.parametrize(
    "settings", [{}, {"use_zero": True}, {"use_zero": 3}, {"use_async_reducer": True, "reducer_bucket_cap_mb": 0.001}], ids=str
)
def test_one_optimizer_for_parallel_and_ordinary_parts(settings, tmp_path):
    ids = torch.arange(8).reshape(2, 4)

    def run(rank):
        model = seeded(Mixed).train()
        original = copy.deepcopy(model)
        config = ComputeConfig(plan_ngpus=2, **settings)
        for name in ("first", "second", "again"):
            setattr(model, name, parallelize(getattr(model, name), X, "tp", config, gen_savedir=tmp_path))
        ours = autopar.build_optimizer(model, torch.optim.AdamW, config, lr=0.01)
        plain = torch.optim.AdamW(original.parameters(), lr=0.01)
        for _ in range(4):
            a, b = model(ids), original(ids)
            close(a, b)
            a.backward()
            b.backward()
            ours.scale_grads(1 / config.units)
            close(ours.clip_gnorm(0.5), nn.utils.clip_grad_norm_(original.parameters(), 0.5))
            for optimizer in (ours, plain):
                optimizer.step()
                optimizer.zero_grad()

    run_processes(run, 4)


def test_several_instances_of_a_class(tmp_path):
    """Each call of the class is one more instance; another size needs a name of its own."""

    def run(rank):
        torch.manual_seed(0)
        config = ComputeConfig(plan_ngpus=2)
        made = parallelize(Plain, X, "tp", config, gen_savedir=tmp_path)
        assert isinstance(made, type) and made.__name__ == "Plain"
        a, b, c = made(), made(), made(init_params=False)
        assert a.up.weight is not b.up.weight and torch.equal(a.up.weight, b.up.weight) and c.up.weight.isnan().all()
        wide = parallelize(Plain, X, "tp", config, gen_savedir=tmp_path, module_fn=lambda: Plain(h=32), instance_name="wide")()
        with pytest.raises((SavedirError, LayoutError), match=r"generated from another configuration"):
            parallelize(Plain, X, "tp", config, gen_savedir=tmp_path, module_fn=lambda: Plain(h=32))
        a(**X).sum().backward()
        return tuple(wide.up.weight.shape), a.up.weight.grad is not None and b.up.weight.grad is None

    assert run_processes(run, 2) == [((16, 8), True)] * 2


def test_two_plan_ngpus_in_one_run(tmp_path):
    def run(rank):
        parallelize(seeded(MLP), X, "tp", ComputeConfig(plan_ngpus=2), gen_savedir=tmp_path)
        try:
            parallelize(seeded(Layer), X, "dp", ComputeConfig(plan_ngpus=1), gen_savedir=tmp_path)
        except LayoutError as e:
            return str(e)

    for text in run_processes(run, 2):
        assert "this module has plan_ngpus=1, but another one of this run has plan_ngpus=2" in text
    assert not (tmp_path / "tests.small_models.Layer").exists(), "said before anything is compiled"


# ---- outputs and inference ----------------------------------------------------------------------------------


@dataclass
class Answer:
    loss: torch.Tensor
    parts: tuple[torch.Tensor, torch.Tensor]
    note: str = "fixed"


class Outputs(nn.Module):
    def __init__(self, kind="dict"):
        super().__init__()
        self.up, self.kind = nn.Linear(8, 8), kind

    def forward(self, x):
        y = self.up(x)
        if self.kind == "tuple":
            return y.sum(), (y, None), 3
        if self.kind == "dict":
            return {"loss": y.sum(), "inner": [y, {"z": x}], "text": "t"}
        return Answer(y.sum(), (y, y * 2))


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass"])
def test_containers(kind, tmp_path):
    def run(rank):
        module = seeded(Outputs, kind)
        local = parallelize(module, X, "tp", ComputeConfig(plan_ngpus=2), gen_savedir=tmp_path)
        out, want = local(**X), module(**X)
        assert type(out) is type(want)
        if kind == "tuple":
            assert out[2] == 3 and out[1][1] is None
            close(out[1][0], want[1][0])
        elif kind == "dict":
            assert out["text"] == "t" and list(out) == list(want)
            close(out["inner"][0], want["inner"][0])
        else:
            assert out.note == "fixed"
            close(out.parts, want.parts)
        return True

    assert all(run_processes(run, 2))


def test_inference_only(tmp_path):
    module = seeded(MLP).eval()
    local = parallelize(module, X, "dp", ComputeConfig(inference_only=True), gen_savedir=tmp_path)
    out = local(x=X["x"].clone().requires_grad_())
    assert torch.equal(out, module(**X)) and not out.requires_grad
    assert not any(p.requires_grad for p in local.parameters()) and local.compute_config.inference_only
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("policy,n,units", [("tp", 2, 1), ("data", 2, 1), ("tp", 2, 2)])
def test_inference_only_on_ranks(policy, n, units, tmp_path):
    """Every rank returns what the module does, keeps no history and takes no gradient."""

    def run(rank):
        module = seeded(MLP).eval()
        config = ComputeConfig(plan_ngpus=n, runtime_ngpus=n * units, inference_only=True)
        local = parallelize(module, X, policy, config, gen_savedir=tmp_path)
        out = local(x=X["x"].clone().requires_grad_())
        close(out, module(**X))
        return out.requires_grad or any(p.requires_grad for p in local.parameters())

    assert not any(run_processes(run, n * units))


# ---- configuration ------------------------------------------------------------------------------------------


def test_every_field():
    config = ComputeConfig(
        plan_ngpus=2, runtime_ngpus=8, constant_folding=True, trace_strategy="cpu", guards="warn", use_zero=3, zero_ngroups=2,
        zero_use_reduce_scatter=True, use_async_reducer=True, reducer_bucket_cap_mb=1.5, use_end2end=True,
        pas_config={"_name": 1}, user_config={"a": 2},
    )  # fmt: skip
    assert ComputeConfig.of(config.to_dict()) == config and config.units == 4


def test_runtime_ngpus_is_the_number_of_processes():
    assert ComputeConfig(plan_ngpus=2).runtime_ngpus == 2
    assert run_processes(lambda rank: ComputeConfig(plan_ngpus=2).units, 4) == [2] * 4

    def odd(rank):
        with pytest.raises(ConfigError, match="the number of processes, 3, is not a multiple of plan_ngpus 2; use for example 4"):
            ComputeConfig(plan_ngpus=2)

    run_processes(odd, 3)


@pytest.mark.parametrize(
    "settings,text",
    [
        (dict(use_zero=2), "use_zero is 2; it must be False, True (or 1) or 3"),
        (dict(use_zero="yes"), "use_zero is 'yes'"),
        (dict(zero_ngroups=0), "zero_ngroups is 0; it must be a whole number of at least 1"),
        (dict(use_zero=True, zero_ngroups=3, runtime_ngpus=4), "zero_ngroups is 3, which does not divide the 4 scale units"),
        (dict(use_zero=True, zero_ngroups=3, plan_ngpus=4), "does not divide the 4 devices of the scale unit"),
        (dict(zero_use_reduce_scatter=1), "zero_use_reduce_scatter is 1; it must be True or False"),
        (dict(reducer_bucket_cap_mb=-1), "reducer_bucket_cap_mb is -1"),
        (dict(reducer_bucket_cap_mb=float("nan")), "reducer_bucket_cap_mb is nan"),
        (dict(inference_only=True, use_zero=True), "inference_only and use_zero exclude each other"),
        (dict(use_end2end="no"), "use_end2end is 'no'; it must be True or False"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ConfigError) as e:
        ComputeConfig(**settings)
    assert text in str(e.value)


@pytest.mark.parametrize(
    "settings,text",
    [
        (dict(module_dtype="bf16"), "module_dtype is 'bf16'; it must be a floating torch.dtype"),
        (dict(module_dtype=torch.int32), "module_dtype is torch.int32"),
        (dict(broadcast_strategy="some"), "unknown broadcast_strategy 'some'"),
        (dict(module_fn=MLP), "module_fn makes an instance of a module class, but the module given is an object"),
    ],
)
def test_bad_arguments(settings, text, tmp_path):
    with pytest.raises(ConfigError) as e:
        parallelize(MLP(), X, "dp", gen_savedir=tmp_path, **settings)
    assert text in str(e.value)


def test_the_public_name():
    assert autopar.BroadcastStrategy.of("no_weights") is autopar.BroadcastStrategy.NO_WEIGHTS
