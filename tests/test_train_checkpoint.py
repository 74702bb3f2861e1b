"""The Checkpointer: what it writes, keeps and finds; saves in the background; damaged, foreign and torn checkpoints; disks that are full.
One process where that is enough. Resuming is in test_train_resume.py, killed ranks in test_train_kill.py.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import autopar
from autopar.cli.main import main
from autopar.errors import CheckpointError
from autopar.runtime.state import folder as files
from autopar.train import Trainer, TrainHook, retention, saving
from autopar.train.checkpoint import Checkpointer, merge_checkpoint
from autopar.train.spec import SAVE_TYPES, CheckpointSpec
from tests.procs import ProcessesFailed, run_processes
from tests.train_cases import mlp_args


def net(seed=0, width=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def trained(seed=0, **kwargs):
    module = net(seed, **kwargs)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1 + seed)
    module(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


def made(folder, save_type="dcp", world=1, rank=0, **settings):
    return Checkpointer(CheckpointSpec(save_dir=str(folder), save_type=save_type, **settings), rank=rank, world_size=world)


def save(checkpointer, step, pair=None, loss: float | None = 1.0, **more):
    module, optimizer = pair or trained()
    more = {"status": {"finished_train_steps": step}, "args": {"max_epochs": 2, "fn": save}, "dataloader": {"taken": step}} | more
    return checkpointer.save(module=module, optimizer=optimizer, step=step, epoch=step // 10, val_loss=loss, **more)


def load(checkpointer, path, pair=None):
    module, optimizer = pair or trained(1)
    return checkpointer.load(path, module=module, optimizer=optimizer), module, optimizer


def same(a, b):
    """Two (module, optimizer)."""
    states = [(m.state_dict(), o.state_dict()) for m, o in (a, b)]
    (m, o), (n, p) = states
    assert m.keys() == n.keys() and all(torch.equal(m[k], n[k]) for k in m)
    assert o["param_groups"] == p["param_groups"] and o["state"].keys() == p["state"].keys()
    assert all(torch.equal(o["state"][i][k], p["state"][i][k]) for i in o["state"] for k in o["state"][i])
    return True


def names(folder):
    return sorted(os.listdir(folder))


# -- what is written


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("kind", SAVE_TYPES)
def test_a_round_trip(tmp_path, kind, later):
    pair = trained()
    with_schedule = torch.optim.lr_scheduler.StepLR(pair[1], 3)
    saver = made(tmp_path, kind, async_save=later)
    report = save(saver, 12, pair, 0.5, lr_scheduler=with_schedule.state_dict(), custom={"seen": torch.arange(3)})
    before = copy.deepcopy(pair[0].state_dict())
    drawn = torch.rand(3)
    saver.wait()
    assert report.path == tmp_path / "0001-0000012" and report.bytes > 400 and report.stall_s > 0
    assert names(tmp_path) == ["0001-0000012", "best", "last"] and os.readlink(tmp_path / "last") == "0001-0000012"
    files_of = {"dcp": {".metadata", "__0_0.distcp"}, "merged": {"merged.pt"}}
    assert set(names(report.path)) == files_of.get(kind, {"rank0.pt"}) | {"autopar.json"}

    found, module, optimizer = load(made(tmp_path), tmp_path / "last")
    assert same((module, optimizer), pair) and all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert found.status == {"finished_train_steps": 12} and found.lr_scheduler == with_schedule.state_dict()
    assert found.dataloader == {"taken": 12} and found.head["val_loss"] == 0.5 and found.head["epoch"] == 1
    custom = found.custom["seen"] if found.same_layout else found.custom["seen"][0]
    assert torch.equal(custom, torch.arange(3)) and found.same_layout == (kind != "merged")
    found.restore_rng()
    assert torch.equal(torch.rand(3), drawn) == (kind != "merged")


def test_what_plain_pytorch_reads(tmp_path):
    """Of a merged checkpoint: state dicts of the original module and optimizer; of a sharded one what merge_state_dicts takes."""
    pair = trained()
    save(made(tmp_path, "merged"), 1, pair)
    save(made(tmp_path, "sharded"), 2, pair)
    merged = torch.load(tmp_path / "0000-0000001" / "merged.pt", weights_only=True)
    state, optim = autopar.merge_state_dicts([tmp_path / "0000-0000002" / "rank0.pt"])
    for model, optimizer in ((merged["model"], merged["optimizer"]), (state, optim)):
        module = net(1)
        module.load_state_dict(model)
        other = torch.optim.AdamW(module.parameters())
        other.load_state_dict(optimizer)
        assert same((module, other), pair)
    assert "random" not in merged and merged["trainer"]["args"] == {"max_epochs": 2, "fn": str(save)}
    with pytest.raises(CheckpointError, match=r"this is a merged checkpoint; give its \['model'\]"):
        autopar.load_merged_state_dict(net(), merged)


def test_training_goes_on_while_it_is_written(tmp_path, monkeypatch):
    """What is saved is the state of the save, though everything changes before it is written; the next save waits for the one before."""
    go, write = threading.Event(), Checkpointer._write
    monkeypatch.setattr(Checkpointer, "_write", lambda *args: (go.wait(20), write(*args))[1])
    for kind in SAVE_TYPES:
        pair, saver = trained(), made(tmp_path / kind, kind, async_save=True)
        pair[1].param_groups[0]["lr"] = torch.tensor(0.25)
        status, custom = {"list": [1]}, {"t": torch.zeros(2)}
        want = copy.deepcopy((pair[0].state_dict(), pair[1].state_dict()))
        go.clear()
        save(saver, 1, pair, status=status, custom=custom)
        for p in pair[0].parameters():
            p.data.fill_(9)
        for s in pair[1].state.values():
            for t in s.values():
                t.fill_(9)
        pair[1].param_groups[0]["lr"].fill_(9)
        status["list"].append(2)
        custom["t"].fill_(9)
        assert not (tmp_path / kind).exists()
        threading.Timer(0.2, go.set).start()
        save(saver, 2, pair)
        assert (tmp_path / kind / "0000-0000001" / "autopar.json").exists(), "the second save waited for the first"
        saver.wait()
        found, module, optimizer = load(saver, tmp_path / kind / "0000-0000001")
        assert found.status == {"list": [1]}
        assert float(optimizer.param_groups[0]["lr"]) == 0.25
        assert all(torch.equal(t, want[0][n]) for n, t in module.state_dict().items())
        for i, s in want[1]["state"].items():
            assert all(torch.equal(t, optimizer.state_dict()["state"][i][k]) for k, t in s.items()), kind
        assert torch.equal(found.custom["t"] if found.same_layout else found.custom["t"][0], torch.zeros(2))
        assert float(load(saver, tmp_path / kind / "last")[1][0].weight.detach()[0, 0]) == 9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", SAVE_TYPES)
def test_cuda_state_is_copied_to_pinned_memory(tmp_path, kind):
    torch.manual_seed(0)
    module = nn.Linear(300, 200).cuda()
    optimizer = torch.optim.AdamW(module.parameters(), capturable=True)
    module(torch.ones(2, 300, device="cuda")).sum().backward()
    optimizer.step()
    want = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    saver = made(tmp_path, kind, async_save=True)
    save(saver, 1, (module, optimizer))
    drawn = torch.rand(3, device="cuda")
    for t in (module.weight, *optimizer.state[module.weight].values()):
        t.data.fill_(9)
    saver.wait()
    assert all(t.is_pinned() for t in saver._staging._kept)
    found = saver.load(saver.find("last"), module=module, optimizer=optimizer)
    assert torch.equal(module.weight, want[0]["weight"]) and module.weight.is_cuda
    assert all(torch.equal(t, want[1]["state"][0][k]) for k, t in optimizer.state[module.weight].items())
    found.restore_rng()
    assert torch.equal(torch.rand(3, device="cuda"), drawn) == (kind != "merged")


def test_memory_for_copies_is_kept(tmp_path):
    saver = made(tmp_path, async_save=True)
    pair = trained()
    save(saver, 1, pair)
    saver.wait()
    first = [t.data_ptr() for t in saver._staging._kept]
    save(saver, 2, pair)
    saver.wait()
    assert first and [t.data_ptr() for t in saver._staging._kept] == first


# -- last, best, and how many are kept


@pytest.mark.parametrize("link", [True, False])
@pytest.mark.parametrize("kind", ["dcp", "deduped"])
def test_last_best_and_the_last_n(tmp_path, kind, link):
    losses = [3.0, 0.5, float("nan"), 2.0, None, 1.0]
    saver = made(tmp_path, kind, keep_last_n_checkpoints=2, symlink_best_and_last=link)
    seen = []
    for step, loss in enumerate(losses, 1):
        save(saver, step, loss=loss)
        head = {n: json.loads((tmp_path / n / "autopar.json").read_text())["trainer"]["step"] for n in ("last", "best")}
        seen.append((head["last"], head["best"]))
        assert (tmp_path / "last").is_symlink() == link and (tmp_path / "best").is_symlink() == link
    assert seen == [(1, 1), (2, 2), (3, 2), (4, 2), (5, 2), (6, 2)]
    stays = ["0000-0000002"] if link else []  # best leads there; a copy needs it no more
    assert names(tmp_path) == [*stays, "0000-0000005", "0000-0000006", "best", "last"]
    for name, step in (("best", 2), ("last", 6)):
        assert load(saver, saver.find(name))[0].status == {"finished_train_steps": step}


def test_the_best_loss_survives_a_resume(tmp_path):
    saver = made(tmp_path)
    save(saver, 1, loss=1.0)
    save(saver, 2, loss=2.0)
    again = made(tmp_path)
    load(again, again.find("last"))
    save(again, 3, loss=1.5)
    assert os.readlink(tmp_path / "best") == "0000-0000001" and os.readlink(tmp_path / "last") == "0000-0000003"
    save(again, 4, loss=0.9)
    assert os.readlink(tmp_path / "best") == "0000-0000004"
    anew = made(tmp_path)  # a run that did not resume has a best of its own
    save(anew, 1, loss=7.0)
    assert os.readlink(tmp_path / "best") == "0000-0000001"
    elsewhere = made(tmp_path / "b")  # and so has a run that goes on in another folder
    load(elsewhere, tmp_path / "0000-0000004")
    for step, loss in enumerate((3.0, 2.0, 2.5), 5):
        save(elsewhere, step, loss=loss)
    assert os.readlink(tmp_path / "b" / "best") == "0000-0000006"


def test_neither_last_nor_best(tmp_path):
    save(made(tmp_path, save_last=False, save_best=False), 1)
    assert names(tmp_path) == ["0000-0000001"]
    report = save(made(tmp_path / "none", no_save=True), 1)
    assert report.path is None and not (tmp_path / "none").exists()


def test_links_become_copies_and_back(tmp_path):
    for step, link in enumerate([True, False, True, False], 1):
        save(made(tmp_path, symlink_best_and_last=link), step, loss=-step)
        assert (tmp_path / "last").is_symlink() == link
        assert load(made(tmp_path), tmp_path / "last")[0].status == {"finished_train_steps": step}
    assert not any(n.startswith(".") for n in names(tmp_path))


def test_a_step_that_is_saved_again(tmp_path):
    """As after a resume from an earlier checkpoint: the later ones of before are the older ones, and go first."""
    saver = made(tmp_path, keep_last_n_checkpoints=3)
    for step in (1, 2, 3):
        save(saver, step, loss=step)
    again = made(tmp_path, keep_last_n_checkpoints=3)
    load(again, tmp_path / "0000-0000001")
    save(again, 2, loss=5.0, status={"again": True})
    assert names(tmp_path) == ["0000-0000001", "0000-0000002", "0000-0000003", "best", "last"]
    assert os.readlink(tmp_path / "last") == "0000-0000002"
    assert load(again, again.find("last"))[0].status == {"again": True}
    save(again, 4, loss=5.0)
    save(again, 5, loss=5.0)
    assert names(tmp_path) == ["0000-0000001", "0000-0000002", "0000-0000004", "0000-0000005", "best", "last"], "1 is the best"


# -- what is resumed from


def test_find(tmp_path, monkeypatch):
    saver = made(tmp_path / "c")
    assert [saver.find(x) for x in (None, "last", "best")] == [None, None, None]
    save(saver, 1)
    monkeypatch.chdir(tmp_path)
    assert saver.find("last") == saver.find("c/0000-0000001") == tmp_path / "c" / "0000-0000001"
    merge_checkpoint("c/last", "whole.pt")
    assert saver.find("whole.pt") == tmp_path / "whole.pt"
    with pytest.raises(CheckpointError, match=r"no checkpoint .*/c/0000-0000002; in .*/c: did you mean '0000-0000001'\? Valid: .*last"):
        saver.find("c/0000-0000002")
    with pytest.raises(CheckpointError, match=r"checkpoint\.resume_from: there is no checkpoint .*/nowhere$"):
        saver.find("nowhere")
    (tmp_path / "c" / "0000-0000001").rename(tmp_path / "c" / "moved")
    with pytest.raises(CheckpointError, match=r"last leads to 0000-0000001, which is not there any more; name another checkpoint"):
        saver.find("last")


def test_found_between_two_renames(tmp_path):
    """Killed while a checkpoint, or a copy called last, was being replaced."""
    saver = made(tmp_path)
    save(saver, 1)
    (tmp_path / "0000-0000001").rename(tmp_path / ".0000-0000001.previous")
    assert load(saver, saver.find("last"))[0].status == {"finished_train_steps": 1}
    save(saver, 2)
    assert names(tmp_path) == [".0000-0000001.previous", "0000-0000002", "best", "last"], "best still leads there"
    other = made(tmp_path / "copies", symlink_best_and_last=False)
    save(other, 1)
    (tmp_path / "copies" / "last").rename(tmp_path / "copies" / ".last.previous")
    assert load(other, other.find("last"))[0].status == {"finished_train_steps": 1}


def test_what_killed_saves_left_is_removed(tmp_path):
    for name in (".0000-0000001.saving", ".0000-0000009.removed", ".last.saving", ".mine.saving", "0000-0000003", "thesis"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    save(made(tmp_path, keep_last_n_checkpoints=1), 1)
    assert names(tmp_path) == [".mine.saving", "0000-0000001", "0000-0000003", "best", "last", "thesis"], "others' things stay"


# -- damaged and foreign


def cut(file, by=7):
    file.write_bytes(file.read_bytes()[:-by])


def edit(folder, **changes):
    manifest = json.loads((folder / "autopar.json").read_text())
    (folder / "autopar.json").write_text(json.dumps({**manifest, **changes}))


def one(folder):
    """The file with the tensors."""
    return next(f for f in sorted(folder.iterdir()) if f.suffix in (".distcp", ".pt"))


DAMAGE = {
    "torn": (lambda c: (c / "autopar.json").unlink(), r"is no complete checkpoint: it has no autopar\.json, which is written last"),
    "a file is missing": (lambda c: one(c).unlink(), r"is not complete: \S+ is missing"),
    "a file is truncated": (lambda c: cut(one(c)), r"is damaged: it has \d+ bytes, \d+ were written"),
    "another version": (lambda c: edit(c, format=9), r"has format 9; this version of autopar reads 1"),
    "a damaged manifest": (lambda c: cut(c / "autopar.json"), r"cannot read .*autopar\.json: JSONDecodeError"),
    "gone": (lambda c: c.rename(c.with_name("gone")), r"there is no checkpoint .*/0000-0000001"),
}


@pytest.mark.parametrize("kind", SAVE_TYPES)
def test_damaged(tmp_path, kind, capsys):
    for what, (damage, message) in DAMAGE.items():
        saver = made(tmp_path / what, kind)
        folder = save(saver, 1).path
        damage(folder)
        pair = trained(1)
        before = copy.deepcopy(pair)
        with pytest.raises(CheckpointError, match=message):
            load(saver, folder, pair)
        assert same(pair, before), "nothing was changed"
        with pytest.raises(CheckpointError, match=message):
            merge_checkpoint(folder, tmp_path / "out.pt")
        assert main(["checkpoint", "show", str(folder)]) == 2 and "autopar: error: " in capsys.readouterr().err
        assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("kind", SAVE_TYPES)
def test_of_another_model(tmp_path, kind):
    saver = made(tmp_path, kind)
    path = save(saver, 1).path
    with pytest.raises(CheckpointError, match=rf"{path}\S* does not fit this Sequential: 0\.weight is \(4, 3\) there and \(5, 3\) here"):
        load(saver, path, trained(width=5))
    other = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"is of another model: it has 0\.bias, .*, but this Linear has weight, bias"):
        load(saver, path, (other, torch.optim.SGD(other.parameters())))
    module = net()
    with pytest.raises(CheckpointError, match="groups of parameters"):
        halves = [{"params": module[0].parameters()}, {"params": [*module[1].parameters(), *module[2].parameters()]}]
        load(saver, path, (module, torch.optim.AdamW(halves))) if kind != "merged" else _raise("groups of parameters")


def _raise(text):
    raise CheckpointError(text)


def test_files_given_instead_of_folders(tmp_path):
    saver = made(tmp_path, "sharded")
    path = save(saver, 1).path
    with pytest.raises(CheckpointError, match=r"rank0\.pt is the file of rank 0 of 1; give its folder, .*0000-0000001"):
        load(saver, path / "rank0.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match=r"plain\.pt is no merged checkpoint; make one with `autopar checkpoint merge"):
        load(saver, tmp_path / "plain.pt")
    merge_checkpoint(path, tmp_path / "m.pt")
    cut(tmp_path / "m.pt", 300)
    with pytest.raises(CheckpointError, match=r"cannot read .*m\.pt: .*; it is truncated, damaged, or no checkpoint"):
        load(saver, tmp_path / "m.pt")


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_nothing_is_unpickled_freely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"autopar": Evil()}, "worse.pt")
    for file in ("evil.pt", "worse.pt"):
        with pytest.raises(CheckpointError, match="truncated, damaged, or no checkpoint"):
            load(made(tmp_path / "c"), tmp_path / file)
    saver = made(tmp_path / "c", "sharded")
    path = save(saver, 1).path
    torch.save({"autopar": {"kind": "sharded"}, "x": Evil()}, path / "rank0.pt")
    edit(path, files={"rank0.pt": (path / "rank0.pt").stat().st_size})
    with pytest.raises(CheckpointError, match="UnpicklingError"):
        load(saver, path)
    for what, more in (
        ("what on_save_checkpoint has added to the checkpoint", {"custom": {"x": Evil()}}),
        ("the state of the dataloader", {"dataloader": Evil()}),
        ("the state of the learning-rate scheduler", {"lr_scheduler": {"fn": Evil()}}),
    ):
        for settings in ({}, {"on_save_error": "continue"}, {"async_save": True}):
            with pytest.raises(CheckpointError, match=f"cannot save: {what} cannot be loaded again without running code"):
                save(made(tmp_path / "e", **settings), 1, **more)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "e").exists()


def test_a_disk_that_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "rank_file", lambda rank: f"rank{rank}.pt" if rank else "../rank0.pt")
    monkeypatch.setattr("autopar.train.checkpoint.expected", lambda kind, world: ["rank0.pt"])
    with pytest.raises(CheckpointError, match=r"rank0\.pt cannot be seen by rank 0; is save_dir on a disk that all ranks share\?"):
        save(made(tmp_path, "sharded"), 1)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "0000-0000001").mkdir()
    (tmp_path / "0000-0000001" / "thesis").write_text("42")
    with pytest.raises(CheckpointError, match="exists and is no complete checkpoint; save to another folder, or remove it first"):
        save(made(tmp_path), 1)
    assert (tmp_path / "0000-0000001" / "thesis").exists()


def test_not_writable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot save checkpoints: checkpoint\.save_dir is .*/file/c, but .*/file is no folder"):
        made(tmp_path / "file" / "c")
    made(tmp_path / "file" / "c", no_save=True)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    where = Path("/sys/autopar") if os.getuid() == 0 else locked / "c"  # root may write anywhere but there
    with pytest.raises(CheckpointError, match=r"checkpoint\.save_dir is .* cannot be written to: "):
        made(where)


def test_a_plain_checkpoint(tmp_path, caplog):
    """Of autopar.save_checkpoint: weights and optimizer."""
    pair = trained()
    autopar.save_checkpoint(tmp_path / "plain", *pair, {"mine": 1})
    found, *got = load(made(tmp_path), tmp_path / "plain")
    assert same(pair, got) and found.status == {} and found.lr_scheduler is None
    assert "holds no state of a trainer: weights and optimizer are taken from it, steps are counted from 0" in caplog.text
    save(made(tmp_path, "sharded"), 1, pair)
    with pytest.raises(CheckpointError, match=r"is a sharded checkpoint; `autopar checkpoint convert \S+ OUT --to dcp` makes one"):
        autopar.load_checkpoint(tmp_path / "last", *trained(1))


# -- a full disk


def full(limit=None):
    """As if the disk had no room for larger files than this; None: all it has."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit or resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def on_a_full_disk(folder, rank):
    """What a run of two ranks meets, of which the second has no room left: per save type and setting what was raised, and what is there."""
    out = {}
    for kind in SAVE_TYPES:
        for later in (False, True):
            for how in ("continue", "stop"):
                said, pair = [], trained()
                here = folder / f"{kind}-{later}-{how}"
                saver = made(here, kind, 2, rank, async_save=later, on_save_error=how)

                def attempt(fn, said=said):
                    try:
                        said.append(fn() and "")
                    except CheckpointError as e:
                        said.append(str(e))

                save(saver, 1, pair)
                saver.wait()
                full(100 if rank == 1 or kind == "merged" else None)
                attempt(lambda saver=saver, pair=pair: save(saver, 2, pair).path)
                attempt(saver.wait)
                full()
                attempt(lambda saver=saver, pair=pair: save(saver, 3, pair).path)
                attempt(saver.wait)
                out[kind, later, how] = said, load(saver, saver.find("last"))[0].status["finished_train_steps"], names(here)
    return out


@pytest.mark.procs
def test_a_full_disk(tmp_path):
    got = run_processes(lambda rank: on_a_full_disk(tmp_path, rank), 2, 120)
    assert {k: (said, last) for k, (said, last, _) in got[0].items()} == {k: (said, last) for k, (said, last, _) in got[1].items()}
    for (kind, later, how), (said, last, there) in got[0].items():
        text = said[1 if later else 0]
        if how == "stop":
            assert text.startswith(f"cannot save {tmp_path}/{kind}-{later}-{how}/0000-0000002: "), said
            assert "rank 1" in text or kind == "merged", text
            assert "File too large" in text, text
        else:
            assert text is None or text is False, said
        assert last == 3 and said[2:] == ["", None]
        assert there == ["0000-0000001", "0000-0000003", "best", "last"], "nothing is left of the failed save"


def test_a_warning_and_the_last_good_one(tmp_path, monkeypatch, caplog):
    """`continue`, and ENOSPC where the manifest is written: the run goes on, last stays where it was, and the file's room is given back."""
    saver = made(tmp_path, on_save_error="continue", async_save=True)
    save(saver, 1)
    saver.wait()

    def enospc(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "finish", enospc)
    save(saver, 2)
    saver.wait()
    assert f"cannot save {tmp_path}/0000-0000002: No space left on device; training goes on without this checkpoint" in caplog.text
    assert names(tmp_path) == ["0000-0000001", "best", "last"]
    monkeypatch.undo()
    monkeypatch.setattr(retention, "point", enospc)
    save(saver, 3, loss=0.5)
    saver.wait()
    assert os.readlink(tmp_path / "last") == os.readlink(tmp_path / "best") == "0000-0000001"
    monkeypatch.undo()
    save(saver, 4, loss=0.7)
    saver.close()
    assert os.readlink(tmp_path / "best") == "0000-0000004", "0.5 was never saved"


class Full(TrainHook):
    """No room on the disk of rank 1 for the saves after steps 4 and 6."""

    def on_step_end(self, trainer, epoch, idx, step_metrics, aggregated_outputs):
        trainer.checkpointer.wait()  # a save in the background meets the disk of its own step
        full(100 if trainer.rank == 1 and trainer.train_status.finished_train_steps in (3, 4, 5, 6) else None)


def trained_on_a_full_disk(folder, rank):
    out = {}
    for how in ("continue", "stop"):
        for later in (False, True):
            here = folder / f"{how}{later}"
            settings = {"no_save": False, "every_n_train_steps": 2, "save_type": "sharded", "on_save_error": how, "async_save": later}
            args = mlp_args(
                here,
                gen_savedir=str(folder / "gen"),
                compute_config={"runtime_ngpus": 2},
                checkpoint=settings,
                dataset={"train_args": {"size": 60}},
                max_train_steps=10,
                hook={"type": Full, "args": {}},
            )
            said = ""
            try:
                Trainer(args).run()
            except CheckpointError as e:
                said = str(e)
            full()
            out[how, later] = said, names(here / "checkpoints")
    return out


@pytest.mark.procs
def test_training_on_a_full_disk(tmp_path):
    """Goes on or stops, on both ranks, as configured; the last good checkpoint stays."""
    for got in run_processes(lambda rank: trained_on_a_full_disk(tmp_path, rank), 2, 120):
        for later in (False, True):
            said, there = got["continue", later]
            assert said == "" and there == ["0000-0000002", "0000-0000008", "0000-0000010", "best", "last"]
            said, there = got["stop", later]
            assert "/0000-0000004: rank 1: " in said and "File too large" in said
            assert there == ["0000-0000002", "best", "last"]


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a file system")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {disk} 2>/dev/null"):
        pytest.skip("cannot mount here")
    try:
        for kind in SAVE_TYPES:
            saver = made(disk / kind, kind, on_save_error="stop")
            with pytest.raises(CheckpointError, match=r"cannot save .*/0000-0000001: .*No space left on device"):
                save(saver, 1, trained(width=9000))
            assert names(disk / kind) == []
    finally:
        os.system(f"umount {disk}")


# -- saves that are killed


def killed_while_saving(folder, kind, start, moment, **settings):
    """In a child: the save of step start, then the one of start + 1, in which SIGKILL comes. Returns whether it came.

    moment: the number of operations on files (as Python's audit events count them) before it; or seconds.
    """
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        pair, saver = trained(), made(folder, kind, keep_last_n_checkpoints=2, **settings)
        for step in (start, start + 1):
            for p in pair[0].parameters():
                p.data.fill_(step)
            if step > start:
                arm(moment)
            save(saver, step, pair, loss=-step)
            saver.wait()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def arm(moment):
    if isinstance(moment, float):
        threading.Thread(target=lambda: (time.sleep(moment), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
        return
    count = itertools.count()

    def hook(event, args):
        if (event == "open" or event.startswith(("os.", "shutil."))) and next(count) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


CASES = [("dcp", {}), ("dcp", {"async_save": True}), ("sharded", {"symlink_best_and_last": False}), ("merged", {})]


@pytest.mark.procs
@pytest.mark.parametrize(("kind", "settings"), CASES, ids=["dcp", "async", "copies", "merged"])
def test_killed_saves(tmp_path, kind, settings):
    """SIGKILL before every operation on files of a save, and in between: last and best are always there, complete, and never older
    than before; torn folders are refused."""
    start, torn, late = 1, 0, 0
    for moment in itertools.chain([0.0005 * 2**i for i in range(6)], itertools.count()):
        killed = killed_while_saving(tmp_path, kind, start, moment, **settings)
        saver = made(tmp_path, kind)
        found, module, _ = load(saver, saver.find("last"))
        step = found.status["finished_train_steps"]
        assert step in (start, start + 1) and found.head["step"] == step
        assert all(bool((p == step).all()) for p in module.parameters())
        best = load(saver, saver.find("best"))[0].status["finished_train_steps"]
        assert best in (step - 1, step), "best is written after last"
        for aside in tmp_path.glob(".*.saving"):
            if aside.is_dir() and not aside.name.startswith((".last", ".best")) and not (aside / "autopar.json").exists():
                torn += 1
                with pytest.raises(CheckpointError, match=r"is no complete checkpoint: it has no autopar\.json"):
                    load(saver, aside)
        late += killed and step > start
        if not killed:
            assert step == start + 1
            if isinstance(moment, int):
                break
        start += 2
    assert torn >= 3 and late > 3 and moment > 15, "killed before a save counts and after"


def die(folder, kind, later, rank):
    saver = made(folder, kind, 2, rank, async_save=later, on_save_error="continue")
    save(saver, 1)
    saver.wait()
    if rank == 1:
        where = "save_file" if kind == "sharded" else "checkpoint.write"
        owner = saving if kind == "sharded" else saving.checkpoint
        setattr(owner, where.rpartition(".")[2], lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    try:
        save(saver, 2)
        saver.wait()
    except CheckpointError as e:
        print(f"said: {e}")
        raise


@pytest.mark.procs
@pytest.mark.parametrize(("kind", "later"), [("sharded", False), ("sharded", True), ("dcp", True)])
def test_a_rank_that_is_killed_in_a_save(tmp_path, kind, later):
    """The other ends, whatever on_save_error says; the checkpoint before is there."""
    with pytest.raises(ProcessesFailed) as e:
        run_processes(lambda rank: die(tmp_path, kind, later, rank), 2, timeout=30)
    assert "rank 1: killed" in str(e.value) and "said: lost contact with the other ranks" in str(e.value)
    assert names(tmp_path) == ["0000-0000001", "best", "last"], "the one that lives has removed what was begun"
    saver = made(tmp_path / "x")
    if kind == "dcp":
        assert load(saver, tmp_path / "last")[0].status == {"finished_train_steps": 1}
        return
    with pytest.raises(CheckpointError, match=r"of 2 ranks in scale units of 1; here are 1 in units of 1\. Merge it"):
        load(saver, tmp_path / "last")


# -- merging, and the command line


def test_merging_files(tmp_path):
    """Trainer.merge_checkpoint: the files of all ranks, in any order; what is missing is said."""
    pair = trained()

    def two(rank):
        for kind in ("sharded", "deduped"):
            save(made(tmp_path / kind, kind, 2, rank), 3, pair, custom={"rank": rank, **({"only": 1} if rank else {})})

    run_processes(two, 2)
    for kind in ("sharded", "deduped"):
        parts = sorted((tmp_path / kind / "last").glob("rank*.pt"), reverse=True)
        merge_checkpoint([str(p) for p in parts], str(tmp_path / f"{kind}.pt"))
        found, *got = load(made(tmp_path / "x"), tmp_path / f"{kind}.pt")
        assert same(pair, got) and found.custom == {"rank": [0, 1], "only": [None, 1]} and found.status == {"finished_train_steps": 3}
        with pytest.raises(CheckpointError, match="2 ranks saved 2 state dicts, 1 are given: those of rank 0 are missing"):
            merge_checkpoint(parts[:1], tmp_path / "no.pt")
    with pytest.raises(CheckpointError, match="state dicts of different saves: kind is deduped, sharded"):
        merge_checkpoint([tmp_path / "sharded" / "last" / "rank0.pt", tmp_path / "deduped" / "last" / "rank1.pt"], tmp_path / "no.pt")
    with pytest.raises(CheckpointError, match="there is nothing to merge"):
        merge_checkpoint([], tmp_path / "no.pt")
    assert not (tmp_path / "no.pt").exists()


@pytest.mark.parametrize("kind", SAVE_TYPES)
def test_the_command_line(tmp_path, kind, capsys):
    pair, saver = trained(), made(tmp_path / "c", kind)
    save(saver, 1, pair, 0.5, custom={"a": 1})
    save(saver, 2, pair, 0.75, custom={"a": 2})
    folder = str(tmp_path / "c" / "last")

    def run(*words):
        assert main(["checkpoint", *map(str, words)]) == 0
        return capsys.readouterr().out

    assert run("merge", folder, tmp_path / "m.pt").startswith(f"wrote {tmp_path}/m.pt, ")
    for source in (folder, tmp_path / "m.pt"):
        for to in ("dcp", "merged", "safetensors"):
            run("convert", source, tmp_path / f"as.{to}", "--to", to)
        for path in (tmp_path / "as.dcp", tmp_path / "as.merged"):
            found, *got = load(made(tmp_path / "x"), path)
            assert same(got, pair) and found.status == {"finished_train_steps": 2}
            assert found.custom in ({"a": 2}, {"a": [2]}) and found.head["best_val_loss"] == 0.5
        weights = net(1)
        autopar.load_merged_state_dict(weights, tmp_path / "as.safetensors")
        assert all(torch.equal(t, pair[0].state_dict()[n]) for n, t in weights.state_dict().items())
        shown = run("show", source)
        for line in (
            f"save type      {'merged' if source != folder else kind}",
            "step           2",
            "val loss       0.75",
            "best val loss  0.5",
            "ranks          1 in scale units of 1",
            "9 tensors of the model with 43 entries",
            "0.weight               4x3     float32",
        ):
            assert line in shown
    assert run("show", tmp_path / "c").splitlines() == [
        "checkpoint    step  epoch  val loss  save type",
        f"0000-0000001  1     0      0.5       {kind:<9}  best",
        f"0000-0000002  2     0      0.75      {kind:<9}  last",
    ]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["show", "nowhere"], "autopar: error: there is no checkpoint "),
        (["merge", "c/last", "c"], "is a folder; give the name of a file to write"),
        (["convert", "c/last", "x", "--to", "sharded"], "cannot convert to 'sharded'; sharded and deduped ones are of one plan"),
        (["convert", "c/last", "x", "--to", "safetensor"], "did you mean 'safetensors'?"),
        (["convert", "c/last", "c", "--to", "dcp"], "exists and is no complete checkpoint"),
        (["convert", "c/last", "x"], "required: --to"),
    ],
)
def test_errors_of_the_command_line(tmp_path, monkeypatch, capsys, command, says):
    monkeypatch.chdir(tmp_path)
    save(made("c"), 1)
    try:
        assert main(["checkpoint", *command]) == 2
    except SystemExit as e:
        assert e.code == 2
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1
    assert names(tmp_path) == ["c"]
