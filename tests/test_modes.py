"""Python branches on self.training: generated code is right in both modes, or refuses the one it was not traced in."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import mode_models as mm
import pytest
import torch
from interp import Interpreter
from torch import nn

import autopar
from autopar.codegen.load import load_module_class
from autopar.config import ComputeConfig
from autopar.driver import compile_module
from autopar.errors import GuardError
from autopar.ir.codec import graph_from_json, graph_to_json
from autopar.rules import oneop
from autopar.rules.oneop import one_op
from autopar.rules.prove import prove
from autopar.runtime import rank_mesh
from autopar.trace import trace
from autopar.trace.flags import Flags
from autopar.trace.record import record

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
SELECT = "autopar:select_training"


def made(cls, train: bool = True) -> nn.Module:
    torch.manual_seed(0)
    m = cls().double().train(train)
    if hasattr(m, "frozen"):
        m.frozen.eval()
    return m


def generated(module: nn.Module, **config):
    compiled = compile_module(module, {"x": X}, "dp", ComputeConfig(**config))
    weights = dict(module.named_parameters()) | dict(module.named_buffers()) | compiled.graph.constants
    local = load_module_class(compiled.texts)(rank_mesh((), device="cpu"))
    return local.load(lambda n, s: weights[n].detach()[s]), compiled


def selects(graph) -> int:
    return sum(getattr(op, "fn", "") == SELECT for b in graph.blocks.values() for op in b.ops)


BOTH = [  # traced in train mode, right in eval mode too; number of choices between them
    (mm.StochasticDepth, 2),
    (mm.Noise, 1),
    (mm.NoiseLayer, 1),
    (mm.NoiseBetweenOps, 1),
    (mm.AuxiliaryLoss, 1),
    (mm.Frozen, 0),
    (mm.Handed, 0),
    (mm.Attention, 0),
    (mm.Checkpointed, 0),
    (mm.LayerDrop, 0),
    (mm.Switches, 0),
]


@pytest.mark.parametrize(("cls", "choices"), BOTH, ids=lambda v: getattr(v, "__name__", ""))
def test_right_in_both_modes(cls, choices):
    module = made(cls)
    local, compiled = generated(module)
    assert compiled.graph.branch is None and "check_mode" not in compiled.texts["model.py"]
    assert selects(compiled.graph) == choices
    eager = copy.deepcopy(module)
    for mode in (True, False, True):
        eager.train(mode)
        if hasattr(eager, "frozen"):
            eager.frozen.eval()
        local.train(mode)
        results = []
        for m in (eager, local):
            torch.manual_seed(5)
            m.zero_grad()
            out = m(X)
            out.square().sum().backward()
            results.append((out.detach(), {n: p.grad for n, p in m.named_parameters()}))
        (a, grads), (b, grads2) = results
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
        for n, g in grads.items():
            g2 = grads2.get(n)
            assert (
                (g is None or not g.any()) if g2 is None else torch.allclose(g2, torch.zeros_like(g2) if g is None else g, 1e-12, 1e-12)
            ), n


ONE = [  # class, mode traced in, the line named
    (mm.TrainingOutput, True, "if self.training:"),
    (mm.EvalBranch, True, "if not self.training:"),
    (mm.Counter, True, "if self.training:"),
    (mm.InPlace, True, "return drop_path(x, self.p, self.training)"),
    (mm.Always, True, "F.scaled_dot_product_attention(q, q, q, dropout_p=self.p)"),
    (mm.StochasticDepth, False, "return drop_path(x, self.p, self.training)"),
    (mm.AuxiliaryLoss, False, "if self.training:"),
    (mm.Frozen, False, "return self.head(self.drop(self.norm(self.frozen(self.lin(x)))))"),
    (mm.Handed, False, "F.dropout(self.lin(x), p=self.p, training=self.training)"),
    (mm.Attention, False, "self.p if self.training else 0.0"),
]


@pytest.mark.parametrize(("cls", "train", "line"), ONE, ids=lambda v: getattr(v, "__name__", ""))
def test_the_other_mode_is_refused_by_its_line(cls, train, line):
    module = made(cls, train)
    local, compiled = generated(module)
    assert line in compiled.graph.branch.text and selects(compiled.graph) == 0
    assert local.training is train, "generated code starts in the mode it was traced in"
    torch.manual_seed(5)
    want = copy.deepcopy(module)(X)
    torch.manual_seed(5)
    torch.testing.assert_close(local(X), want, rtol=1e-12, atol=1e-12)
    local.train(not train)
    with pytest.raises(GuardError) as e:
        local(X)
    assert "mode_models.py:" in str(e.value) and line in str(e.value)
    assert f"instance_name='{'eval' if train else 'train'}'" in str(e.value)
    assert any("refuses" in w for w in compiled.graph.warnings)
    again = graph_from_json(graph_to_json(compiled.graph))
    assert again.branch == compiled.graph.branch and again == compiled.graph
    assert "refuses" in str(compiled.graph)


def test_eval_that_computes_more_can_be_chosen_when_traced_in_eval():
    module = made(mm.EvalBranch, False)
    local, compiled = generated(module)
    assert compiled.graph.branch is None and selects(compiled.graph) == 1
    for mode in (False, True):
        torch.testing.assert_close(local.train(mode)(X), copy.deepcopy(module).train(mode)(X))


def test_a_mode_without_difference_is_not_refused():
    for train in (True, False):
        _, compiled = generated(made(lambda: mm.Attention(0.0), train))
        assert compiled.graph.branch is None and selects(compiled.graph) == 0


def test_layers_of_torch_that_do_the_same_in_eval():
    module = nn.Sequential(nn.Dropout(0.0), nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True), nn.LSTM(8, 8)).eval()
    assert trace(module, {"input": torch.randn(2, 3, 8)}).branch is None
    module[0].p = 0.5
    assert trace(module, {"input": torch.randn(2, 3, 8)}).branch is not None


@pytest.mark.parametrize("cls", [mm.StochasticDepth, mm.Noise, mm.AuxiliaryLoss, mm.Attention], ids=lambda c: c.__name__)
@pytest.mark.parametrize("policy", ["tp", "data"])
def test_split_over_ranks(cls, policy):
    assert autopar.verify(made(cls), {"x": X}, policy, ComputeConfig(plan_ngpus=2)).check().ok


def test_verify_takes_the_mode_the_code_accepts():
    report = autopar.verify(made(mm.EvalBranch), {"x": X}, "dp", ComputeConfig())
    assert report.ok and {d.mode for d in report.differences} == {"train"}
    assert {d.mode for d in autopar.verify(made(mm.EvalBranch, False), {"x": X}, "dp", ComputeConfig()).differences} == {"train", "eval"}


def test_the_choice_is_proven_in_both_modes(monkeypatch):
    for pick in (lambda a, b: a, lambda a, b: b):
        monkeypatch.setitem(oneop.functions, SELECT, pick)
        proofs = prove(one_op(SELECT, torch.randn(8, 12).double(), torch.randn(8, 12).double()))
        assert len(proofs) > 10 and all(p.ok for p in proofs), [str(p) for p in proofs if not p.ok]


def test_interpreted_in_both_modes():
    module = made(mm.NoiseLayer)
    graph = trace(module, {"x": X})
    for mode in (True, False):
        module.train(mode)
        torch.manual_seed(1)
        want = module(X)
        torch.manual_seed(1)
        torch.testing.assert_close(Interpreter(graph, module).run(x=X), want)


def test_nothing_of_the_watch_remains():
    module = made(mm.StochasticDepth)
    module.layers[1].eval()
    before = [m.training for m in module.modules()]
    record(module, {"x": X})
    assert [m.training for m in module.modules()] == before
    assert "training" not in vars(nn.Module) and all(type(m.__dict__["training"]) is bool for m in module.modules())


@pytest.mark.parametrize(
    ("cls", "runs"),
    [(mm.Handed, 1), (lambda: mm.Attention(0.0), 1), (mm.Frozen, 1), (mm.Attention, 2), (mm.Noise, 2), (mm.Always, 2)],
    ids=["handed", "no dropout", "torch layers", "dropout", "noise", "always"],
)
def test_the_model_runs_again_only_where_the_mode_may_matter(cls, runs):
    module, calls = made(cls), []
    module.register_forward_pre_hook(lambda m, args: calls.append(m.__dict__["training"]))
    record(module, {"x": X})
    assert calls == [True, False][:runs]


def test_a_model_that_fails_in_the_other_mode_is_refused_there():
    class Fails(mm.Base):
        def forward(self, x):
            if not self.training:
                raise RuntimeError("only for training")
            return self.lin(x)

    assert "if not self.training" in record(Fails().double(), {"x": X}).branch.text


class Expressions(nn.Module):
    """Reads of the flag, by name of the method; `p`, `flag` and `other` are settings."""

    p, flag, other = 0.0, False, SimpleNamespace(rate=0.5)

    def equal_results(self):
        return 0.0 if not self.training else self.p

    def conjunction(self):
        return self.training and self.flag

    def conjunction_behind(self):
        return self.flag and self.training  # NB: not even read

    def disjunction(self):
        return not self.training or self.flag is False

    def different_results(self):
        return self.other.rate if self.training else 0.0

    def open_conjunction(self):
        return self.training and self.other.rate > 0.0

    def called(self):
        return bool(self.training)

    def indirect(self):
        return getattr(self, "training")  # noqa: B009

    def in_a_comprehension(self):
        return [i for i in range(2) if self.training]

    def unknown_call(self):
        return self.training and print()


EXPRESSIONS = {
    "equal_results": 0, "conjunction": 0, "conjunction_behind": 0, "disjunction": 0, "different_results": 1, "open_conjunction": 1,
    "called": 1, "indirect": 1, "in_a_comprehension": 1, "unknown_call": 1,
}  # fmt: skip


@pytest.mark.parametrize(("name", "reads"), EXPRESSIONS.items())
def test_reads_that_may_matter(name, reads, monkeypatch):
    found = []
    plain = Flags.read

    def note(self, *args):
        plain(self, *args)
        found.append(len(self.reads))

    monkeypatch.setattr(Flags, "read", note)

    class Module(Expressions):
        def forward(self, x):
            getattr(self, name)()
            return x * 2

    record(Module(), {"x": X})
    assert max(found, default=0) == reads


# ---- names --------------------------------------------------------------------------------------------------


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, states, position, *, mask=None):
        cos, sin = position
        return self.lin(states * cos + sin) * mask


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.up = Inner(), nn.Linear(8, 8)

    def forward(self, hidden, position, extras, *rest, mask=None):
        states = self.inner(hidden, position, mask=mask)
        return hidden + self.up(F_gelu(states)) * extras["scale"] + rest[0], mask


def F_gelu(x):
    return torch.nn.functional.gelu(x)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        position = (x.cos(), x.sin())
        keep = x > 0
        for layer in self.layers:
            x, keep = layer(x, position, {"scale": x.exp()}, x * 2, mask=keep)
        return x


def test_inputs_of_a_block_are_called_what_the_user_calls_them():
    graph = trace(Stack(), {"x": torch.randn(4, 8)})
    block = graph.blocks["Layer"]
    names = dict(zip([block.values[i].name for i in block.inputs], block.input_names, strict=True))
    assert sorted(names.values()) == ["cos", "extras_scale", "hidden", "mask", "rest_0", "sin"]
    assert graph_from_json(graph_to_json(graph)).blocks["Layer"].input_names == block.input_names
    text = compile_module(Stack(), {"x": torch.randn(4, 8)}, "dp", ComputeConfig(), graph=graph).texts["model.py"]
    head = next(line for line in text.splitlines() if "def forward(self, hidden" in line)
    assert set(head.partition("self, ")[2].rstrip("):").split(", ")) == set(names.values())
    assert "x = self.layers[2](x, " in text or "x = layer(x, " in text


def test_names_do_not_change_the_fingerprint():
    from dataclasses import replace

    graph = trace(Stack(), {"x": torch.randn(4, 8)})
    blocks = {n: replace(b, input_names=()) for n, b in graph.blocks.items()}
    assert replace(graph, blocks=blocks).fingerprint == graph.fingerprint


# ---- autocast -----------------------------------------------------------------------------------------------


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = self.lin(x)
            with torch.autocast("cuda", enabled=False):
                z = self.lin(x)
        return y, z


@pytest.mark.parametrize("strategy", ["meta", "cpu", "cuda_run_cpu_offload"])
def test_autocast_for_cuda_traced_on_the_cpu(strategy):
    if strategy == "cuda_run_cpu_offload" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    module, x = Autocast(), torch.randn(4, 8)
    graph = trace(module, {"x": x}, strategy=strategy)
    assert not graph.warnings and [op.ctx.autocast != () for op in graph.body.ops if "linear" in op.fn] == [True, False]
    compiled = compile_module(module, {"x": x}, "dp", ComputeConfig(trace_strategy=strategy), graph=graph)
    assert "with torch.autocast(self.device.type, dtype=torch.bfloat16):" in compiled.texts["model.py"]
    weights = dict(module.named_parameters())
    local = load_module_class(compiled.texts)(rank_mesh((), device="cpu")).load(lambda n, s: weights[n].detach()[s])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = module.lin(x)
    y, z = local(x)
    assert y.dtype == torch.bfloat16 and z.dtype == torch.float32
    torch.testing.assert_close((y, z), (want, module.lin(x)))
