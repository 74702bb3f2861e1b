"""What a person watching sees: bar and lines, JSON lines, TensorBoard and Weights & Biases read back, profiles.
The loggers are driven by hand, and in the last part by real runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autopar.train import console
from autopar.train.loggers import ConsoleLogger, JsonLinesLogger, Loggers, TensorBoardLogger, WandbLogger
from autopar.train.profiler import Profiler
from autopar.train.spec import ProfileSpec
from tests import train_cases as cases
from tests.procs import run_processes

RUN = {"args": {"model": {"type": "m.GPT"}, "seed": 7}, "finished_train_steps": 0, "total_train_steps": 25, "device": "2 x cpu"}
STEP = {
    "train_loss": 1.25, "gnorm": 0.5, "lr": 0.001, "epoch": 3, "step_s": 0.5, "tokens_per_s": 12345.6, "samples_per_s": 8.0,
    "tflops": 41.25, "mfu": 0.125, "memory_gb": 3.5, "data_wait_s": 0.125,
}  # fmt: skip
SHOWN = "loss 1.2500  gnorm 0.5  lr 0.001  12,346 tok/s  41.2 TFLOP/s  MFU 12.5%  mem 3.50 GB  data 25%"


def drive(logger, steps: int = 25, run: dict = RUN, status: str = "finished") -> None:
    logger.setup(run)
    for step in range(run["finished_train_steps"] + 1, steps + 1):
        logger.log_metrics({**STEP, "train_loss": 1 / step}, step, tag="train")
        if step == 20:
            logger.log_metrics({"val_loss": 0.75}, step, tag="val")
    logger.flush()
    logger.finalize(status)


# -- the console


def test_line():
    assert console.describe(STEP) == SHOWN
    assert console.describe({"train_loss": 1.0, "samples_per_s": 80.5, "step_s": 1.0, "accuracy": 0.25}) == (
        "loss 1.0000  80.5 samples/s  accuracy 0.25"
    )
    assert console.describe({"val_loss": 2.0}) == "val_loss 2.0000"


def test_plain_lines(capsys):
    drive(ConsoleLogger(every_n_steps=10))
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "training from step 0 to 25 on 2 x cpu"
    assert [line.split("  ")[1] for line in lines if "  step" in line] == ["step 1/25", "step 10/25", "step 20/25", "step 25/25"]
    assert lines[1] == f"epoch 3  step 1/25  {SHOWN.replace('1.2500', '1.0000')}"
    assert "val after step 20: val_loss 0.7500" in lines
    assert lines[-1].startswith("finished after step 25: 25 steps in ")
    assert err == ""


def test_the_last_step_is_shown_however_a_run_ends(capsys):
    resumed = {**RUN, "finished_train_steps": 9, "total_train_steps": None}
    drive(ConsoleLogger(every_n_steps=10), steps=13, run=resumed, status="interrupted")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training from step 9 on 2 x cpu"
    assert [line.split("  ")[1] for line in lines if "  step" in line] == ["step 10", "step 13"]
    assert lines[-1].startswith("interrupted after step 13: 4 steps in ")


@contextlib.contextmanager
def terminal(columns: int) -> Iterator[tuple[int, list[bytes]]]:
    """(a terminal to write to, what was written to it)."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30 if columns else 0, columns, 0, 0))
    heard: list[bytes] = []

    def listen() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(ours, 4096):
                heard.append(data)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield theirs, heard
    finally:
        os.close(theirs)
        thread.join(10)
        os.close(ours)


@pytest.mark.parametrize("columns", [160, 0])
def test_bar_on_a_terminal(monkeypatch, columns):
    now = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    with terminal(columns) as (fd, heard), os.fdopen(os.dup(fd), "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(sys, "stdout", screen)
        logger = ConsoleLogger()
        logger.setup(RUN)
        for step in range(1, 26):
            now[0] += 0.06
            logger.log_metrics({**STEP, "train_loss": 1 / step}, step, tag="train")
            if step == 20:
                logger.log_metrics({"val_loss": 0.75}, step, tag="val")
        logger.finalize("finished")
        monkeypatch.undo()
    text = b"".join(heard).decode()
    drawn = [line for line in text.replace("\r", "\n").splitlines() if "/25" in line and "loss" in line]
    assert 10 <= len({line.split("|")[0] for line in drawn}) <= 14, "drawn every second step, by the clock"
    assert "epoch 3  step 25/25 |████████████|" in drawn[-1] and ", loss 0.0400  gnorm 0.5  lr 0.001  12,346 tok/s" in drawn[-1]
    assert "val after step 20: val_loss 0.7500\r\n" in text and "finished after step 25" in text


def test_no_bar_if_it_is_not_wanted(monkeypatch):
    with terminal(100) as (fd, heard), os.fdopen(os.dup(fd), "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(sys, "stdout", screen)
        drive(ConsoleLogger(progress_bar=False, every_n_steps=25))
        monkeypatch.undo()
    lines = b"".join(heard).decode().splitlines()
    assert len(lines) == 5 and lines[3].startswith("epoch 3  step 25/25  loss 0.0400")


# -- JSON lines


def test_json_lines(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    drive(JsonLinesLogger(path), steps=3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": s, "tag": "train", **STEP, "train_loss": 1 / s} for s in (1, 2, 3)]


def test_json_lines_go_on_after_a_kill(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "tag": "train"}\n{"step": 2, "ta')
    logger = JsonLinesLogger(str(path))
    logger.setup(RUN)
    logger.log_metrics({"train_loss": float("nan"), "gnorm": torch.tensor(2.0), "n": 3}, 2, tag="train")
    assert path.read_text().splitlines()[2] == '{"step": 2, "tag": "train", "train_loss": null, "gnorm": 2.0, "n": 3}', "before any flush"
    logger.finalize("finished")
    assert path.read_text().startswith('{"step": 1, "tag": "train"}\n{"step": 2, "ta\n')


# -- TensorBoard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(name="a", root_dir=str(tmp_path))
    drive(logger)
    found = scalars(tmp_path / "a")
    assert sorted(found) == sorted([*(f"train/{name}" for name in STEP), "val/val_loss"])
    assert found["train/train_loss"] == [(s, pytest.approx(1 / s)) for s in range(1, 26)]
    assert found["val/val_loss"] == [(20, 0.75)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "a"))
    events.Reload()
    assert b'"type": "m.GPT"' in events.Tensors("args/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_resumed(tmp_path):
    """Steps after the checkpoint that were lost are shown once: as the resumed run made them."""
    pytest.importorskip("tensorboard")
    drive(TensorBoardLogger("a", tmp_path), steps=9)
    time.sleep(1.1)  # event files are ordered by the second in their names
    drive(TensorBoardLogger("a", tmp_path), steps=12, run={**RUN, "finished_train_steps": 7})
    assert [s for s, _ in scalars(tmp_path / "a")["train/lr"]] == list(range(1, 13))


# -- Weights & Biases


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(name="first", root_dir=tmp_path, project="p", mode="offline", tags=["t"])
    logger.setup(RUN)
    for step in (1, 2):
        logger.log_metrics({"train_loss": 0.125 * step, "lr": 0.5}, step, tag="train")
    logger.log_metrics({"val_loss": 0.375}, 2, tag="val")
    logger.flush()
    run = logger.run
    assert run.name == "first" and dict(run.config) == RUN["args"]
    assert [run.summary[k] for k in ("train/train_loss", "val/val_loss", "step")] == [0.25, 0.375, 2]
    logger.finalize("finished")
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    words, until = (b"train/train_loss", b"0.125", b"0.25", b"train/lr", b"val/val_loss", b"0.375", b"m.GPT"), time.monotonic() + 30
    while not all(word in file.read_bytes() for word in words):  # wandb's own process writes it, a little later
        assert time.monotonic() < until, [word for word in words if word not in file.read_bytes()]
        time.sleep(0.05)


# -- what goes wrong


@pytest.mark.parametrize(
    "made, missing, extra",
    [(TensorBoardLogger, "tensorboard.compat.proto.summary_pb2", "tensorboard"), (WandbLogger, "wandb", "wandb")],
)
def test_a_missing_package_names_the_extra(monkeypatch, made, missing, extra):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{made.__name__} needs the package {extra}, .*pip install 'autopar\[{extra}\]'"):
        made()


class Failing:
    def __init__(self, at: str):
        self.at, self.calls = at, []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.at:
            raise OSError("No space left on device")

    def setup(self, run):
        self._call("setup")

    def log_metrics(self, metrics, step, *, tag):
        self._call("log_metrics")

    def flush(self):
        self._call("flush")

    def finalize(self, status):
        self._call("finalize")


@pytest.mark.parametrize("at", ["log_metrics", "flush", "finalize"])
def test_a_logger_that_fails_is_left_out(tmp_path, caplog, at):
    failing, whole = Failing(at), Failing("")
    with caplog.at_level(logging.WARNING):
        drive(Loggers([failing, JsonLinesLogger(tmp_path / "a"), whole]))
    assert failing.calls.count(at) == 1 and failing.calls[-1] == at
    assert len(whole.calls) == 1 + 26 + 1 + 1 and len((tmp_path / "a").read_text().splitlines()) == 26
    assert [r.message for r in caplog.records] == [
        f"Failing.{at} failed, and is left out from now on: OSError: No space left on device",
    ]


def test_a_logger_that_cannot_start_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Loggers([JsonLinesLogger(tmp_path / "file" / "log.jsonl")]).setup(RUN)


def test_packages_are_imported_only_for_their_loggers():
    """And `import autopar` brings nothing at all, not even torch."""
    script = """
import sys
import autopar, autopar.train
assert "torch" not in sys.modules and "numpy" not in sys.modules
import autopar.train.loggers, autopar.train.spec
assert not {"torch", "tensorboard", "wandb", "transformers"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# -- the profiler


def steps(profiler: Profiler, first: int, last: int) -> None:
    for step in range(first, last + 1):
        torch.ones(4, 4) @ torch.ones(4, 4)
        profiler.step(step)


def traces(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.json"))


def test_profiles_of_k_steps_every_n(tmp_path):
    profiler = Profiler(ProfileSpec(every_n_train_steps=4, active_steps=2, folder=str(tmp_path)), rank=3)
    steps(profiler, 1, 12)
    profiler.close()
    assert traces(tmp_path) == ["rank3/steps5-6.json", "rank3/steps9-10.json"]
    names = [e.get("name") for e in json.loads((tmp_path / "rank3/steps5-6.json").read_text())["traceEvents"]]
    assert names.count("aten::mm") == 2, "one of each step"


def test_a_profile_that_the_run_cuts_short(tmp_path):
    profiler = Profiler(ProfileSpec(every_n_train_steps=4, active_steps=3, folder=str(tmp_path)), rank=0)
    steps(profiler, 6, 9)  # as after a resume
    profiler.close()
    profiler.close()
    assert traces(tmp_path) == ["rank0/steps9-9.json"]


def test_no_profile_unless_asked_for(tmp_path):
    profiler = Profiler(ProfileSpec(folder=str(tmp_path / "p")), rank=0)
    steps(profiler, 1, 12)
    profiler.close()
    assert not (tmp_path / "p").exists()


def test_profiling_that_fails_ends_with_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    spec = ProfileSpec(every_n_train_steps=2, folder=str(tmp_path / "file"), memory_snapshot=True)
    with caplog.at_level(logging.WARNING):
        profiler = Profiler(spec, rank=0, device="cpu")
        steps(profiler, 1, 8)
        profiler.close()
    assert [r.message.partition(":")[0] for r in caplog.records] == [
        "profile.memory_snapshot is for CUDA devices; there will be none on cpu",
        "profiling ends",
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
def test_memory_snapshot(tmp_path):
    spec = ProfileSpec(every_n_train_steps=2, folder=str(tmp_path), memory_snapshot=True)
    profiler = Profiler(spec, rank=0, device="cuda")
    steps(profiler, 1, 3)
    assert (tmp_path / "rank0/steps3-3.pickle").stat().st_size > 0


# -- real runs


def gpt_args(folder: Path, **changes) -> dict:
    log = [
        {"type": "TensorBoardLogger", "args": {"name": "run", "root_dir": str(folder / "tb")}},
        {"type": "JsonLinesLogger", "args": {"path": str(folder / "log.jsonl")}},
    ]
    data = {"type": f"{cases.NAME}.ByteDataset", "train_args": {"size": 24}, "val_args": {"size": 6, "seed": 1}}
    model = {"type": f"{cases.NAME}.TinyGPT"}
    every = {"max_epochs": 1, "val_every_n_train_steps": 4, "val_every_n_epochs": None, "log_progress_every_n_train_steps": 2}
    return cases.mlp_args(folder, **{"log": log, "dataset": data, "model": model, **every, **changes})


def test_what_a_run_on_two_ranks_leaves(tmp_path):
    """24 samples, micro batches of 2 on 2 ranks: 6 steps, with validation after the fourth."""
    pytest.importorskip("tensorboard")

    def rank_main(rank: int) -> tuple:
        trainer, seen = cases.train(gpt_args(tmp_path))
        return len(trainer.loggers), seen.losses, seen.norms, seen.val

    (count, losses, norms, val), (others, *_) = run_processes(rank_main, 2, timeout=120)
    assert (count, others) == (3, 0), "console, TensorBoard and JSON lines, on rank 0 alone"
    found = scalars(tmp_path / "tb/run")
    names = ["train_loss", "gnorm", "lr", "epoch", "step_s", "tokens_per_s", "samples_per_s", "tflops", "memory_gb", "data_wait_s"]
    assert sorted(found) == sorted([*(f"train/{n}" for n in names), "val/val_loss"])
    assert found["train/train_loss"] == [(s, pytest.approx(loss)) for s, loss in enumerate(losses, 1)] and len(losses) == 6
    assert found["train/gnorm"] == [(s, pytest.approx(norm)) for s, norm in enumerate(norms, 1)]
    assert found["val/val_loss"] == [(s, pytest.approx(loss)) for s, loss in val.items()]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["train_loss"] for r in rows if r["tag"] == "train"] == losses
    for r in (r for r in rows if r["tag"] == "train"):
        assert set(r) == {"step", "tag", *names}
        assert r["tokens_per_s"] * r["step_s"] == pytest.approx(2 * 2 * (cases.T + 1)), "both ranks' tokens"
        assert r["samples_per_s"] * r["step_s"] == pytest.approx(4)
        assert 0 <= r["data_wait_s"] <= r["step_s"] and r["tflops"] > 0


def test_lines_of_a_run(tmp_path, capsys):
    cases.train(gpt_args(tmp_path, log=[], val_every_n_train_steps=5))
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"training from step 0 to 12 on 1 x cpu, 0\.00\d+ MFLOP per token", lines[0])
    shown = [re.match(r"(?:epoch 0  )?(step \d+/12|val after step \d+|finished after step 12)", line)[1] for line in lines[1:]]
    assert [s for s in shown if "val" not in s] == [f"step {s}/12" for s in (1, 2, 4, 6, 8, 10, 12)] + ["finished after step 12"]
    assert [s for s in shown if "val" in s] == ["val after step 5", "val after step 10"]
    step = r"epoch 0  step 2/12  loss \d\.\d{4}  gnorm \S+  lr 0\.1  [\d,]+ tok/s  \S+ TFLOP/s  mem \d\.\d\d GB  data \d+%"
    assert re.fullmatch(step, lines[2]), "no MFU on a device that is not in the table"


def test_profiles_of_every_rank(tmp_path):
    profile = {"every_n_train_steps": 2, "active_steps": 1, "folder": str(tmp_path / "p")}
    run_processes(lambda rank: bool(cases.train(gpt_args(tmp_path, log=[], profile=profile, max_train_steps=4))), 2, timeout=120)
    assert traces(tmp_path / "p") == ["rank0/steps3-3.json", "rank1/steps3-3.json"]


def test_a_full_disk_of_the_logger_does_not_end_training(tmp_path, caplog):
    log = [{"type": "JsonLinesLogger", "args": {"path": "/dev/full"}}]
    with caplog.at_level(logging.WARNING):
        trainer, _ = cases.train(gpt_args(tmp_path, log=log))
    assert trainer.train_status.finished_train_steps == 12
    assert [r.message.partition(":")[0] for r in caplog.records] == ["JsonLinesLogger.log_metrics failed, and is left out from now on"]
