"""Generated code against the module it came from: outputs, every gradient and buffer, and how the text reads.
Must not store generated text: what is checked is parsed, run, or a line that the design asks for.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import traceback
import warnings
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from autopar import runtime as ap
from autopar.codegen.emit import emit
from autopar.codegen.load import load_file, load_module_class
from autopar.errors import AutoparError, GuardError, SavedirError
from autopar.ir.mesh import Mesh
from autopar.lower.lower import lower
from autopar.pas.plan import Plan
from autopar.trace import trace

# ---- generating and comparing


def generate(module, args, plan=None, **options):
    """The files for a module, and its graph."""
    fold = options.pop("constant_folding", False)
    graph = trace(module, args, constant_folding=fold)
    return emit(graph, lower(graph, plan or Plan()), **options), graph


def reader_of(module, graph):
    """reader(name, slices) of the module's own tensors."""
    held = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False)) | graph.constants
    return lambda name, slices: held[name].detach()[slices] if slices else held[name].detach()


def one_rank():
    return ap.RankMesh((), 0, 1, lambda *_: None, torch.device("cpu"))


def build(module, args, **options):
    files, graph = generate(module, args, **options)
    made = load_module_class(files)(one_rank()).load(reader_of(module, graph))
    return made.train(module.training), files["model.py"]


def tensors_in(x):
    if isinstance(x, torch.Tensor):
        return [x]
    items = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else vars(x).values() if hasattr(x, "__dict__") else ()
    return [t for y in items for t in tensors_in(y)]


def step(module, args):
    """Outputs, gradients of parameters and inputs, and buffers after one forward and backward."""
    torch.manual_seed(0)
    module.zero_grad()
    args = {k: v.clone().detach().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    out = module(**args)
    outs = tensors_in(out)
    loss = sum(t.double().square().sum() for t in outs if t.is_floating_point() and t.requires_grad)
    if isinstance(loss, torch.Tensor):
        loss.backward()
    grads = {n: p.grad for n, p in module.named_parameters()}
    grads |= {f"input {k}": v.grad for k, v in args.items() if isinstance(v, torch.Tensor)}
    return outs, grads, dict(module.named_buffers()), out


def same(module, args, made, other=None):
    """Assert that the generated module does what the original does, on the traced and on other arguments."""
    keys = [k for k in made.state_dict() if ".constant" not in k and not k.startswith("constant")]
    assert keys == list(module.state_dict()) or sorted(keys) == sorted(module.state_dict())
    for a in (args, other) if other else (args,):
        (o1, g1, b1, _), (o2, g2, b2, _) = step(module, a), step(made, a)
        torch.testing.assert_close(o2, o1, rtol=0, atol=0)
        assert {n for n, g in g1.items() if g is None} == {n for n, g in g2.items() if g is None}
        for n, g in g1.items():
            if g is not None:
                torch.testing.assert_close(g2[n], g, rtol=0, atol=0, msg=n)
        for n, b in b1.items():
            torch.testing.assert_close(b2[n], b, rtol=0, atol=0, msg=n)


def check_text(text):
    """What holds for all generated files."""
    ast.parse(text)
    for line in text.split("\n"):
        assert line == line.rstrip() and len(line) <= 140, line
    ruff = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "E9,F", "--no-cache", "-"], input=text, capture_output=True, text=True
    )
    assert ruff.returncode == 0, ruff.stdout + text


def body(text, cls, function="forward"):
    """Statements of a method, unparsed, comments gone."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == cls:
            for f in node.body:
                if isinstance(f, ast.FunctionDef) and f.name == function:
                    return [ast.unparse(s) for s in f.body]
    raise AssertionError(f"no {cls}.{function}")


# ---- modules to generate from


class Mlp(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.drop = nn.Dropout(0.3)

    def forward(self, hidden_states, scale=None):
        residual = hidden_states
        hidden_states = self.norm(hidden_states)
        hidden_states = F.gelu(self.up(hidden_states))
        hidden_states = self.drop(self.down(hidden_states))
        if scale is not None:
            hidden_states = hidden_states * scale
        hidden_states = residual + hidden_states
        return hidden_states


class Stack(nn.Module):
    def __init__(self, n=3, d=8, keep=False):
        super().__init__()
        self.layers = nn.ModuleList(Mlp(d) for _ in range(n))
        self.head = nn.Linear(d, 5)
        self.keep = keep

    def forward(self, x):
        kept = []
        scale = x.mean()
        hidden = x * 2
        for layer in self.layers:
            hidden = layer(hidden, scale)
            kept.append(hidden)
        return (self.head(hidden), *kept) if self.keep else self.head(hidden)


class Shared(nn.Module):
    """One layer called three times, then two of a list from the middle."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x):
        for _ in range(3):
            x = self.layers[0](x)
        for layer in self.layers[2:4]:
            x = layer(x)
        return x


class Heads(nn.Module):
    """Views with sizes, unpacking, matmuls, operators, subscripts."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.register_buffer("bias", torch.ones(16, 16, dtype=torch.bool).tril(), persistent=False)

    def forward(self, x, mask=None):
        b, s, d = x.shape
        q, k, v = self.qkv(x).split(8, dim=-1)
        q, k, v = (t.view(b, s, 2, -1).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / 4 ** 0.5
        causal = self.bias[:s, :s]
        if mask is not None:
            causal = causal & mask[:, None, None, :]
        scores = torch.where(causal, scores, float("-inf"))
        probs = scores.softmax(-1)
        y = (probs @ v).transpose(1, 2).reshape(b, s, d)
        top, _ = y.max(dim=-1, keepdim=True)
        return -self.out(y) + 1 - top[..., 0:1].pow(2)


class Contexts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            scale = self.a(x).abs().mean()
            scale = scale + 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.b(x)
            with torch.no_grad():
                z = self.a(y)
            w = self.a(y)
        return y.float() / scale + z.float() + w.float()


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(8)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("hidden", torch.zeros(8), persistent=False)

    def forward(self, x):
        old = self.mean
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.hidden.copy_(x.detach()[0])
        return self.bn(x) - old + self.mean


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8))

    def forward(self, x, ids):
        shifted = ids.new_zeros(ids.shape)
        shifted[:, 1:] = ids[:, :-1].clone()
        shifted[:, 0] = 7
        y = x * self.w
        y += 1
        first = y[:, 0]
        first.mul_(3)
        z = torch.zeros_like(x)
        z.scatter_(1, shifted % 8, 1.0)
        z.masked_fill_(x > 1, -1)
        return y * z, shifted


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor
    extra: dict | None = None


Pair = namedtuple("Pair", "first second")


class Structs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        y = self.a(x)
        return Output(y.mean(), y, {"pair": Pair(y + 1, None), "list": [y, 3, "text"]})


class Arguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, batch, pair, x=None, flag=True, *, scale=2.0, name="it's", **kwargs):
        y = self.a(batch["ids"].float()) + pair[0] * pair[1]
        if x is not None:
            y = y + x
        return y * scale if flag else y


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(3))
        self.a = nn.Linear(8, 8)

    def part(self, x, y):
        return F.dropout(self.a(x) * y, 0.5, self.training)

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return checkpoint(self.part, x, x + 1, use_reentrant=False)


class Guarded(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x, mask):
        if mask.all():
            return self.a(x)
        return self.a(x) * mask


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 3  # NB: not the gradient of x * 2, so that looking inside would show


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.table = torch.arange(8.0)  # a constant, no buffer

    def forward(self, x):
        return Twice.apply(self.a(x)) + self.table


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.module = nn.ModuleDict({"a-b": nn.Linear(8, 8)})

    def forward(self, input_ids):
        x = self.frozen(self.embed(input_ids))
        return self.head(self.module["a-b"](x))


class Large(nn.Module):
    """A helper whose locals are large and dead long before the forward ends."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def scores(self, x):
        weights = self.a(x)
        wide = weights.exp()
        return wide.sum(-1, keepdim=True)

    def forward(self, x):
        s = self.scores(x)
        y = self.b(x) * s
        y = y.tanh()
        y = y + x
        y = y.relu()
        return y


def data(*shape, grad=False, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def ids(*shape, high=16, seed=1):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "mlp": (Mlp, {"hidden_states": data(2, 4, 8, grad=True)}, {"hidden_states": data(3, 5, 8)}),
    "stack": (Stack, {"x": data(2, 4, 8)}, {"x": data(1, 2, 8)}),
    "stack-keep": (lambda: Stack(keep=True), {"x": data(2, 4, 8)}, None),
    "shared": (Shared, {"x": data(2, 4, 8)}, {"x": data(3, 8)[None]}),
    "heads": (Heads, {"x": data(2, 6, 8), "mask": torch.tensor([[True] * 6, [True] * 4 + [False] * 2])},
              {"x": data(1, 9, 8), "mask": torch.ones(1, 9, dtype=torch.bool)}),
    "heads-no-mask": (Heads, {"x": data(2, 6, 8)}, None),
    "contexts": (Contexts, {"x": data(4, 8)}, {"x": data(2, 8)}),
    "buffers": (Buffers, {"x": data(4, 8)}, {"x": data(6, 8)}),
    "writes": (Writes, {"x": data(4, 8), "ids": ids(4, 8)}, {"x": data(2, 8), "ids": ids(2, 8)}),
    "structs": (Structs, {"x": data(4, 8)}, {"x": data(2, 8)}),
    "arguments": (Arguments, {"batch": {"ids": ids(4, 8)}, "pair": (data(4, 8), data(8))}, None),
    "checkpointed": (Checkpointed, {"x": data(4, 8, grad=True)}, {"x": data(2, 8)}),
    "guarded": (Guarded, {"x": data(4, 8), "mask": torch.ones(4, 1)}, {"x": data(2, 8), "mask": torch.ones(2, 1)}),
    "custom": (Custom, {"x": data(4, 8)}, {"x": data(2, 8)}),
    "tied": (Tied, {"input_ids": ids(2, 4)}, {"input_ids": ids(3, 7)}),
    "large": (Large, {"x": data(4, 8)}, {"x": data(2, 8)}),
}  # fmt: skip


def case(name):
    make, args, other = CASES[name]
    torch.manual_seed(3)
    return make(), args, other


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_runs_as_the_module(name, training):
    module, args, other = case(name)
    made, text = build(module.train(training), args)
    check_text(text)
    same(module, args, made, other)


@pytest.mark.parametrize("name", ["mlp", "heads", "checkpointed", "buffers"])
def test_folded_and_freed(name):
    module, args, _ = case(name)
    made, text = build(module, args, constant_folding=True, free_bytes=1)
    check_text(text)
    same(module, args, made)


# ---- how it reads


def test_reads_like_the_users_forward():
    module, args, _ = case("mlp")
    _, text = build(module, args)
    lines = body(text, "Mlp")
    assert lines[2:5] == [
        "residual = hidden_states",
        "hidden_states = F.layer_norm(hidden_states, (8,), weight=self.norm.weight, bias=self.norm.bias)",
        "linear = F.linear(hidden_states, self.up.weight, self.up.bias)",
    ]
    assert lines[-2:] == ["hidden_states = residual + hidden_states", "return hidden_states"]
    assert "# test_codegen.py:" in text and "  hidden_states = F.gelu(self.up(hidden_states))" in text
    assert "ap.i_to" not in text and "ap.p_to" not in text


def test_one_class_per_block_and_a_loop():
    _, text = build(*case("stack")[:2])
    assert text.count("class Mlp(ap.Block):") == 1 and '"""layers.* (' in text and "3 instances" in text
    assert "        for i in range(3):\n            self.add(f\"layers.{i}\", Mlp(mesh))\n" in text
    assert "for layer in self.layers:\n    hidden_states = layer(hidden_states, scale)" in body(text, "Stack")


def test_collected_outputs_stop_the_loop():
    _, text = build(*case("stack-keep")[:2])
    assert "self.layers[1](" in text and "for layer" not in text


def test_repeated_and_partial_loops():
    _, text = build(*case("shared")[:2])
    lines = body(text, "Shared")
    assert any(s.startswith("for _ in range(3):\n    hidden_states = self.layers[0](hidden_states)") for s in lines)
    assert any(s.startswith("for layer in self.layers[2:4]:") for s in lines)


def test_operators_and_unpacking():
    _, text = build(*case("heads")[:2])
    lines = body(text, "Heads")
    assert any(s.startswith("q, k, v = ") and ".split(8, dim=-1)" in s for s in lines)
    assert any(" @ " in s for s in lines) and any(" & " in s for s in lines) and any("self.bias[:s" in s for s in lines)
    assert any(s.startswith("top, _ = y.max(") for s in lines)
    assert 'float("-inf")' in text


def test_contexts_are_grouped():
    _, text = build(*case("contexts")[:2])
    top = [s.split("\n")[0] for s in body(text, "Contexts")]
    assert top.count("with torch.no_grad():") == 1
    assert top.count("with torch.autocast(self.device.type, dtype=torch.bfloat16):") == 1
    assert text.count("torch.autocast") == 1 and text.count("torch.no_grad") == 2


def test_large_dead_locals_are_deleted():
    module, args, _ = case("large")
    text = generate(module, args, free_bytes=1)[0]["model.py"]
    assert any(s.startswith("del ") and "wide" in s for s in body(text, "Large"))
    assert "del " not in generate(module, args)[0]["model.py"]


def test_header():
    files, _ = generate(*case("mlp")[:2])
    head = files["model.py"].split("\n")[:3]
    assert "Generated by autopar" in head[0] and head[1].endswith("Mlp") and "autopar show" in head[2] and "--plan" in head[2]
    assert sorted(files) == ["model.py", "rank0.py"]


def test_deterministic_for_any_hash_seed(tmp_path):
    script = (
        "import sys; sys.path[:0] = ['tests', '.']\n"
        "import test_codegen as t\n"
        "for n in ('stack', 'checkpointed', 'tied', 'heads'):\n"
        "    for k, v in t.generate(*t.case(n)[:2])[0].items(): print(k, v)\n"
    )
    root = Path(__file__).parent.parent
    texts = []
    for seed in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        texts.append(subprocess.run([sys.executable, "-c", script], cwd=root, env=env, capture_output=True, text=True, check=True).stdout)
    assert texts[0] == texts[1] and "class Mlp" in texts[0]


# ---- arguments, outputs, guards


def test_outputs_keep_their_classes():
    module, args, _ = case("structs")
    made, _ = build(module, args)
    out = step(made, args)[3]
    assert type(out) is Output and type(out.extra["pair"]) is Pair and out.extra["list"][1:] == [3, "text"]


def test_signature_is_the_users():
    module, args, _ = case("arguments")
    made, text = build(module, args)
    assert "def forward(self, batch, pair, x=None, flag=True, *, scale=2.0, name=\"it's\", **kwargs):" in text
    made(args["batch"], args["pair"], None, True, scale=2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flag": False}, "argument 'flag' is False, but was True"),
        ({"scale": 3.0}, "argument 'scale' is 3.0, but was 2.0"),
        ({"x": torch.ones(4, 8)}, "argument 'x' is a tensor of shape (4, 8), but was None"),
        ({"more": 1}, "more"),
        ({"batch": {"ids": ids(4, 8), "other": 1}}, "argument 'batch' has 'other'"),
        ({"batch": {"ids": data(4, 8)}}, "dtype torch.float32"),
        ({"pair": (data(4, 8),)}, "argument 'pair' must be a sequence of 2"),
        ({"pair": (data(4, 8), None)}, "input 'pair[1]' is NoneType"),
    ],
)  # fmt: skip
def test_arguments_are_checked(change, message):
    module, args, _ = case("arguments")
    made, _ = build(module, args)
    with pytest.raises(GuardError) as e:
        made(**(args | change))
    assert message in str(e.value)


def test_folded_shapes_are_checked():
    module, args, other = case("mlp")
    made, _ = build(module, args, constant_folding=True)
    with pytest.raises(GuardError, match=r"\(3, 5, 8\).*\(2, 4, 8\)"):
        made(**other)


def test_guards():
    module, args, _ = case("guarded")
    other = {"x": args["x"], "mask": torch.zeros(4, 1)}
    made, text = build(module, args)
    with pytest.raises(GuardError, match=r"test_codegen.py:\d+.*if mask.all\(\)"):
        made(**other)
    made, _ = build(module, args, guards="warn")
    with pytest.warns(UserWarning, match="mask.all"):
        made(**other)
    made, text = build(module, args, guards="off")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(**other)
    assert "guard" not in text and "all()" not in text
    with pytest.raises(AutoparError, match="did you mean 'error'"):
        build(module, args, guards="errors")


def test_training_mode_is_read_at_run_time():
    module, args, _ = case("mlp")
    made, _ = build(module.train(), args)
    same(module.eval(), args, made.eval())


# ---- tensors


def test_state_dict_is_the_originals():
    module, args, _ = case("tied")
    made, _ = build(module, args)
    assert set(made.state_dict()) == set(module.state_dict())
    assert made.head.weight is made.embed.weight
    assert [n for n, _ in made.named_parameters()] == [n for n, _ in module.named_parameters()]
    assert {n for n, p in made.named_parameters() if not p.requires_grad} == {"frozen.weight", "frozen.bias"}
    made.load_state_dict(module.state_dict())


# ---- several ranks


def megatron(graph):
    """Up split on its rows, down on its columns, by address; the plan a person would write."""
    return Plan(Mesh((("tp", 2),)), {"layers.*.up/linear": {"tp": "n"}, "layers.*/gelu": {"tp": "*"}, "layers.*.down/linear": {"tp": "k"}})


# ---- loading


def test_fresh_modules_and_rank_files():
    files, _ = generate(*case("stack")[:2])
    a, b = load_module_class(files, "Stack"), load_module_class(files, "Stack")
    assert a is not b and a.__module__ != b.__module__
    rank = load_file(files, "rank0.py")
    assert rank.RANK == 0 and rank.MESH == () and rank.MODULE.__name__ == "Stack"
    with pytest.raises(SavedirError, match="did you mean 'Stack'"):
        load_module_class(files, "Stak")


def test_loads_from_a_folder(tmp_path):
    files, _ = generate(*case("stack")[:2])
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert load_module_class(tmp_path).__name__ == "Stack"
    with pytest.raises(SavedirError, match=r"rank7.py"):
        load_file(tmp_path, "rank7.py")


def test_tracebacks_show_the_generated_line():
    module, args, _ = case("stack")
    made, _ = build(module, args)
    with pytest.raises(RuntimeError) as e:
        made(data(2, 4, 9))
    shown = "".join(traceback.format_exception(e.value))
    assert "F.layer_norm(" in shown and "model.py" in shown
