"""`make demo`: train the GPT as plain PyTorch, then with `autopar train` on two processes, go on with that on one, and compare the losses.
Must not import torch: it only launches the runs and reads their logs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tqdm import tqdm

HERE = Path(__file__).parent
RUN = Path("runs/gpt")  # as gpt.yaml says
STEPS, RESUMED_AT = 30, 20


def run(title: str, command: list[str], log: Path, first: int, last: int) -> list[dict]:
    """Run a training command with a progress bar fed by its log. Exits with the command's output if it fails."""
    print(f"{title}: {' '.join(c.replace(sys.executable, 'python') for c in command)}", flush=True)
    rows: list[dict] = []
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=subprocess.STDOUT)
        quiet = not sys.stderr.isatty()
        with tqdm(total=last - first + 1, desc=title, unit="step", disable=quiet) as bar:
            done = False
            while not done:
                done = process.poll() is not None
                new = [r for r in read(log) if first <= r["step"] <= last][len(rows) :]
                for row in new:
                    bar.set_postfix(loss=f"{row['train_loss']:.4f}", refresh=False)
                    bar.update()
                    if quiet and row["step"] % 10 == 0:
                        print(f"{title}: step {row['step']} of {last}, loss {row['train_loss']:.4f}", flush=True)
                rows += new
                time.sleep(0 if done else 0.2)
        output.seek(0)
        text = output.read()
    if process.returncode or len(rows) != last - first + 1:
        sys.exit(f"{title} failed with exit code {process.returncode}:\n{text}")
    return rows


def read(log: Path) -> list[dict]:
    """The training steps in a log. NB: its last line may be half written."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [row for row in map(json.loads, lines) if "train_loss" in row]


def main() -> None:
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir(parents=True)
    train = [sys.executable, "-m", "autopar", "train", "-f", str(HERE / "gpt.yaml")]
    log = RUN / "log.jsonl"
    plain = [sys.executable, str(HERE / "plain.py"), "--steps", str(STEPS), "--losses", str(RUN / "plain.jsonl")]
    want = run("plain PyTorch, 1 process", plain, RUN / "plain.jsonl", 1, STEPS)
    two = run("autopar, 2 processes", [*train, "--max_train_steps", str(RESUMED_AT)], log, 1, RESUMED_AT)
    one = run("autopar, resumed on 1 process", [*train, "-f", str(HERE / "one.yaml")], log, RESUMED_AT + 1, STEPS)

    print(f"\n{'step':>4} {'plain':>12} {'autopar':>12} {'difference':>11}")
    rows = list(zip(want, two + one, strict=True))
    for a, b in rows:
        if b["step"] in (1, RESUMED_AT + 1):
            print(f"     -- {'2 processes' if b['step'] == 1 else 'resumed on 1 process'} --")
        print(f"{a['step']:>4} {a['train_loss']:>12.6f} {b['train_loss']:>12.6f} {abs(a['train_loss'] - b['train_loss']):>11.1e}")
    worst = max(abs(a["train_loss"] - b["train_loss"]) for a, b in rows)
    print(f"\nlargest difference {worst:.1e}")
    for name, steps in (("plain, 1 process", want), ("autopar, 2 processes", two), ("autopar, 1 process", one)):
        print(f"{name}: {median(r['tokens_per_s'] for r in steps):,.0f} tokens/s")
    print("generated code:", *sorted(str(p) for p in Path(".autopar").glob("model.GPT/*/model.py")))
    print("checkpoints:", *sorted(p.name for p in (RUN / "checkpoints").iterdir()))
    if not worst < 1e-3:
        sys.exit("the losses differ by more than float32 rounding explains")


if __name__ == "__main__":
    main()
