"""model.parallel_modules: classes of submodules replaced by parallel versions inside an ordinary model, against the model as it is.
Must not know the loop: models are built and stepped here.
"""

import pytest
import torch
from torch import nn

from autopar.errors import AutoparError, ConfigError
from autopar.runtime.module import ParallelModule
from autopar.train import build
from autopar.train.args import TrainerArgs
from autopar.train.modelling import _Compile
from tests import train_cases as cases
from tests.procs import run_processes

HERE = __name__
LAYER = {"type": f"{cases.NAME}.Layer", "forward_args_gen_fn": f"{cases.NAME}.layer_args"}


class Alias(cases.Layer):
    """Another class for the same layer."""


class Stack(nn.Module):
    """Two layers of one kind, one used twice, one of another class, and one inside of another module."""

    def __init__(self, dim=8):
        super().__init__()
        self.inp = nn.Linear(dim, dim)
        self.a, self.b = cases.Layer(dim), cases.Layer(dim)
        self.again = self.a
        self.alias = Alias(dim)
        self.inner = nn.ModuleList([nn.Sequential(cases.Layer(dim), nn.LayerNorm(dim))])

    def forward(self, batch):
        x = self.inp(batch["x"])
        for layer in (self.a, self.b, self.again, self.alias, *self.inner):
            x = x + layer(x)
        return nn.functional.mse_loss(x, batch["y"])


class Numbered(cases.Layer):
    """A layer that differs from the others by more than its weights."""

    def __init__(self, dim, index):
        super().__init__(dim)
        self.index = index

    def forward(self, x):
        return super().forward(x) * (1 + self.index)


class NumberedStack(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.layers = nn.ModuleList([Numbered(dim, i % 2) for i in range(3)])

    def forward(self, batch):
        x = batch["x"]
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.mse_loss(x, batch["y"])


def wrong_args(args):
    return [1]


def half_args(args):
    return {"x": torch.randn(args.micro_batch_size, 8)}


def numbered_args(args):
    return {"x": torch.randn(args.micro_batch_size, 8)}


def args(folder, *parts, model=f"{HERE}.Stack", **changes):
    tree = cases.mlp_args(folder, **{"pas_policy": "tp", **changes})
    tree["model"] = {"type": model, "parallel_modules": list(parts)}
    return TrainerArgs.of(tree)


def sample():
    return torch.utils.data.default_collate([cases.SimpleDataset()[i] for i in range(2)])


def steps(model, optimizer, n=3):
    losses = []
    for _ in range(n):
        loss = model(sample())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plain_losses(cls, seed=7, n=3):
    torch.manual_seed(seed)
    model = cls()
    return steps(model, torch.optim.SGD(model.parameters(), lr=0.1), n), torch.rand(1)


def built(a, n=3):
    """(losses, a random number drawn after building, class names by path) of a run."""
    build.init_env(a, None)
    model = build.make_model(a, sample())
    drawn = torch.rand(1)
    kinds = {n: isinstance(m, ParallelModule) for n, m in model.named_modules(remove_duplicate=False) if type(m).__name__ != "Holder"}
    return steps(model, build.make_optimizer(a, model), n), drawn, kinds


@pytest.mark.procs
def test_parts_on_two_processes(tmp_path):
    want, drawn = plain_losses(Stack)
    a = args(tmp_path, LAYER, compute_config={"plan_ngpus": 2, "use_end2end": True})
    for losses, after, kinds in run_processes(lambda rank: built(a), 2):
        assert losses == pytest.approx(want, abs=1e-5)
        assert torch.equal(after, drawn), "weights and random state are those of the model as it is"
        assert [n for n, parallel in kinds.items() if parallel] == ["a", "b", "again", "inner.0.0"]
        assert kinds["alias"] is False, "a subclass is another class"


def test_an_alias_is_parallelised_with_settings_of_its_own(tmp_path):
    want, _ = plain_losses(Stack)
    alias = LAYER | {"type": f"{HERE}.Alias", "instance_name": "own", "pas_policy": "data", "gen_savedir": str(tmp_path / "other")}
    alias["compute_config"] = {"constant_folding": True, "pas_config": {"_note": 1}}
    losses, _, kinds = built(args(tmp_path, LAYER, alias))
    assert losses == pytest.approx(want, abs=1e-5) and kinds["alias"] and kinds["a"]
    assert (tmp_path / "other" / f"{HERE}.Alias" / "own" / "model.py").exists()
    assert (tmp_path / "gen" / f"{cases.NAME}.Layer" / "_" / "model.py").exists()


def test_a_part_compiles_with_the_merged_configuration(tmp_path, monkeypatch):
    part = LAYER | {"compute_config": {"guards": "warn", "use_zero": True}}
    a = args(tmp_path, part, compute_config={"trace_strategy": "cpu", "guards": "off"})
    build.init_env(a, None)
    model = build.make_model(a, sample())
    config = model.a.compute_config
    assert (config.guards, config.trace_strategy, config.use_zero, config.use_end2end) == ("warn", "cpu", True, False)
    seen = []
    monkeypatch.setattr(build, "build_optimizer", lambda model, make, config, **kwargs: seen.append(config))
    build.make_optimizer(a, model)
    assert seen == [config], "the optimizer sums gradients as the parts say"


def test_own_strategy_and_reuse(tmp_path):
    own = {"broadcast_strategy": "code", "gen_reuse": "graph", "gen_savedir": "x", "instance_name": "y", "pas_policy": "data"}
    a = args(tmp_path, LAYER, LAYER | own, broadcast_strategy="no_weights", gen_reuse="override", instance_name="z")
    first, second = (_Compile.of(a, part) for part in a.model.parallel_modules)
    assert (first.broadcast_strategy, first.reuse, first.gen_savedir) == ("no_weights", "override", str(tmp_path / "gen"))
    assert (first.instance_name, first.policy) == ("z", "tp")
    assert {k: getattr(second, {"gen_reuse": "reuse", "pas_policy": "policy"}.get(k, k)) for k in own} == own


def test_parts_that_differ_get_code_of_their_own(tmp_path):
    want, _ = plain_losses(NumberedStack)
    part = {"type": f"{HERE}.Numbered", "forward_args_gen_fn": f"{HERE}.numbered_args"}
    losses, _, _ = built(args(tmp_path, part, model=f"{HERE}.NumberedStack"))
    assert losses == pytest.approx(want, abs=1e-5)
    assert sorted(p.name for p in (tmp_path / "gen" / f"{HERE}.Numbered").iterdir()) == ["_", "at-layers.1"]
    assert built(args(tmp_path, part, model=f"{HERE}.NumberedStack"))[0] == losses  # reused: auto is match


def test_compile_mode_makes_the_code_of_all_parts(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    config = {"plan_ngpus": 2, "runtime_ngpus": 4}
    a = args(tmp_path, LAYER, LAYER | {"type": f"{HERE}.Alias"}, run_mode="compile", compute_config=config)
    build.init_env(a, None)
    assert build.make_model(a, sample()) is None
    assert len(list((tmp_path / "gen").rglob("rank1.py"))) == 2


def test_precision_of_parts(tmp_path):
    a = args(tmp_path, LAYER | {"precision": "bf16", "forward_args_gen_fn": f"{HERE}.half_args"}, precision={"param": "fp32"})
    model = build.make_model(a, sample())
    assert model.a.up.weight.dtype == model.inner[0][0].up.weight.dtype == torch.bfloat16
    assert model.alias.up.weight.dtype == model.inp.weight.dtype == torch.float32


def test_weights_of_parts(tmp_path):
    """All of the model from one file, or of a class from a file or from entries of the trainer's file."""
    torch.manual_seed(50)
    whole, layer = Stack(), cases.Layer(8)
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    torch.save(layer.state_dict(), tmp_path / "layer.pt")

    def values(*parts, **changes):
        a = args(tmp_path, *parts, **changes)
        build.init_env(a, None)
        return {n: p.detach() for n, p in build.make_model(a, sample()).named_parameters()}

    torch.manual_seed(7)
    fresh = dict(Stack().named_parameters())
    got = values(LAYER, tracing_from_weights=str(tmp_path / "whole.pt"))
    assert all(torch.equal(got[n], p) for n, p in whole.named_parameters())
    got = values(LAYER | {"tracing_from_weights": str(tmp_path / "layer.pt")})
    assert torch.equal(got["a.up.weight"], layer.up.weight) and torch.equal(got["b.up.weight"], layer.up.weight)
    assert torch.equal(got["alias.up.weight"], fresh["alias.up.weight"]) and torch.equal(got["inp.weight"], fresh["inp.weight"])
    got = values(LAYER | {"tracing_from_weights_prefix": "b"}, tracing_from_weights=str(tmp_path / "whole.pt"))
    assert torch.equal(got["a.up.weight"], whole.b.up.weight) and torch.equal(got["b.up.weight"], whole.b.up.weight)
    assert torch.equal(got["inp.weight"], fresh["inp.weight"])


def test_arguments_of_a_part_are_held_to_the_model(tmp_path):
    assert isinstance(build.make_model(args(tmp_path, LAYER | {"args": {"dim": "8"}}), sample()).a, ParallelModule)
    with pytest.raises(ConfigError) as e:
        build.make_model(args(tmp_path, LAYER | {"args": {"dim": 4}}), sample())
    assert "args describe another Layer than the one at a: up.weight is (8, 4) by args, (16, 8) in the model" in str(e.value)


@pytest.mark.parametrize(
    "parts, says",
    [
        ([LAYER | {"type": "torch.nn.GRU"}], "model.parallel_modules.0.type: the model has no part of the class GRU: "),
        ([LAYER | {"type": f"{cases.NAME}.MLP"}], "the model has no part of the class MLP: "),
        ([LAYER | {"type": f"{HERE}.Stack"}], "the model has no part of the class Stack: "),
        (
            [LAYER | {"type": f"{HERE}.wrong_args"}],
            "is no class (a function that makes one will not do)",
        ),
        ([LAYER | {"forward_args_gen_fn": f"{HERE}.wrong_args"}], "forward_args_gen_fn returned list; it must return a dict"),
        (
            [LAYER, LAYER | {"type": f"{HERE}.Alias", "compute_config": {"use_zero": True}}],
            "use_zero is True, and False for",
        ),
        (
            [LAYER | {"compute_config": {"guards": "of"}}],
            "parallel_modules.0.compute_config: unknown guards 'of': did you mean 'off'?",
        ),
        (
            [LAYER | {"pas_policy": f"{HERE}.none"}],
            f"parallel_modules.0.pas_policy '{HERE}.none': {HERE} was imported, but it has no",
        ),
    ],
)
def test_errors(tmp_path, parts, says):
    with pytest.raises(AutoparError) as e:
        build.make_model(args(tmp_path, *parts), sample())
    assert says in str(e.value)
