"""State dicts of ranks, merged and back; weights as safetensors; models in which only some modules are parallel; several optimizers.
Knows the public interface only.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from small_models import MLP, Attention
from state_models import Mixed, batch, lm

import autopar
from autopar.config import ComputeConfig
from autopar.driver import compile_to
from autopar.runtime import launch
from autopar.runtime.optimizer import build_optimizer
from autopar.runtime.state import merge, weights
from tests.procs import run_processes

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "eps": 1e-3}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "eps": 1e-2}),
    "asgd": (torch.optim.ASGD, {"lr": 0.1}),
}
ZERO = [{}, {"use_zero": 1}]


def original():
    torch.manual_seed(0)
    return Mixed(MLP(p=0.0), Attention())


def data(step):
    return torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(step))


def train(module, optimizer, steps, units=1):
    for step in steps:
        optimizer.zero_grad()
        module(data(step)).pow(2).mean().backward()
        if units > 1:
            optimizer.scale_grads(1 / units)
        optimizer.step()
    optimizer.zero_grad()
    return module


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    root = tmp_path_factory.mktemp("code")
    m = original()
    config = ComputeConfig(plan_ngpus=2)
    tied = compile_to(lm(), batch(0), "tp", config, gen_savedir=root / "lm")
    return tied, *(compile_to(part, {"x": data(0)}, "tp", config, gen_savedir=root) for part in (m.first, m.second))


def parallel(code):
    """The mixed model of the original weights, two of its modules parallel."""
    whole = original()
    return Mixed.of(whole, launch.load(code[1]), launch.load(code[2]))


def same(got, want, rtol=1e-5):
    assert got.keys() == want.keys()
    for key, t in want.items():
        torch.testing.assert_close(
            torch.as_tensor(got[key]), torch.as_tensor(t), rtol=rtol, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}"
        )


def mixed_states(code):
    out = {}
    for name, (make, options) in OPTIMIZERS.items():
        for zero in ZERO:
            module = parallel(code)
            optimizer = build_optimizer(module, make, ComputeConfig(plan_ngpus=2, runtime_ngpus=4, **zero), **options)
            train(module, optimizer, range(2), units=2)
            states = [copy.deepcopy(f(module, optimizer)) for f in (autopar.sharded_state_dict, autopar.deduped_state_dict)]
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in autopar.deduped_state_dict(module)["model"].values())
            train(module, optimizer, range(2, 4), units=2)
            end = autopar.sharded_state_dict(module, optimizer)
            # back into modules that have been trained otherwise
            for state, load in zip(states, (autopar.load_sharded_state_dict, autopar.load_deduped_state_dict), strict=True):
                train(module, optimizer, range(4, 5), units=2)
                load(module, state, optimizer)
                train(module, optimizer, range(2, 4), units=2)
                again = autopar.sharded_state_dict(module, optimizer)
                assert all(torch.equal(again["model"][n], t) for n, t in end["model"].items()), name
            out[name, bool(zero)] = *states, end
    return out


@pytest.mark.procs
def test_the_original_module_and_optimizer_load_the_merged_state(code):
    got = run_processes(lambda rank: mixed_states(code), 4)
    for name, (make, options) in OPTIMIZERS.items():
        want = original()
        optimizer = make(want.parameters(), **options)
        train(want, optimizer, range(2))
        middle, middle_optim = copy.deepcopy(want.state_dict()), copy.deepcopy(optimizer.state_dict())
        train(want, optimizer, range(2, 4))
        for zero in (False, True):
            sharded, deduped, end = zip(*(r[name, zero] for r in got), strict=True)
            whole = sum(t.numel() for t in middle.values())
            assert sum(t.numel() for s in deduped for t in s["model"].values()) == whole, "every entry is on one rank"
            for parts in (sharded, deduped):
                model, optim = autopar.merge_state_dicts(parts)
                same(model, middle)
                assert optim["param_groups"] == middle_optim["param_groups"]
                for i, state in middle_optim["state"].items():
                    same(optim["state"][i], state)
                fresh = original()
                fresh.load_state_dict(model)
                resumed = make(fresh.parameters(), lr=123.0)
                resumed.load_state_dict(optim)
                same(train(fresh, resumed, range(2, 4)).state_dict(), want.state_dict())
            same(autopar.merge_state_dicts(end)[0], want.state_dict())


def from_merged(code, zero, model, optim, folder):
    module = parallel(code)
    config = ComputeConfig(plan_ngpus=2, runtime_ngpus=4, **zero)
    make, options = OPTIMIZERS["amsgrad"]
    optimizer = build_optimizer(module, make, config, **{**options, "lr": 9.0})
    autopar.load_merged_state_dict(module, model, optimizer, optim)
    train(module, optimizer, range(2, 4), units=2)
    autopar.save_weights(module, folder / f"{bool(zero)}.safetensors")
    return autopar.sharded_state_dict(module)


@pytest.mark.procs
@pytest.mark.parametrize("zero", ZERO, ids=["", "zero"])
def test_merged_state_of_the_original_loads(code, tmp_path, zero):
    want = original()
    make, options = OPTIMIZERS["amsgrad"]
    optimizer = make(want.parameters(), **options)
    train(want, optimizer, range(2))
    model, optim = copy.deepcopy(want.state_dict()), copy.deepcopy(optimizer.state_dict())
    got = run_processes(lambda rank: from_merged(code, zero, model, optim, tmp_path), 4)
    train(want, optimizer, range(2, 4))
    same(autopar.merge_state_dicts(got)[0], want.state_dict())
    same(load_file(tmp_path / f"{bool(zero)}.safetensors"), want.state_dict())


def counted(source, read):
    def count(name, at):
        t = source.read(name, at)
        read.append(t.numel())
        return t

    return replace(source, read=count)


def tied(code, folder, source):
    module = launch.load(code[0])
    with pytest.MonkeyPatch.context() as patch:
        read = []
        patch.setattr(merge, "source", lambda given: counted(weights.source(given), read))
        autopar.load_merged_state_dict(module, source)
    assert sum(read) == sum(p.numel() for p in module.parameters()), "each rank reads its own slices only"
    names = list(module.state_dict())
    autopar.save_weights(module, folder / "one.safetensors")
    return names, autopar.sharded_state_dict(module)


@pytest.mark.procs
def test_hugging_face_folders(code, tmp_path):
    """Two files and an index, in another dtype; tied weights under one name. Only slices are read, and one file comes out."""
    want = {n: t.detach().bfloat16().contiguous() for n, t in lm().state_dict().items() if n != "head.weight"}
    folder = tmp_path / "hf"
    folder.mkdir()
    where = {n: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, n in enumerate(want)}
    for file in set(where.values()):
        save_file({n: t for n, t in want.items() if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "training.safetensors").write_bytes(b"not listed, so not read")
    got = run_processes(lambda rank: tied(code, tmp_path, folder), 2)
    assert got[0][0] == [*lm().state_dict()]
    model, optim = autopar.merge_state_dicts([state for _, state in got])
    assert optim is None and model["head.weight"] is model["embed.weight"]
    one = load_file(tmp_path / "one.safetensors")
    assert one.keys() == want.keys()
    for name, t in want.items():
        assert torch.equal(model[name], t.float()) and torch.equal(one[name], t.float())
    autopar.save_weights(model, tmp_path / "merged.safetensors")
    assert (tmp_path / "merged.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["hf", "merged.safetensors", "one.safetensors"]


def half(code, zero, folder, load):
    """Two steps in bfloat16 with float32 masters, saved (or loaded instead), and two more."""
    module = launch.load(code[0]).to(torch.bfloat16)
    config = ComputeConfig(plan_ngpus=2, runtime_ngpus=4, **zero)
    optimizer = build_optimizer(module, autopar.mixed_precision(torch.optim.AdamW), config, lr=0.01, eps=1e-3)
    return mixed_steps(module, optimizer, folder, load, 2)


def mixed_steps(module, optimizer, folder, load, units):
    def step(i):
        optimizer.zero_grad()
        (module(**batch(i))["loss"] / units).backward()
        optimizer.step()

    for i in range(2 if not load else 1):
        step(i)
    if load:
        autopar.load_checkpoint(load, module, optimizer)
    else:
        autopar.save_checkpoint(folder, module, optimizer)
    for i in range(2, 4):
        step(i)
    optimizer.zero_grad()
    return autopar.sharded_state_dict(module, optimizer)


@pytest.mark.procs
def test_master_weights(code, tmp_path):
    """Saved and loaded with the optimizer: to the same layout bitwise, to ZeRO and to one process nearly so."""
    want = run_processes(lambda rank: half(code, {}, tmp_path / "c", None), 4)
    model, optim = autopar.merge_state_dicts(want)
    assert model["pos"].dtype == torch.bfloat16 and optim["state"][0]["master"].dtype == torch.float32
    again = run_processes(lambda rank: half(code, {}, None, tmp_path / "c"), 4)
    assert all(torch.equal(t, model[n]) for n, t in autopar.merge_state_dicts(again)[0].items())
    zero = run_processes(lambda rank: half(code, {"use_zero": 1}, None, tmp_path / "c"), 4)
    alone = lm().to(torch.bfloat16)
    one = mixed_steps(alone, autopar.mixed_precision(torch.optim.AdamW)(alone.parameters(), lr=1.0), None, tmp_path / "c", 1)
    for states in (zero, [one]):
        other = autopar.merge_state_dicts(states)[1]
        for i, state in optim["state"].items():
            torch.testing.assert_close(other["state"][i]["master"], state["master"], rtol=1e-2, atol=1e-2)
            assert other["state"][i]["step"] == state["step"] == 4


def from_checkpoint(code, folder):
    """Weights alone, of another plan, slice by slice."""
    module = launch.load(code[0])
    autopar.load_merged_state_dict(module, folder)
    return autopar.sharded_state_dict(module)


@pytest.mark.procs
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_weights_of_a_checkpoint(code, tmp_path):
    torch.manual_seed(7)
    module = lm()
    autopar.save_checkpoint(tmp_path / "c", module)
    plain = {"model": {n: torch.zeros_like(t) for n, t in module.state_dict().items() if n != "head.weight"}}
    dcp.load(plain, checkpoint_id=tmp_path / "c", no_dist=True)
    assert all(torch.equal(t, module.state_dict()[n]) for n, t in plain["model"].items()), "DCP reads it without autopar"
    got = run_processes(lambda rank: from_checkpoint(code, tmp_path / "c"), 2)
    assert all(torch.equal(t, module.state_dict()[n]) for n, t in autopar.merge_state_dicts(got)[0].items())


def spread(code):
    import torch.distributed as dist

    module = parallel(code)
    with torch.no_grad():
        for p in [*module.parameters(), *module.buffers()]:
            p.add_(dist.get_rank())
    autopar.broadcast_weights(module)
    return autopar.sharded_state_dict(module)


@pytest.mark.procs
def test_broadcast_weights(code):
    """Ranks 0 and 1 are the first unit: what they hold alike is rank 0's, each one's shards are its own."""
    got = run_processes(lambda rank: spread(code), 4)
    model = original().state_dict()
    whole = {n for n, d in got[0]["layout"].items() if d["shape"] == [sum(r[2] for r in runs) for runs in d["runs"]]}
    assert {"stem.weight", "norm.running_mean"} < whole < got[0]["model"].keys()
    for rank, state in enumerate(got):
        for name, t in state["model"].items():
            base = autopar.merge_state_dicts(
                [{**s, "model": {n: v - (0 if n in whole else r % 2) for n, v in s["model"].items()}} for r, s in enumerate(got)]
            )[0]
            assert torch.allclose(base[name].float(), model[name].float(), atol=1e-5), name
            if rank >= 2:
                assert torch.equal(t, got[rank - 2]["model"][name]), name
