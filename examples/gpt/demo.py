"""`make demo`: train the GPT once as plain PyTorch and once as generated code on two processes, and compare the losses.
Must not import torch: it only launches the two runs and reads their logs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tqdm import tqdm

HERE = Path(__file__).parent
STEPS = 30


def run(title: str, command: list[str], log: Path) -> list[dict]:
    """Run a training command with a progress bar fed by its log. Exits with the command's output if it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    rows: list[dict] = []
    with tempfile.TemporaryFile("w+") as output:
        arguments = ["--steps", str(STEPS), "--losses", str(log)]
        process = subprocess.Popen([*command, *arguments], env=env, stdout=output, stderr=subprocess.STDOUT)
        quiet = not sys.stderr.isatty()
        with tqdm(total=STEPS, desc=title, unit="step", disable=quiet) as bar:
            shown = 0
            while True:
                done = process.poll() is not None
                # NB: the last line may be half written.
                lines = log.read_text().split("\n")[:-1] if log.exists() else []
                rows = [json.loads(line) for line in lines]
                for row in rows[shown:]:
                    bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                    bar.update()
                    if quiet and row["step"] % 10 == 0:
                        print(f"{title}: step {row['step']} of {STEPS}, loss {row['loss']:.4f}", flush=True)
                shown = len(rows)
                if done:
                    break
                time.sleep(0.2)
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"{title} failed with exit code {process.returncode}:\n{text}")
    print(f"{title}: {text.strip().splitlines()[-1]}")
    return rows


def main() -> None:
    savedir = Path(".autopar")
    with tempfile.TemporaryDirectory() as tmp:
        train = str(HERE / "train.py")
        plain = run("plain PyTorch, 1 process", [sys.executable, train], Path(tmp, "plain.jsonl"))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", train]
        split = run("generated code, 2 processes", [*launch, "--gen-savedir", str(savedir)], Path(tmp, "split.jsonl"))
    print(f"\n{'step':>4} {'plain':>12} {'generated':>12} {'difference':>11}")
    for a, b in zip(plain, split, strict=True):
        print(f"{a['step']:>4} {a['loss']:>12.6f} {b['loss']:>12.6f} {abs(a['loss'] - b['loss']):>11.1e}")
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(plain, split, strict=True))
    print(f"\nlargest difference {worst:.1e}")
    for name, rows in (("plain, 1 process", plain), ("generated, 2 processes", split)):
        print(f"{name}: {median(r['tokens_per_s'] for r in rows):,.0f} tokens/s")
    print("generated code:", *sorted(str(p) for p in savedir.glob("model.GPT/_/model.py")))
    if not worst < 1e-3:
        sys.exit("the losses differ by more than float32 rounding explains")


if __name__ == "__main__":
    main()
