"""Modules on the meta device: initial values equal the whole initialisation bit by bit, for every plan and in little memory.
Must not know generated code."""

from __future__ import annotations

import copy
import gc
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import autopar
import autopar.runtime.materialise as engine
from autopar import ComputeConfig, parallelize
from autopar.errors import AutoparError, LayoutError, SavedirError
from autopar.runtime.materialise import initialise, materialise
from tests.procs import run_processes
from tests.small_models import MLP, Layer
from tests.test_parallelize import Plain, X, close

IDS = {"ids": torch.arange(8).reshape(2, 4)}


class Custom(nn.Module):
    """An init_weights of its own, that draws, looks at forms, writes through views and .data, and sets a buffer anew."""

    def __init__(self, d=8, n=3):
        super().__init__()
        self.embed, self.head = nn.Embedding(16, d), nn.Linear(d, 16, bias=False)
        self.head.weight = self.embed.weight
        self.layers = nn.ModuleList(nn.Linear(d, d) for _ in range(n))
        self.gain = nn.Parameter(torch.empty(d))
        self.register_buffer("inverse", torch.empty(d // 2), persistent=False)

    def init_weights(self):
        for layer in self.layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.embed.weight.normal_(0.0, 1.0 / self.embed.weight.shape[1])
            self.embed.weight[0].fill_(0.0)
            data = self.gain.data
            data.uniform_(0.5, 1.0)
            data.mul_(2.0)
        self.inverse = 1.0 / 10.0 ** (torch.arange(0, 4, device=self.gain.device) / 4)

    def forward(self, ids):
        x = self.embed(ids) * self.gain
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x + self.inverse.repeat(2))


class Stack(nn.Module):
    def __init__(self, d=64, n=8):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(d, d) for _ in range(n)))

    def forward(self, x):
        return self.layers(x)


class Mixture(nn.Module):
    """What torch.nn has with an initialisation of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.bag = nn.Embedding(20, 8, padding_idx=3), nn.EmbeddingBag(7, 4)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.LayerNorm(8), nn.GroupNorm(2, 4), nn.RMSNorm(8)])
        self.conv, self.back, self.lstm, self.prelu = nn.Conv2d(3, 4, 3), nn.ConvTranspose1d(4, 4, 2), nn.LSTM(4, 4), nn.PReLU(2)
        self.bilinear = nn.Bilinear(3, 4, 2)


def tensors(module):
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def on_meta(make):
    with torch.device("meta"):
        return make()


def reference(make, seed=5):
    """The whole initialisation, of a module full of other numbers."""
    module = make()
    with torch.no_grad():
        for t in tensors(module).values():
            t.fill_(7)
    torch.manual_seed(seed)
    initialise(module)
    return module


def pieces_of(module, names, seed=5):
    got = {}
    torch.manual_seed(seed)
    materialise(module, lambda n, t: got.__setitem__(n, t.clone()), names)
    return got


@pytest.mark.parametrize("make", [Mixture, MLP, Layer, Custom, Stack])
@pytest.mark.parametrize("counted", [True, False])
def test_equal_to_the_whole_initialisation(make, counted, monkeypatch):
    """Also where the initialisation cannot be run without numbers first, and everything is kept to the end."""
    if not counted:
        monkeypatch.setattr(engine, "_uses", lambda module: None)
    want = tensors(reference(make))
    state = torch.get_rng_state()
    module = on_meta(make)
    got = pieces_of(module, want)
    assert torch.equal(torch.get_rng_state(), state)
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    assert all(t.is_meta for t in tensors(module).values()), "the module is not changed"
    if make is not Custom:
        torch.manual_seed(5)
        plain = tensors(make())
        assert all(torch.equal(got[n], plain[n]) for n in want), "as plain construction from the same seed"


def test_some_names_draw_like_all():
    want = reference(Stack)
    got = pieces_of(on_meta(Stack), ["layers.5.weight"])
    assert list(got) == ["layers.5.weight"] and torch.equal(got["layers.5.weight"], want.layers[5].weight)


def test_parts_that_are_real_draw_too_and_stay(tmp_path):
    module = on_meta(Stack)
    module.layers[2] = nn.Linear(64, 64)
    before = module.layers[2].weight.clone()
    want = reference(Stack)
    got = pieces_of(module, ["layers.1.weight", "layers.3.weight"])
    assert torch.equal(got["layers.3.weight"], want.layers[3].weight) and torch.equal(module.layers[2].weight, before)


def test_peak_memory_is_one_submodule(monkeypatch):
    """Live real memory while a model of 8 layers is initialised."""
    peak, swap = 0, engine._Real.swap

    def counting(mode, t):
        nonlocal peak
        out = swap(mode, t)
        peak = max(peak, sum(s.nbytes() for s in mode.memory.values()))
        return out

    monkeypatch.setattr(engine._Real, "swap", counting)
    sizes = {}
    torch.manual_seed(0)
    materialise(on_meta(Stack), lambda n, t: sizes.__setitem__(n, t.numel() * 4), list(tensors(on_meta(Stack))))
    assert sum(sizes.values()) == 8 * (64 * 64 + 64) * 4 and peak <= (64 * 64 + 64) * 4


def test_a_rank_keeps_only_its_slices(monkeypatch, tmp_path):
    """Each whole tensor is gone when the next one comes, without waiting for the garbage collector."""
    held, collecting = [], gc.isenabled()

    def watching(module, keep, names):
        def watch(name, whole):
            assert all(ref() is None for ref in held), f"held when {name} comes"
            held.append(weakref.ref(whole))
            keep(name, whole)

        materialise(module, watch, names)

    monkeypatch.setattr("autopar.runtime.initial.materialise", watching)
    gc.disable()
    try:
        parallelize(on_meta(Stack), {"x": torch.ones(2, 64)}, "dp", gen_savedir=tmp_path)
    finally:
        gc.enable() if collecting else None
    assert len(held) == 16


class Reads(nn.Module):
    """Its initialisation looks at numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(4)), nn.Parameter(torch.empty(4))

    def reset_parameters(self):
        nn.init.normal_(self.a)
        nn.init.constant_(self.b, self.a.sum().item())

    def forward(self, x):
        return x * self.a.sum() * self.b.sum()


def test_an_initialisation_that_reads_numbers():
    want, got = reference(Reads), pieces_of(on_meta(Reads), ["a", "b"])
    assert torch.equal(got["a"], want.a) and torch.equal(got["b"], want.b)


class Asks(nn.Linear):
    def init_weights(self, std):
        nn.init.normal_(self.weight, std=std)


def test_what_cannot_be_initialised():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.up = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2)), nn.Linear(2, 2)

    with pytest.raises(LayoutError, match=r"nothing gives a and 1 more a value: Bare is on the meta device.*parallelize\(\.\.\., weights="):
        pieces_of(on_meta(Bare), ["a", "b", "up.weight"])
    with pytest.raises(LayoutError, match=r"0.init_weights asks for arguments; give Sequential an init_weights\(\) without any"):
        pieces_of(on_meta(lambda: nn.Sequential(Asks(2, 2))), ["0.weight"])


# ---- through parallelize ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """What a compile imports takes seconds; done once, before processes are forked."""
    parallelize(Plain(), X, "dp", gen_savedir=tmp_path_factory.mktemp("first"))


def holds(local, want):
    """Every tensor of a rank is its slice of the whole one."""
    values = tensors(want)
    for name, place in local.named_placements().items():
        if place.kind != "constant":
            mine = place.shard(local.mesh, lambda s, name=name: values[name][s])
            assert torch.equal(tensors(local)[name], mine), name


PLANS = [("dp", 1, 2), ("tp", 2, 2), ("tp", 2, 4), ("data", 2, 2), ("tp", 4, 4)]


@pytest.mark.procs
@pytest.mark.parametrize("policy,n,world,kind", [*((*p, "object") for p in PLANS), ("tp", 2, 2, "class"), ("tp", 2, 4, "seeds")])
def test_every_plan_starts_from_the_same_numbers(policy, n, world, kind, tmp_path, imported):
    want, more = reference(Custom), nn.Linear(3, 3).weight

    def run(rank):
        # NB: with different seeds rank 0's counts, and the others keep their own random state
        torch.manual_seed(5 if kind != "seeds" or rank == 0 else 90 + rank)
        what = Custom if kind == "class" else on_meta(Custom)
        config, fn = ComputeConfig(plan_ngpus=n), (lambda: on_meta(Custom)) if what is Custom else None
        made = parallelize(what, IDS, policy, config, gen_savedir=tmp_path, module_fn=fn)
        local = made if kind != "class" else made()
        holds(local, want)
        close(local(**IDS), want(**IDS))
        assert torch.equal(nn.Linear(3, 3).weight, more) is (kind != "seeds" or rank == 0)

    run_processes(run, world)


@pytest.mark.procs
def test_two_modules_of_one_class_start_from_different_numbers(tmp_path, imported):
    """As two that plain PyTorch makes one after the other."""
    args = {"x": torch.ones(2, 64)}

    def run(rank):
        torch.manual_seed(5)
        made = [parallelize(on_meta(Stack), args, "tp", ComputeConfig(plan_ngpus=2), gen_savedir=tmp_path) for _ in range(2)]
        torch.manual_seed(5)
        for local in made:
            holds(local, Stack())

    run_processes(run, 2)


@pytest.mark.procs
def test_weights_from_a_folder_or_a_reader(tmp_path, imported):
    """A checkpoint in several files, one name per tied tensor, in another precision; a buffer it lacks is initialised."""
    want = reference(Custom)
    (tmp_path / "hf").mkdir()
    values = {k: v.double() for k, v in want.state_dict().items() if k != "embed.weight"}
    for i, part in enumerate((list(values)[::2], list(values)[1::2])):
        save_file({k: values[k] for k in part}, tmp_path / "hf" / f"model-{i}.safetensors")

    def run(rank):
        held = want.state_dict()
        for weights in (tmp_path / "hf", lambda name, slices: held[name][slices]):
            local = parallelize(on_meta(Custom), IDS, "tp", ComputeConfig(plan_ngpus=2), gen_savedir=tmp_path / "gen", weights=weights)
            holds(local, want)
            close(local(**IDS), want(**IDS))

    run_processes(run, 2)


@pytest.mark.procs
def test_errors_end_all_ranks(tmp_path, imported):
    save_file({"gain": torch.ones(8)}, tmp_path / "few.safetensors")

    def run(rank):
        out = []
        for make, args, weights in ((Plain, X, None), (Custom, IDS, tmp_path / "few.safetensors")):
            try:
                parallelize(on_meta(make), args, "tp", ComputeConfig(plan_ngpus=2), gen_savedir=tmp_path / "gen", weights=weights)
            except AutoparError as e:
                out.append(str(e))
        return out

    for first, second in run_processes(run, 2):
        assert "nothing gives scale and 1 more a value" in first
        assert "no weights for" in second and "few.safetensors" in second


class Pythonic(nn.Linear):
    def reset_parameters(self):
        with torch.no_grad():
            self.weight.fill_(random.random())
            self.bias.fill_(random.random())


@pytest.mark.procs
def test_other_generators_have_to_be_alike(tmp_path, imported):
    """The initialisation draws with Python's generator: right where ranks have the same, an error where not."""
    args = {"input": torch.ones(2, 8)}

    def run(rank, seed):
        module = on_meta(lambda: Pythonic(8, 8))
        random.seed(seed)
        try:
            local = parallelize(module, args, "tp", ComputeConfig(plan_ngpus=2), gen_savedir=tmp_path)
        except LayoutError as e:
            return str(e)
        random.seed(seed)
        holds(local, Pythonic(8, 8))

    assert run_processes(lambda rank: run(rank, 4), 2) == [None, None]
    for text in run_processes(lambda rank: run(rank, rank), 2):
        assert "draws from Python's or NumPy's random numbers, and rank 1 has other ones than rank 0" in text


@pytest.mark.procs
def test_left_to_be_loaded(tmp_path, imported):
    """A checkpoint is loaded afterwards: only what it does not hold is initialised."""
    want = reference(Custom)
    local = parallelize(on_meta(Custom), IDS, "dp", gen_savedir=tmp_path, init_module_params=False)
    assert local.gain.isnan().all() and torch.equal(local.inverse, want.inverse)
    local.load_state_dict(want.state_dict())
    assert torch.equal(local(**IDS), want(**IDS))


@pytest.mark.procs
def test_from_a_checkpoint_of_another_plan(tmp_path, imported):
    want = reference(Custom)

    def run(rank):
        config = ComputeConfig(plan_ngpus=2)
        saved = parallelize(want, IDS, "tp", config, gen_savedir=tmp_path / "a")
        autopar.save_checkpoint(tmp_path / "checkpoint", saved)
        local = parallelize(on_meta(Custom), IDS, "data", config, gen_savedir=tmp_path / "b", init_module_params=False)
        autopar.load_checkpoint(tmp_path / "checkpoint", local)
        holds(local, want)
        close(local(**IDS), want(**IDS))

    run_processes(run, 2)


def test_a_real_module_after_one_on_meta(tmp_path):
    """The folder has no weights of the first; the second's are saved, in a folder of their own or after 'moo'."""
    torch.manual_seed(5)
    parallelize(on_meta(Stack), {"x": torch.ones(2, 64)}, "dp", gen_savedir=tmp_path)
    module = Stack()
    with pytest.raises(SavedirError, match="weights: saved 'none', now 'saved'"):
        parallelize(module, {"x": torch.ones(2, 64)}, "dp", gen_savedir=tmp_path)
    local = parallelize(module, {"x": torch.ones(2, 64)}, "dp", gen_savedir=tmp_path, reuse="moo")
    assert torch.equal(local(x=torch.ones(2, 64)), module(torch.ones(2, 64)))
    again = parallelize(on_meta(Stack), {"x": torch.ones(2, 64)}, "dp", gen_savedir=tmp_path)
    assert torch.equal(again.layers[0].weight, module.layers[0].weight), "a module without weights uses those that were saved"


def test_a_hugging_face_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(**sizes, use_cache=False)
    module = on_meta(lambda: transformers.LlamaForCausalLM(config))
    whole = copy.deepcopy(module).to_empty(device="cpu")
    whole.tie_weights()
    torch.manual_seed(5)
    initialise(whole)
    got = pieces_of(module, list(tensors(module)))
    assert all(torch.equal(got[n], t) for n, t in tensors(whole).items())
    torch.manual_seed(5)
    args = {"input_ids": IDS["ids"]}
    local = parallelize(module.eval(), args, "dp", gen_savedir=tmp_path)
    close(local(**args).logits, whole.eval()(**args).logits)
    assert F.softmax(local(**args).logits, -1).isfinite().all()
