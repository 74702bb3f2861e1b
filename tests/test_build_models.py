"""Traced models, folded into blocks and interpreted, against the models themselves: outputs, gradients and buffers, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from interp import Interpreter
from test_build import calls, check
from torch import nn
from torch.utils.checkpoint import checkpoint

from autopar.ir.codec import graph_from_json, graph_to_json, load_graph, save_graph
from autopar.trace.build import build
from autopar.trace.record import record


def leaves(x):
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, dict):
        x = tuple(x.values())
    return [t for y in x for t in leaves(y)] if isinstance(x, (tuple, list)) else []


def run(module, call, inputs):
    """Outputs, gradients and buffers of one step. `call` runs the forward."""
    torch.manual_seed(7)
    inputs = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    for v in inputs.values():
        if isinstance(v, torch.Tensor) and v.is_floating_point():
            v.requires_grad_()
    held = {k: v * 1 if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    outs = leaves(call(held))
    scalars = [t.float().pow(2).sum() for t in outs if t.is_floating_point() and t.requires_grad]
    if scalars:
        sum(scalars).backward()
    found = {f"output {i}": t.detach() for i, t in enumerate(outs)}
    found |= {f"grad of {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    found |= {f"grad of input {n}": v.grad for n, v in inputs.items() if isinstance(v, torch.Tensor) and v.grad is not None}
    found |= {f"buffer {n}": b.clone() for n, b in module.named_buffers()}
    found["random state"] = torch.get_rng_state()
    return found


def prove(module, inputs, tmp_path=None, rounding=0.0, **options):
    """Trace, build, check and interpret; returns the graph. Gradients may differ by `rounding`, nothing else may."""
    eager, other = copy.deepcopy(module), copy.deepcopy(module)
    torch.manual_seed(3)
    graph = check(build(record(module, inputs, **options)))
    assert graph_from_json(graph_to_json(graph)) == graph
    assert str(graph)
    if tmp_path is not None:
        save_graph(graph, tmp_path)
        loaded = load_graph(tmp_path)
        assert loaded == graph and loaded.fingerprint == graph.fingerprint
        graph = loaded
    want = run(eager, lambda kw: eager(**kw), inputs)
    interpreter = Interpreter(graph, other)
    got = run(other, lambda kw: interpreter.run(**kw), inputs)
    assert got.keys() == want.keys()
    for name, t in want.items():
        if rounding and name.startswith("grad"):
            torch.testing.assert_close(got[name], t, rtol=rounding, atol=rounding, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(got[name].nan_to_num(), t.nan_to_num()), name
    return graph


# ---- small modules that are hard to fold --------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, d=8, p=0.1):
        super().__init__()
        self.norm, self.up, self.down, self.drop = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.Dropout(p)

    def forward(self, x):
        h = F.gelu(self.up(self.norm(x)))
        return x + self.drop(self.down(h))


class Stack(nn.Module):
    def __init__(self, n=4, p=0.1):
        super().__init__()
        self.layers = nn.ModuleList(Layer(p=p) for _ in range(n))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Shared(Stack):
    """One layer called again and again."""

    def forward(self, x):
        for _ in range(3):
            x = self.layers[0](x)
        return self.layers[1](x)


class Checkpointed(Stack):
    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


class Halves(nn.Module):
    """Checkpoints two parts of itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Layer(), Layer()

    def first(self, x):
        return x + self.a(x)

    def second(self, x):
        return x * self.b(x)

    def forward(self, x):
        return checkpoint(self.second, checkpoint(self.first, x, use_reentrant=False), use_reentrant=False)


class HalvesStack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Halves() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Twins(nn.Module):
    """A module that is applied to two inputs."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(Stack(2), nn.Tanh())

    def forward(self, x, y):
        return (self.net(x) - self.net(y)).abs().mean(-1)


class InPlaceLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        h = self.fc(x)
        top = h[:, :4]
        top *= 2
        h[:, 0] = x[:, 1]
        out = torch.zeros_like(h)
        out[:, ::2] = h[:, ::2]
        out.view(-1).add_(1)
        return out + h


class InPlace(nn.Module):
    """Views, in-place ops and a memory that all layers write."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(InPlaceLayer() for _ in range(3))

    def forward(self, x):
        memory = torch.zeros(x.shape[0], 3, 8)
        rows = memory.unbind(1)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            memory[:, i] = x
        return memory.sum(1) + rows[0].detach(), memory


class Collector(nn.Module):
    """A layer writes a live-in, seen later through the base."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x, out):
            h = torch.relu(self.fc(x))
            out.mul_(0.5)
            out += h * 2
            return torch.tanh(h) + out

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(self.Part() for _ in range(3))

    def forward(self, x):
        base = torch.zeros(4, 16)
        total = base[:, :8]
        for part in self.parts:
            x = part(x, total)
        return x, base, total.sum()


class State(nn.Module):
    """Buffers written in place, replaced, and read again."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("last", torch.zeros(8))

    def forward(self, x):
        x = self.fc(x)
        self.steps += 1
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            self.last = x.mean(0) + self.mean
        return x * self.last + self.mean + self.steps


class States(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(State() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(*(self.part(a, 4) for a in (3, 4, 4)))

    @staticmethod
    def part(a, b):
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout2d(0.2))

    def forward(self, x):
        return self.parts(x).flatten(1)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(11, 8), Stack(2), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, labels=None):
        logits = self.head(self.body(self.embed(ids)))
        loss = F.cross_entropy(logits.view(-1, 11), labels.view(-1)) if labels is not None else None
        return {"loss": loss, "logits": logits}


class Constants(nn.Module):
    """Tensors that are no parameters or buffers."""

    class Part(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.fc, self.table = nn.Linear(8, 8), [torch.linspace(0, scale, 8)]

        def forward(self, x):
            return torch.tanh(self.fc(x) * self.table[0] + 1)

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(self.Part(s) for s in (1.0, 1.0, 2.0))

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Wasteful(nn.Module):
    """Results that nobody uses, some of which draw random numbers."""

    def forward(self, x):
        torch.rand_like(x)
        F.dropout(x, 0.5)
        x.exp().log()
        torch.empty(3).normal_()
        return x * torch.rand_like(x)


def x(*shape):
    return torch.randn(*(shape or (4, 8)), generator=torch.Generator().manual_seed(1))


def ids(*shape, high=11):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(2))


MODULES = {
    "stack": (Stack, {"x": x()}, ["Layer", "Stack"]),
    "shared": (Shared, {"x": x()}, ["Layer", "Shared"]),
    "checkpointed": (Checkpointed, {"x": x()}, ["Layer", "Checkpointed"]),
    "halves": (HalvesStack, {"x": x()}, ["First", "Second", "Halves", "HalvesStack"]),
    "twins": (Twins, {"x": x(), "y": x() * 2}, ["Layer", "Stack", "Sequential", "Twins"]),
    "in place": (InPlace, {"x": x()}, ["InPlaceLayer", "InPlace"]),
    "collector": (Collector, {"x": x()}, ["Part", "Part_1", "Collector"]),
    "state": (States, {"x": x()}, ["State", "States"]),
    "convolutions": (Convolutions, {"x": x(2, 3, 16, 16)}, None),
    "tied": (Tied, {"ids": ids(2, 5), "labels": ids(2, 5)}, ["Layer", "Tied"]),
    "constants": (Constants, {"x": x()}, None),
    "wasteful": (Wasteful, {"x": x()}, ["Wasteful"]),
}


@pytest.mark.parametrize("folding", [True, False], ids=["folded", "symbolic"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, folding, tmp_path):
    torch.manual_seed(0)
    make, inputs, blocks = MODULES[name]
    graph = prove(make(), inputs, tmp_path, constant_folding=folding)
    if blocks is not None:
        assert list(graph.blocks) == blocks


def test_called_again_has_one_instance():
    graph = prove(Shared(), {"x": x()})
    assert [i for i, _ in calls(graph.body)] == ["layers.0", "layers.0#1", "layers.0#2", "layers.1"]
    assert graph.blocks["Layer"].instances == ("layers.0", "layers.1")


# ---- Hugging Face models ------------------------------------------------------------------------------------


def hf(name):
    """A small random model and its inputs."""
    import transformers as t

    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 61}
    text = {"input_ids": ids(2, 6, high=61), "labels": ids(2, 6, high=61)}
    masked = text | {"attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])}
    pixels = {"pixel_values": x(2, 3, 32, 32), "labels": torch.tensor([1, 0])}
    table = {
        "gpt2": lambda: (t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=61, n_positions=16)), masked),
        "llama": lambda: (t.LlamaForCausalLM(t.LlamaConfig(**small, num_hidden_layers=4, num_key_value_heads=2)), masked),
        "bert": lambda: (t.BertForMaskedLM(t.BertConfig(**small, num_hidden_layers=3, max_position_embeddings=16)), masked),
        "albert": lambda: (
            t.AlbertForMaskedLM(t.AlbertConfig(**small, embedding_size=16, num_hidden_layers=3, max_position_embeddings=16)),
            masked,
        ),
        "t5": lambda: (
            t.T5ForConditionalGeneration(
                t.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, vocab_size=61, decoder_start_token_id=0)
            ),
            masked,
        ),
        "mixtral": lambda: (
            t.MixtralForCausalLM(t.MixtralConfig(**small, num_hidden_layers=3, num_key_value_heads=2, num_local_experts=4)),
            text,
        ),
        "gemma2": lambda: (t.Gemma2ForCausalLM(t.Gemma2Config(**small, num_hidden_layers=4, num_key_value_heads=2, head_dim=8)), text),
        "vit": lambda: (
            t.ViTForImageClassification(
                t.ViTConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hidden_layers=3, image_size=32, patch_size=8)
            ),
            pixels,
        ),
        "swin": lambda: (
            t.SwinForImageClassification(
                t.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
            ),
            pixels,
        ),
        "resnet": lambda: (
            t.ResNetForImageClassification(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")),
            pixels,
        ),
        "whisper": lambda: (
            t.WhisperForConditionalGeneration(
                t.WhisperConfig(
                    d_model=32,
                    encoder_layers=2,
                    decoder_layers=2,
                    encoder_attention_heads=4,
                    decoder_attention_heads=4,
                    encoder_ffn_dim=64,
                    decoder_ffn_dim=64,
                    vocab_size=61,
                    num_mel_bins=8,
                    max_source_positions=16,
                    max_target_positions=16,
                    pad_token_id=0,
                    bos_token_id=1,
                    eos_token_id=2,
                    decoder_start_token_id=1,
                )
            ),
            {"input_features": x(2, 8, 32), "labels": ids(2, 6, high=61)},
        ),
        "mamba": lambda: (t.MambaForCausalLM(t.MambaConfig(hidden_size=32, num_hidden_layers=3, vocab_size=61, state_size=4)), text),
    }
    torch.manual_seed(0)
    model, inputs = table[name]()
    model.config.use_cache = False
    return model, inputs | ({"use_cache": False} if name == "t5" else {})


STACKS = {
    "gpt2": {"transformer.h.*": 3},
    "llama": {"model.layers.*": 4},
    "bert": {"bert.encoder.layer.*": 3},
    "albert": {"albert.encoder.albert_layer_groups.0.albert_layers.0": 1},
    "t5": {"encoder.block.0": 1, "encoder.block.*": 2, "decoder.block.0": 1, "decoder.block.*": 2},
    "mixtral": {"model.layers.*": 3},
    "gemma2": {"model.layers.*": 4},
    "vit": {"vit.layers.*": 3},
    "swin": {"swin.encoder.layers.0": 1, "swin.encoder.layers.1": 1},
    "resnet": {},
    "whisper": {"model.encoder.layers.*": 2, "model.decoder.layers.*": 2},
    "mamba": {"backbone.layers.*": 3},
}


QUICK = {
    ("gpt2", "train"),
    ("llama", "train"),
    ("llama", "eval"),
    ("t5", "train"),
    ("swin", "train"),
    ("mixtral", "train"),
    ("albert", "train"),
}
CASES = [(name, mode) for name in STACKS for mode in ("train", "eval")]


@pytest.mark.parametrize(("name", "mode"), [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES])
def test_hugging_face(name, mode, tmp_path):
    model, inputs = hf(name)
    model.train(mode == "train")
    graph = prove(model, inputs, tmp_path)
    have = {b.address: len(b.instances) for b in graph.blocks.values()}
    assert STACKS[name].items() <= have.items(), have


def test_gradient_checkpointing():
    model, inputs = hf("llama")
    model.gradient_checkpointing_enable()
    model.train()
    graph = prove(model, inputs)
    (b,) = (b for b in graph.blocks.values() if b.recompute)
    assert b.address == "model.layers.*" and len(b.instances) == 4
