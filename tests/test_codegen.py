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
from pathlib import Path

import pytest
import torch
from codegen_models import CASES, Output, Pair, data, ids

from autopar import runtime as ap
from autopar.codegen.emit import emit
from autopar.codegen.load import load_file, load_module_class
from autopar.errors import AutoparError, GuardError, SavedirError
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
    assert "# codegen_models.py:" in text and "  hidden_states = F.gelu(self.up(hidden_states))" in text
    assert "ap.i_to" not in text and "ap.p_to" not in text


def test_one_class_per_block_and_a_loop():
    _, text = build(*case("stack")[:2])
    assert text.count("class Mlp(ap.Block):") == 1 and '"""layers.* (' in text and "3 instances" in text
    assert "        for i in range(3):\n            self.add(f\"layers.{i}\", Mlp(mesh))\n" in text
    assert "for layer in self.layers:\n    hidden = layer(hidden, scale)" in body(text, "Stack")


def test_collected_outputs_stop_the_loop():
    _, text = build(*case("stack-keep")[:2])
    assert "self.layers[1](" in text and "for layer" not in text


def test_repeated_and_partial_loops():
    _, text = build(*case("shared")[:2])
    lines = body(text, "Shared")
    assert any(s.startswith("for _ in range(3):\n    x = self.layers[0](x)") for s in lines)
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
    with pytest.raises(GuardError, match=r"codegen_models.py:\d+.*if mask.all\(\)"):
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
