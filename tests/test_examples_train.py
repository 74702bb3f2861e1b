"""The examples of the trainer run from their YAML files: a few steps each, the GPT's beside its loop in plain PyTorch.
Must not know what is in the files.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.procs


def run(folder, *command):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def losses(file):
    return [row["train_loss"] for row in map(json.loads, file.read_text().splitlines()) if "train_loss" in row]


def test_gpt(tmp_path):
    gpt, one = str(EXAMPLES / "gpt/gpt.yaml"), str(EXAMPLES / "gpt/one.yaml")
    run(tmp_path, str(EXAMPLES / "gpt/plain.py"), "--steps", "3", "--losses", "plain.jsonl")
    run(tmp_path, "-m", "autopar", "train", "-f", gpt, "--max_train_steps", "2")
    run(tmp_path, "-m", "autopar", "train", "-f", gpt, "-f", one, "--max_train_steps", "3")
    assert losses(tmp_path / "runs/gpt/log.jsonl") == pytest.approx(losses(tmp_path / "plain.jsonl"), rel=1e-5)


def test_llama(tmp_path):
    pytest.importorskip("tokenizers")
    one = ["--compute_config.plan_ngpus", "1", "--compute_config.runtime_ngpus", "1", "--global_batch_size", "8"]
    run(tmp_path, "-m", "autopar", "train", "-f", str(EXAMPLES / "llama.yaml"), *one, "--max_train_steps", "2", "--max_val_steps", "1")
    assert len(losses(tmp_path / "runs/llama/log.jsonl")) == 2
