"""autopar train and torchrun -m autopar.cli.train: real launches from a YAML file, their output and exit codes.
Must not know how a run is trained; the losses are compared with a plain loop.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from autopar.cli import train
from autopar.cli.main import main
from tests import train_cases as cases
from tests.procs import run_processes

ROOT = Path(__file__).parent.parent
AUTOPAR = [sys.executable, "-m", "autopar", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "autopar.cli.train"]
YAML = """\
compute_config: {plan_ngpus: 2, runtime_ngpus: 2, use_end2end: true}
seed: 7
micro_batch_size: 2
grad_accumulation_steps: 2
max_epochs: 5
model: {type: tests.train_cases.MLP, args: {dim: 16}}
optimizer: {type: torch.optim.SGD, args: {lr: 0.1}}
dataset: {type: tests.train_cases.SimpleDataset, train_args: {dim: $(model.args.dim), size: 10}}
dataset_sampler: {train_args: {shuffle: false}}
log: [{type: JsonLinesLogger, args: {path: log.jsonl}}]
checkpoint: {no_save: true}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run.yaml").write_text(YAML)
    return tmp_path


def environment():
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


def launch(folder, command, *words, timeout=240):
    return subprocess.run(
        [*command, "-f", "run.yaml", *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def plain_losses(dim, epochs):
    torch.manual_seed(7)
    model, data = cases.MLP(dim), cases.SimpleDataset(dim, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(epochs):
        for window in ((0, 2), (4, 6), (8,)):  # the last one is short
            micro = [model(torch.utils.data.default_collate([data[i], data[i + 1]]))[0] for i in window]
            loss = sum(micro) / len(micro)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.procs
@pytest.mark.parametrize("command", [AUTOPAR, TORCHRUN], ids=["autopar", "torchrun"])
def test_a_run_from_yaml_and_the_command_line(folder, command):
    done = launch(folder, command, "--max_epochs", "2", "--model.args.dim", "8", "--checkpoint.save_dir", "$(gen_savedir)/x")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["train_loss"] for r in rows if r["tag"] == "train"] == pytest.approx(plain_losses(8, 2), abs=1e-5)
    assert (folder / ".autopar/tests.train_cases.MLP/_/rank1.py").exists()


@pytest.mark.procs
def test_an_error_ends_all_ranks_in_one_line(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def rank_main(rank):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            return train.main(["-f", "run.yaml", "--model.args.dmi", "8"], launch=True), said.getvalue()

    codes, said = zip(*run_processes(rank_main, 2, connect=False), strict=True)
    assert codes == (2, 2) and [text.count("\n") for text in said] == [1, 1]
    assert said[0].startswith("autopar: error: rank 0: model.args.dmi: MLP has no argument 'dmi': did you mean 'dim'?")
    assert said[1].startswith("autopar: error: rank 1: rank 0 failed to compile: ")


def test_errors_of_settings_come_before_any_process(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RANK", raising=False)
    assert main(["train", "-f", "run.yaml", "--max_epoch", "2"]) == 2
    assert main(["train", "-f", "run.yaml", "--global_batch_size", "3"]) == 2
    assert main(["train", "-f", "run.yaml", "--max-restarts", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 3
    assert train.main(["-f", "run.yaml"]) == 2  # without torchrun, and not by `autopar train`
    assert "run_mode 'run' on 2 devices needs 2 processes" in capsys.readouterr().err


def never(trainer):
    raise AssertionError("after_setup is called in run mode only")


def test_compile_needs_no_processes(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RANK", raising=False)
    words = ["--run_mode", "compile", "--compute_config.runtime_ngpus", "6", "--hook.after_setup", f"{__name__}.never"]
    assert main(["train", "-f", "run.yaml", *words]) == 0
    assert (folder / ".autopar/tests.train_cases.MLP/_/rank1.py").exists() and not (folder / "log.jsonl").exists()


@pytest.mark.procs
@pytest.mark.slow
def test_a_signal_to_the_launcher_reaches_the_run(folder):
    process = subprocess.Popen(
        [*AUTOPAR, "-f", "run.yaml", "--max_epochs", "100000", "--checkpoint.no_save", "false"],
        cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until = time.monotonic() + 120
    while time.monotonic() < until and not (folder / "log.jsonl").exists():
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert (folder / "checkpoints/last").exists(), output
