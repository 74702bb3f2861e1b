"""A rank is killed at a random moment under `torchrun --max-restarts 3`: training finishes, equal to the run that was never killed.
`pytest -m slow tests/test_train_kill.py -s` does it ten times more, and prints each.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from autopar.train.merged import open_source
from tests.procs import run_processes
from tests.train_cases import mlp_args

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 24, 3


def settings(root, folder, **checkpoint):
    args = mlp_args(
        folder,
        gen_savedir=str(root / "gen"),
        compute_config={"plan_ngpus": 1, "runtime_ngpus": 2, "use_end2end": True, "use_zero": True},
        model={"type": "tests.train_cases.MLP", "args": {"dim": 8, "dropout": 0.2}},
        optimizer={"type": "torch.optim.AdamW", "args": {"lr": 0.02}, "clip_gnorm": 0.5},
        dataset={"type": "tests.kill_cases.Slow", "train_args": {"size": 44}},
        dataset_sampler={"train_args": {"shuffle": True}},
        hook={"type": "tests.kill_cases.Diary", "args": {"folder": str(folder)}},
        max_epochs=None,
        max_train_steps=STEPS,
    )
    settings = {"no_save": False, "every_n_train_steps": EVERY, "keep_last_n_checkpoints": 2, "resume_from": "last", **checkpoint}
    return {**args, "checkpoint": {**args["checkpoint"], **settings}}


def train(args):
    from autopar.train import Trainer

    Trainer(args).run()


def diary(folder, rank):
    """(pid, attempt, step) of all lines."""
    file = folder / f"rank{rank}"
    lines = file.read_text().splitlines() if file.exists() else []
    return [tuple(map(int, line.split())) for line in lines if len(line.split()) == 3]


def killed_run(root, folder, moment, rank, **checkpoint):
    """Run under torchrun, and kill a rank `moment` (0 to 1) of the way through training.

    Returns (steps of the last attempt, number of the last attempt, after which step the rank was killed).
    """
    folder.mkdir()
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(settings(root, folder, **checkpoint)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "output").open("w") as out:
        run = subprocess.Popen([*launcher, "-m", "autopar.cli.train", "-f", str(config)], env=env, stdout=out, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + 200
            while run.poll() is None and time.monotonic() < until and not (lines := diary(folder, rank)):
                time.sleep(0.01)
            # NB: by steps and a part of one, so that a slow machine is no matter: before, in, and after saves
            step, part = divmod(moment * STEPS, 1)
            while run.poll() is None and lines[-1][2] < int(step):
                time.sleep(0.002)
                lines = diary(folder, rank)
            time.sleep(part * 0.04)
            if run.poll() is None:
                os.kill(lines[-1][0], signal.SIGKILL)
            assert run.wait(200) == 0, (folder / "output").read_text()[-4000:]
        finally:
            run.kill()
    seen = diary(folder, rank)
    return [s for _, a, s in seen if a == seen[-1][1]], seen[-1][1], lines[-1][2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was never killed."""
    root = tmp_path_factory.mktemp("kill")
    (root / "whole").mkdir()
    run_processes(lambda rank: train(settings(root, root / "whole")), 2, 120)
    return root


def compare(root, folder):
    want, got = (open_source(f / "checkpoints" / "last") for f in (root / "whole", folder))
    assert want.head["step"] == got.head["step"] == STEPS
    want, got = (s.whole().state_dicts() for s in (want, got))
    assert want[0].keys() == got[0].keys() and all(torch.equal(t, got[0][n]) for n, t in want[0].items())
    for i, state in want[1]["state"].items():
        assert all(torch.equal(t, got[1]["state"][i][k]) for k, t in state.items())
    assert sorted(p.name for p in (folder / "checkpoints").iterdir())[-2:] == ["best", "last"]


@pytest.mark.procs
def test_a_killed_rank_changes_nothing(whole):
    steps, attempts, at = killed_run(whole, whole / "once", 0.7, 1, async_save=True)
    compare(whole, whole / "once")
    assert attempts == 1 and steps[-1] == STEPS
    assert 0 < steps[0] <= at and steps[0] % EVERY == 0, "it went on from the last checkpoint, not from the start"


@pytest.mark.slow
@pytest.mark.procs
def test_killed_at_ten_random_moments(whole):
    dice = random.Random()
    for n in range(10):
        moment, rank = dice.random(), dice.randrange(2)
        checkpoint = {"async_save": dice.random() < 0.5, "save_type": dice.choice(["dcp", "sharded", "deduped"])}
        start = time.monotonic()
        steps, attempts, at = killed_run(whole, whole / str(n), moment, rank, **checkpoint)
        compare(whole, whole / str(n))
        seconds = time.monotonic() - start
        print(f"{n}: rank {rank} killed after step {at}, {checkpoint}: {attempts} restarts, from step {steps[0]}; equal ({seconds:.0f} s)")
