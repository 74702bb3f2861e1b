"""Savedir: layout, what is in the files, killed compiles, places that cannot be written, damaged folders, weights.
The reuse modes are in test_reuse.py.
"""

from __future__ import annotations

import errno
import json
import os
import pickletools
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from procs import run_processes
from safetensors.torch import load_file, save_file
from small_models import LM
from torch import nn

import autopar
from autopar import ConfigError, SavedirError, driver
from autopar.codegen import savedir
from autopar.codegen.savedir import read_manifest
from autopar.runtime.launch import load
from autopar.runtime.reader import SafetensorsReader

IDS = torch.arange(24).reshape(4, 6) % 16
DATA = {"buffers.safetensors", "constants.safetensors", "graph.json", "plan.json", "weights.safetensors"}
FILES = DATA | {"manifest.json", "model.py", "rank0.py"}


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = nn.Linear(4, width), nn.Linear(width, 4)
        self.shift = torch.ones(4)  # unregistered: a constant of the trace

    def forward(self, x):
        return self.down(torch.relu(self.up(x))) + self.shift


X = torch.ones(4, 4)


def compile(where, module=None, args=None, policy="tp", config=None, **more) -> Path:
    """Compile only, into `where`."""
    return autopar.parallelize(
        module or Net(), args or {"x": X}, policy, config or {"plan_ngpus": 2}, gen_savedir=where, load_module=False, **more
    )


def one(where, module=None, **more) -> Path:
    return compile(where, module, policy="dp", config={"plan_ngpus": 1}, **more)


# ---- layout --------------------------------------------------------------------------------------------------------------------


def test_layout(tmp_path):
    folder = compile(tmp_path)
    assert folder == tmp_path / "test_savedir.Net" / "_"
    assert {p.name for p in folder.iterdir()} == FILES | {"rank1.py"}
    assert [p.name for p in folder.parent.iterdir()] == ["_"]
    assert read_manifest(folder)["files"].keys() == FILES - {"manifest.json"} | {"rank1.py"}


def test_instance_names_keep_compiles_apart(tmp_path):
    narrow, wide = (compile(tmp_path, Net(w), instance_name=f"w{w}") for w in (8, 16))
    assert (narrow, wide) == (tmp_path / "test_savedir.Net" / "w8", tmp_path / "test_savedir.Net" / "w16")
    assert load_file(narrow / "weights.safetensors")["up.weight"].shape == (8, 4)
    assert load_file(wide / "weights.safetensors")["up.weight"].shape == (16, 4)
    with pytest.raises(SavedirError, match=r"structure.up.weight: saved 'float32\[8, 4\]', now 'float32\[16, 4\]'"):
        compile(tmp_path, Net(16), instance_name="w8")
    for bad in ("", ".", "..", "a/b", ".hidden", "a b\n"):
        with pytest.raises(ConfigError, match=f"instance_name {re.escape(repr(bad))} must be a plain folder name"):
            compile(tmp_path, instance_name=bad)


def test_nothing_is_a_pickle(tmp_path):
    folder = compile(tmp_path, LM(), {"ids": IDS, "labels": IDS})
    for file in folder.iterdir():
        data = file.read_bytes()
        assert file.suffix in (".py", ".json", ".safetensors")
        assert not data.startswith((b"\x80", b"PK")), file
        with pytest.raises(ValueError):  # from pickletools: it is none
            list(pickletools.genops(data))
        if file.suffix == ".json":
            json.loads(data)


def test_load_module_false_needs_no_processes(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    folder = compile(tmp_path, config={"plan_ngpus": 4, "runtime_ngpus": 1024})
    assert not torch.distributed.is_initialized() and (folder / "rank3.py").exists()


def test_loaded_as_compiled(tmp_path):
    module = Net()
    made = autopar.parallelize(module, {"x": X}, "dp", gen_savedir=tmp_path)
    assert made(X).equal(module(X)) and made.state_dict().keys() == module.state_dict().keys()


# ---- weights -------------------------------------------------------------------------------------------------------------------


@pytest.mark.procs
def test_each_rank_reads_only_its_slices(tmp_path, monkeypatch):
    module = Net(64)
    folder = compile(tmp_path, module, policy=_columns)
    read, plain = [], SafetensorsReader.__call__

    def watched(self, name, slices=()):
        out = plain(self, name, slices)
        read.append((name, tuple(out.shape)))
        return out

    monkeypatch.setattr(SafetensorsReader, "__call__", watched)

    def rank(r):
        made = load(folder)
        assert made.up.weight.equal(module.up.weight[r * 32 : r * 32 + 32])
        return dict(read)

    for got in run_processes(rank, 2):
        assert got == {"up.weight": (32, 4), "up.bias": (32,), "down.weight": (4, 32), "down.bias": (4,), "constant0": (4,)}


def _columns(graph, config):
    plan = autopar.plan_from(graph, autopar.Mesh((("tp", 2),)), {"up/linear": {"tp": "n"}, "down/linear": {"tp": "k"}})
    return autopar.follow(graph, plan)


def test_a_module_on_the_meta_device(tmp_path):
    """Compiles without numbers; loading says what is missing, and takes them from elsewhere."""
    real = Net()
    with torch.device("meta"):
        empty = Net()
    empty.shift = real.shift
    folder = one(tmp_path, empty)
    assert not load_file(folder / "weights.safetensors")
    with pytest.raises(SavedirError) as e:
        load(folder)
    assert "weights.safetensors has no numbers for 'up.weight' and 3 more: the module was on the meta device" in str(e.value)
    assert "autopar.runtime.launch.load(folder, weights='model.safetensors')" in str(e.value)
    checkpoint = tmp_path / "model.safetensors"
    save_file(real.state_dict(), checkpoint)
    assert load(folder, weights=checkpoint)(X).equal(real(X))
    # a module with its weights asks for them to be saved; one on meta takes those that are there
    with pytest.raises(SavedirError, match="weights: saved 'none', now 'saved'"):
        one(tmp_path, real)
    one(tmp_path, real, reuse="moo")
    assert one(tmp_path, empty) == folder
    assert load(folder)(X).equal(real(X))


def test_weights_that_share_memory_are_saved_whole(tmp_path):
    module = Net()
    base = torch.arange(32.0)
    module.up.weight = nn.Parameter(base[:32].view(8, 4))
    module.down.weight = nn.Parameter(base.view(4, 8))
    module.up.bias = nn.Parameter(torch.ones(1).expand(8))
    made = load(one(tmp_path, module))
    assert made(X).equal(module(X))


# ---- killed compiles -----------------------------------------------------------------------------------------------------------


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def after(fn):
    def run(*args, **kwargs):
        fn(*args, **kwargs)
        die()

    return run


def half_written(self, text):
    with self.open("w") as f:
        f.write(text[: len(text) // 2])
    die()


def second_rename(self, target, plain=Path.rename):
    """Dies between moving the old folder away and moving the new one in."""
    if self.name.startswith("._.tmp") and not Path(target).exists():
        die()
    return plain(self, target)


MOMENTS = {
    "while tracing": (driver, "trace", die),
    "after the graph": (driver, "save_graph", after(driver.save_graph)),
    "after the weights": (driver, "save_weights", after(driver.save_weights)),
    "in a file": (Path, "write_text", half_written),
    "before the rename": (savedir, "_swap", die),
    "between the renames": (Path, "rename", second_rename),
    "after the rename": (savedir, "_swap", after(savedir._swap)),
}


def in_child(fn) -> int:
    """Run fn in a forked process and return how it ended. NB: _exit, so that nothing of pytest is torn down twice."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            fn()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check_whole(folder: Path, *modules: nn.Module) -> None:
    """The folder is absent, or loads and computes what one of the modules does."""
    if read_manifest(folder) is None:
        with pytest.raises(SavedirError, match="holds no complete generated code"):
            load(folder)
    else:
        out = load(folder)(X)
        assert any(out.equal(m(X)) for m in modules)


@pytest.mark.procs
@pytest.mark.parametrize("before", ["nothing", "an older one"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(moment, before, tmp_path, monkeypatch):
    old, new = Net(), Net(16)
    if before != "nothing":
        one(tmp_path, old)
    folder = tmp_path / "test_savedir.Net" / "_"

    def work():
        monkeypatch.setattr(*MOMENTS[moment])
        one(tmp_path, new, reuse="override")

    assert in_child(work) == -signal.SIGKILL
    check_whole(folder, old, new)
    if before == "nothing" and moment != "after the rename":
        assert read_manifest(folder) is None
    if before != "nothing" and moment not in ("between the renames", "after the rename"):
        assert load(folder)(X).equal(old(X))
    one(tmp_path, new, reuse="moo")
    assert load(folder)(X).equal(new(X))
    assert [p.name for p in folder.parent.iterdir()] == ["_"] or moment == "after the rename"  # nothing is left about
    one(tmp_path, new, reuse="override")
    assert [p.name for p in folder.parent.iterdir()] == ["_"]


@pytest.mark.procs
def test_killed_at_any_time(tmp_path):
    old, new, rng = Net(), Net(16), random.Random(0)
    folder = one(tmp_path, old)
    start = time.monotonic()
    one(tmp_path, old, reuse="override")
    takes = time.monotonic() - start
    for _ in range(12):
        pid = os.fork()
        if pid == 0:
            try:
                torch.set_num_threads(1)
                for _ in range(50):
                    one(tmp_path, new, reuse="override")
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, 4 * takes))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        check_whole(folder, old, new)
    one(tmp_path, new, reuse="override")
    assert load(folder)(X).equal(new(X)) and [p.name for p in folder.parent.iterdir()] == ["_"]


@pytest.mark.procs
def test_two_compiles_at_once(tmp_path):
    modules = [Net(), Net(16)]
    one(tmp_path, modules[0])

    def rank(r):
        for _ in range(15):
            one(tmp_path, modules[r], reuse="override")

    run_processes(rank, 2, timeout=60, connect=False)
    folder = tmp_path / "test_savedir.Net" / "_"
    check_whole(folder, *modules)
    assert [p.name for p in folder.parent.iterdir()] == ["_"]


# ---- places that cannot be written ---------------------------------------------------------------------------------------------


class Untraceable(nn.Module):
    def forward(self, x):
        raise AssertionError("traced before the folder was tried")


@pytest.fixture
def mounted(tmp_path):
    """mount(options) -> a folder with a file system of its own."""
    made = []

    def mount(options: str) -> Path:
        where = tmp_path / "mounted"
        where.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", where], capture_output=True).returncode:
            pytest.skip("this user may not mount a file system; the errors are also tested by raising them")
        made.append(where)
        return where

    yield mount
    for where in made:
        subprocess.run(["umount", where], check=True)


def test_read_only(mounted):
    where = mounted("ro")
    with pytest.raises(
        SavedirError, match=rf"cannot write generated code to {where}/.*: Read-only file system; choose another gen_savedir"
    ):
        compile(where, Untraceable())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SavedirError, match="Permission denied; choose another gen_savedir"):
        compile(tmp_path, Untraceable())
    tmp_path.chmod(0o700)


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SavedirError, match=r"cannot write generated code to .*/file/.*: Not a directory; choose another gen_savedir"):
        compile(tmp_path / "file", Untraceable())
    folder = tmp_path / "test_savedir.Untraceable"
    folder.mkdir()
    (folder / "_").write_text("x")
    with pytest.raises(SavedirError, match=r"Not a directory"):
        compile(tmp_path, Untraceable())
    assert (folder / "_").read_text() == "x"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_refused_before_anything_is_traced(code, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(savedir.tempfile, "TemporaryFile", refuse)
    with pytest.raises(SavedirError, match=rf"cannot write generated code to .*: {os.strerror(code)}; .*choose another gen_savedir"):
        compile(tmp_path, Untraceable())


def test_full(mounted):
    """The disk fills up while the weights are written: an error, nothing left about, and what was there before still loads."""
    where, small = mounted("size=256k"), Net()
    folder = one(where, small)
    with pytest.raises(SavedirError, match=r"No space left on device.*; free some space or choose another gen_savedir"):
        one(where, Net(16384), reuse="moo")
    assert [p.name for p in folder.parent.iterdir()] == ["_"]
    assert load(folder)(X).equal(small(X))
    one(where, Net(16), reuse="moo")


@pytest.mark.parametrize("file", ["graph.json", "weights.safetensors", "plan.json", "model.py", "rank0.py", "manifest.json"])
def test_full_at_any_file(file, tmp_path, monkeypatch):
    small = Net()
    folder = one(tmp_path, small)
    plain = {n: getattr(Path, n) for n in ("write_text", "write_bytes", "replace")}

    def guarded(name):
        def write(self, *args, **kwargs):
            if file.partition(".")[0] in (self.name + str(args[:1]) if name == "replace" else self.name):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return plain[name](self, *args, **kwargs)

        return write

    for name in plain:
        monkeypatch.setattr(Path, name, guarded(name))
    if file.startswith("weights"):
        monkeypatch.setattr(driver, "save_weights", lambda m, g, path: path.write_bytes(b""))
    with pytest.raises(SavedirError, match="No space left on device; free some space or choose another gen_savedir"):
        one(tmp_path, Net(16), reuse="moo")
    monkeypatch.undo()
    assert [p.name for p in folder.parent.iterdir()] == ["_"]
    assert load(folder)(X).equal(small(X))


# ---- damaged folders -----------------------------------------------------------------------------------------------------------

DAMAGE = {
    "missing": (Path.unlink, "is incomplete: {file} is missing; compile again with reuse='override'"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "is damaged: {file} has "),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", sorted(DATA))
def test_a_damaged_folder(file, how, tmp_path):
    module = Net()
    folder = one(tmp_path, module)
    change, message = DAMAGE[how]
    change(folder / file)
    for use in (lambda: load(folder), lambda: one(tmp_path, module)):
        with pytest.raises(SavedirError, match=re.escape(f"{folder} {message.format(file=file)}")):
            use()
    for reuse in ("moo", "graph", "override"):
        one(tmp_path, module, reuse=reuse)
        assert load(folder)(X).equal(module(X))
        change(folder / file)


MANIFESTS = [
    ("{", "manifest.json is damaged"),
    ("\udcff", "manifest.json is damaged"),
    ("[]", "manifest.json is no manifest of autopar; this version reads format 1"),
    ('{"format": 7}', "manifest.json has format 7; this version reads format 1. Compile with reuse='override'"),
    ('{"format": 1}', "manifest.json has format 1; this version reads format 1"),
]


@pytest.mark.parametrize(("text", "message"), MANIFESTS)
def test_a_damaged_manifest(text, message, tmp_path):
    folder = one(tmp_path)
    (folder / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    for use in (lambda: load(folder), lambda: one(tmp_path)):
        with pytest.raises(SavedirError, match=re.escape(message)):
            use()
    one(tmp_path, reuse="moo")
    assert load(folder)


def test_an_edit_that_does_not_parse(tmp_path):
    """Code may be edited while debugging; then it is loaded as it is."""
    module = Net()
    folder = one(tmp_path, module)
    text = (folder / "model.py").read_text()
    (folder / "model.py").write_text(text.replace("relu(", "sigmoid("))
    assert load(folder)(X).equal(module.down(torch.sigmoid(module.up(X))) + 1)
    (folder / "model.py").write_text(text + "\ndef (")
    line = text.count("\n") + 2
    with pytest.raises(SavedirError, match=rf"model.py:{line} does not parse: .*; undo the edit or compile again with reuse='override'"):
        load(folder)


def test_no_folder(tmp_path):
    with pytest.raises(SavedirError, match=r"none holds no complete generated code \(no manifest.json\); compile it first"):
        load(tmp_path / "none")
    folder = one(tmp_path)
    shutil.rmtree(folder)
    with pytest.raises(SavedirError, match="holds no complete generated code"):
        load(folder)
