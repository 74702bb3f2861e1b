"""Damaged and foreign checkpoints and state dicts: what the error says, and that nothing was changed; saves that are killed.
Knows the public interface only. One process, but for the last tests.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import signal
import time

import pytest
import torch
from safetensors.torch import save_file
from state_models import batch, lm
from torch import nn

import autopar
from autopar.config import ComputeConfig
from autopar.driver import compile_to
from autopar.errors import CheckpointError, LayoutError
from autopar.runtime import launch
from autopar.runtime.optimizer import build_optimizer
from tests.procs import ProcessesFailed, run_processes


def net(*extra, width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2), *extra)


def trained(module=None, make=torch.optim.AdamW):
    module = module or net()
    optimizer = make(module.parameters(), lr=0.1)
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


@pytest.fixture
def saved(tmp_path):
    module, optimizer = trained()
    autopar.save_checkpoint(tmp_path / "c", module, optimizer, {"step": 1})
    return tmp_path / "c"


def refused(folder, message, module=None, optimizer=None, error=CheckpointError):
    """Loading fails with the message and changes nothing."""
    module = module or net()
    before = copy.deepcopy(module.state_dict())
    drawn = torch.get_rng_state()
    with pytest.raises(error, match=message):
        autopar.load_checkpoint(folder, module, optimizer)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())


OTHERS = [
    (
        nn.ModuleDict({"a": nn.Linear(3, 4)}),
        r"is of another model: it has 0\.bias, 0\.weight.*, but this ModuleDict has a\.weight, a\.bias",
    ),
    (net(nn.Linear(2, 2)), r"does not fit this Sequential: it lacks 2\.weight, 2\.bias"),
    (net()[:1], r"it has 1\.bias, 1\.weight, unknown to the module"),
    (net(width=5), r"0\.weight is \(4, 3\) there and \(5, 3\) here, 0\.bias is \(4,\) there and \(5,\) here"),
]


@pytest.mark.parametrize(("module", "message"), OTHERS, ids=["another model", "missing", "extra", "shape"])
def test_another_model(saved, tmp_path, module, message):
    refused(saved, message, module)
    # the same of every other form
    whole, _ = autopar.merge_state_dicts(saved)
    autopar.save_weights(whole, tmp_path / "w.safetensors")
    for source in (whole, tmp_path / "w.safetensors"):
        with pytest.raises(CheckpointError, match=message):
            autopar.load_merged_state_dict(module, source)
    with pytest.raises(CheckpointError, match=message):
        autopar.load_sharded_state_dict(module, autopar.sharded_state_dict(net()))
    with pytest.raises(CheckpointError, match=message):
        autopar.load_deduped_state_dict(module, autopar.deduped_state_dict(net()))


def cut(file, by=7):
    file.write_bytes(file.read_bytes()[:-by])


DAMAGE = [
    (lambda c: cut(c / "__0_0.distcp"), r"__0_0\.distcp is damaged: it has \d+ bytes, \d+ were written \(the file of rank 0\)"),
    (lambda c: (c / "__0_0.distcp").unlink(), r"is not complete: __0_0\.distcp is missing \(the file of rank 0\)"),
    (lambda c: cut(c / ".metadata"), r"\.metadata is damaged: it has \d+ bytes"),
    (lambda c: cut(c / "autopar.json"), r"cannot read .*autopar\.json: JSONDecodeError.*truncated or damaged"),
    (
        lambda c: (c / "autopar.json").unlink(),
        r"is no complete checkpoint: it has no autopar\.json, which is written last; its save did not end",
    ),
    (lambda c: (c / "autopar.json").write_text('{"format": 9, "files": {}}'), r"has format 9; this version of autopar reads 1"),
    (lambda c: c.rename(c.with_name("d")), r"there is no checkpoint .*/c"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[m for _, m in DAMAGE])
def test_damaged(saved, damage, message):
    damage(saved)
    refused(saved, message)
    with pytest.raises(CheckpointError, match=message):
        autopar.merge_state_dicts(saved)


def declare_sizes(folder):
    """As if this were what the save wrote."""
    manifest = json.loads((folder / "autopar.json").read_text())
    manifest["files"] = {f.name: f.stat().st_size for f in folder.iterdir() if f.name != "autopar.json"}
    (folder / "autopar.json").write_text(json.dumps(manifest))


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_nothing_is_unpickled_freely(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metadata = (saved / ".metadata").read_bytes()
    (saved / ".metadata").write_bytes(pickle.dumps(Evil()))
    declare_sizes(saved)
    refused(saved, r"the metadata holds a posix\.system, which has no place there; it is not loaded")
    (saved / ".metadata").write_bytes(metadata)
    declare_sizes(saved)
    assert autopar.load_checkpoint(saved, net()) == {"step": 1}
    torch.save(Evil(), "rank0.pt")
    with pytest.raises(CheckpointError, match=r"cannot read rank0\.pt: UnpicklingError"):
        autopar.merge_state_dicts(["rank0.pt"])
    with pytest.raises(CheckpointError, match=r"`extra` cannot be loaded again without running code .*; give numbers, texts, tensors"):
        autopar.save_checkpoint(tmp_path / "e", net(), extra=Evil())
    assert not (tmp_path / "ran").exists() and not (tmp_path / "e").exists()


def test_optimizers(saved, tmp_path):
    module = net()
    refused(saved, r"the optimizer updates a \(4, 3\) parameter that is not this Sequential's", module, trained()[1])
    groups = torch.optim.AdamW([{"params": module[0].parameters()}, {"params": module[1].parameters()}])
    refused(
        saved,
        r"has 2 groups of parameters, the saved one 1; 1\.bias, 1\.weight of this rank are in another group",
        module,
        groups,
        CheckpointError,
    )
    autopar.save_checkpoint(tmp_path / "without", net())
    refused(tmp_path / "without", "was saved without an optimizer; load it without one", *trained())
    with pytest.raises(
        CheckpointError, match=r"keeps 'row_var' of 0\.weight as a \(4, 1\) tensor; only tensors shaped like the parameter \(4, 3\)"
    ):
        autopar.save_checkpoint(tmp_path / "f", *trained(make=torch.optim.Adafactor))
    assert autopar.load_checkpoint(saved, net()) == {"step": 1}, "weights alone load without one"
    state, optim = autopar.merge_state_dicts(saved)
    with pytest.raises(CheckpointError, match="an optimizer's state dict is given, but no optimizer to load it into"):
        autopar.load_merged_state_dict(module, state, None, optim)
    with pytest.raises(CheckpointError, match=r"groups of \[4\] parameters; this optimizer's are of \[2, 2\], and the module has 4 in all"):
        autopar.load_merged_state_dict(module, state, groups, optim)
    with pytest.raises(CheckpointError, match="no optimizer state dict: it has no 'state'"):
        autopar.load_merged_state_dict(module, state, groups, {"a": 1})
    autopar.load_merged_state_dict(*trained()[:1], state)


def test_kinds_of_state_dicts(saved, tmp_path):
    module, optimizer = trained()
    sharded, deduped = (f(module, optimizer) for f in (autopar.sharded_state_dict, autopar.deduped_state_dict))
    cases = [
        (autopar.load_sharded_state_dict, deduped, "this is a deduped state dict, not a sharded one; use load_deduped_state_dict"),
        (autopar.load_deduped_state_dict, sharded, "this is a sharded state dict, not a deduped one; use load_sharded_state_dict"),
        (
            autopar.load_sharded_state_dict,
            module.state_dict(),
            "this is no sharded state dict; use load_merged_state_dict for the original",
        ),
        (autopar.load_merged_state_dict, sharded, "this is one rank's sharded state dict; use load_sharded_state_dict, or merge"),
        (
            autopar.load_sharded_state_dict,
            {**sharded, "autopar": {**sharded["autopar"], "rank": 2, "world": 4}},
            "this is the state of rank 2 of 4, loaded on rank 0 of 1; merge the state dicts of all ranks",
        ),
    ]
    for load, state, message in cases:
        with pytest.raises(CheckpointError, match=message):
            load(module, state)
    without = autopar.sharded_state_dict(module)
    with pytest.raises(CheckpointError, match="made without an optimizer; load it without one"):
        autopar.load_sharded_state_dict(module, without, optimizer)


def test_merging():
    module, optimizer = trained()
    one = autopar.sharded_state_dict(module, optimizer)
    two = [{**one, "autopar": {**one["autopar"], "rank": r, "world": 2}} for r in range(2)]
    cases = [
        ([], "nothing to merge"),
        (two[1:], "2 ranks saved 2 state dicts, 1 are given: those of rank 0 are missing"),
        ([two[1], two[1]], "those of rank 0 are missing; rank 1 is there twice"),
        ([one, two[1]], "state dicts of different saves: world is 1, 2"),
        ([module.state_dict()], r"is not one rank's state dict \(of sharded_state_dict or deduped_state_dict\)"),
        (["nowhere.pt"], "nowhere.pt does not exist; every rank's file is needed"),
        ([two[0], {**two[1], "optimizer": None}], r"only the ranks \[0\] saved an optimizer"),
        ([two[0], {**two[1], "names": {"a": ["a"]}}], "of different models"),
    ]
    for parts, message in cases:
        with pytest.raises(CheckpointError, match=message):
            autopar.merge_state_dicts(parts)


def test_truncated_rank_file(tmp_path):
    torch.save(autopar.sharded_state_dict(*trained()), tmp_path / "r.pt")
    autopar.merge_state_dicts([tmp_path / "r.pt"])
    cut(tmp_path / "r.pt", 500)
    with pytest.raises(CheckpointError, match=r"cannot read .*r\.pt: .*; it is truncated, damaged, or no state dict"):
        autopar.merge_state_dicts([tmp_path / "r.pt"])


def test_safetensors(tmp_path):
    module = net()
    file = tmp_path / "a.safetensors"

    def index(where):
        (tmp_path / "model.safetensors.index.json").write_text(where if isinstance(where, str) else json.dumps({"weight_map": where}))

    def bad(message):
        with pytest.raises(CheckpointError, match=message):
            autopar.load_merged_state_dict(module, tmp_path)

    bad("holds no .safetensors file")
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; give a \.safetensors file or a folder"):
        autopar.load_merged_state_dict(module, tmp_path / "nowhere")
    save_file({n: t.contiguous() for n, t in module.state_dict().items()}, file)
    index(dict.fromkeys(module.state_dict(), "b.safetensors"))
    bad(r"b\.safetensors is missing; .* lists it")
    index(dict.fromkeys([*module.state_dict(), "2.bias"], "a.safetensors"))
    bad(r"a\.safetensors lacks 2\.bias, which the index says it holds")
    index("{")
    bad("cannot read the index")
    index(dict.fromkeys(module.state_dict(), "a.safetensors"))
    autopar.load_merged_state_dict(module, tmp_path)
    cut(file)
    bad(r"cannot read .*a\.safetensors: .*; it is truncated or damaged")


def test_a_folder_of_something_else_is_kept(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("42")
    with pytest.raises(CheckpointError, match="exists and is no complete checkpoint; save to another folder, or remove it first"):
        autopar.save_checkpoint(tmp_path / "c", net())
    assert (tmp_path / "c" / "thesis.txt").exists()


# -- saves that are killed


def save_for_ever(folder, start):
    module, optimizer = trained()
    for step in range(start, 10**9):
        for p in module.parameters():
            p.data.fill_(step)
        autopar.save_checkpoint(folder, module, optimizer, {"step": step})


@pytest.mark.procs
def test_killed_saves(tmp_path):
    """SIGKILL at many moments of saves to the same folder: what loads is complete, and never older than the last one seen."""
    folder, last, torn = tmp_path / "c", -1, set()
    save_for_ever_once(folder)
    start = time.monotonic()
    save_for_ever_once(folder)
    usual = time.monotonic() - start
    for delay in range(12):
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            save_for_ever(folder, last + 1)
            os._exit(1)
        time.sleep(usual * (0.4 + 0.25 * delay))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        module, optimizer = trained()
        step = autopar.load_checkpoint(folder, module, optimizer)["step"]
        assert step >= last
        last = step
        assert all(bool((p == step).all()) for p in module.parameters())
        aside = tmp_path / ".c.saving"
        if aside.exists():
            torn.add((aside / "autopar.json").exists())
            if not (aside / "autopar.json").exists():
                refused(aside, "is no complete checkpoint: it has no autopar.json")
    assert torn, "some saves were killed in the middle"


def save_for_ever_once(folder):
    module, optimizer = trained()
    for p in module.parameters():
        p.data.fill_(-1)
    autopar.save_checkpoint(folder, module, optimizer, {"step": -1})


def test_killed_between_two_renames(tmp_path, caplog):
    folder = tmp_path / "c"
    save_for_ever_once(folder)
    folder.rename(tmp_path / ".c.previous")
    assert autopar.load_checkpoint(folder, net()) == {"step": -1}
    assert "loading the checkpoint before that" in caplog.text
    save_for_ever_once(folder)
    assert not any(f.name.startswith(".") for f in tmp_path.iterdir())


# -- several ranks


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    return compile_to(lm(), batch(0), "tp", ComputeConfig(plan_ngpus=2), gen_savedir=tmp_path_factory.mktemp("code"))


def faults(code, folder, rank):
    """What each rank says of a missing file, of the other rank's state, of other ZeRO settings and of a state cut in another way."""
    module = launch.load(code)
    optimizer = build_optimizer(module, torch.optim.AdamW, ComputeConfig(plan_ngpus=2), lr=0.1)
    module(**batch(0))["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    autopar.save_checkpoint(folder, module, optimizer)
    said = []

    def try_(fn, *args):
        try:
            fn(*args)
            said.append("")
        except (CheckpointError, LayoutError) as e:
            said.append(str(e))

    if rank == 0:
        (folder / "__1_0.distcp").unlink()
    torch.distributed.barrier()
    try_(autopar.load_checkpoint, folder, module, optimizer)
    state = autopar.sharded_state_dict(module, optimizer)
    torch.save(autopar.deduped_state_dict(module, optimizer), folder.with_name(f"rank{rank}.pt"))
    torch.distributed.barrier()
    swapped = torch.load(folder.with_name(f"rank{1 - rank}.pt"), weights_only=True)
    try_(autopar.load_sharded_state_dict, module, {**state, "autopar": {**state["autopar"], "rank": 1 - rank}}, optimizer)
    try_(autopar.load_deduped_state_dict, module, swapped, optimizer)
    mine = torch.load(folder.with_name(f"rank{rank}.pt"), weights_only=True)
    mine["model"].pop("pos" if rank == 1 else "embed.weight", None)
    try_(autopar.load_deduped_state_dict, module, mine, optimizer)
    return said


@pytest.mark.procs
def test_faults_of_one_rank(code, tmp_path):
    got = run_processes(lambda rank: faults(code, tmp_path / "c", rank), 2)
    for rank, (missing, other, swapped, lost) in enumerate(got):
        assert "__1_0.distcp is missing (the file of rank 1)" in missing
        assert f"the state of rank {1 - rank} of 2, loaded on rank {rank} of 2" in other
        assert "the state of rank" in swapped
        assert "no rank has embed.weight as this rank holds it" in lost or "no rank has pos as this rank holds it" in lost
    with pytest.raises(CheckpointError, match="2 ranks saved 2 state dicts, 1 are given: those of rank 1 are missing"):
        autopar.merge_state_dicts([tmp_path / "rank0.pt"])
    module, _ = autopar.merge_state_dicts([tmp_path / "rank0.pt", tmp_path / "rank1.pt"])
    assert module.keys() == lm().state_dict().keys()


def die(code, folder, rank):
    module = launch.load(code)
    autopar.save_checkpoint(folder, module, extra="first")
    if rank == 1:
        from autopar.runtime.state import planner

        def kill(self, item):
            os.kill(os.getpid(), signal.SIGKILL)

        planner.SavePlanner.resolve_data = kill
    autopar.save_checkpoint(folder, module, extra="second")


@pytest.mark.procs
def test_one_rank_killed_in_a_save(code, tmp_path):
    start = time.monotonic()
    with pytest.raises(ProcessesFailed) as e:
        run_processes(lambda rank: die(code, tmp_path / "c", rank), 2, timeout=30)
    assert "rank 1: killed" in str(e.value) and re.search(r"rank 0: (failed|killed)", str(e.value))
    assert time.monotonic() - start < 25
    assert autopar.merge_state_dicts(tmp_path / "c")[0].keys() == lm().state_dict().keys()
    refused(tmp_path / ".c.saving", "is no complete checkpoint", lm())
    assert autopar.load_checkpoint(tmp_path / "c", lm()) == "first"
