"""The trainer: what a step costs over a bare loop, how long a save in the background holds training up, how fast a command starts.

    python benchmarks/trainer.py [--json]
Two gloo ranks. The trainer's steps and those of a bare loop around the same generated module take turns in the same processes (Llama of
2 layers, hidden 128, batch 4 x 64 per rank, AdamW, clipped, console and TensorBoard on): CPU seconds summed over the ranks, median of
the ratios per round. Saves of 200 MB, at once and in the background, take turns too: seconds of the rank that waits longest.
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
from typing import Any

from common import Figure, parser, report

MODULES = ("autopar", "autopar.train")
IMPORT = "import time, torch; t = time.process_time(); import {}; print(time.process_time() - t)"


def child(job: str, *args: int) -> dict[str, Any]:
    """What a job of trainer_parts.py leaves behind."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*launch, __file__, "--child", job, folder, *map(str, args)], env=environment(), capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"trainer.py {job} failed:\n{done.stdout}{done.stderr}")
        return json.loads(Path(folder, "result.json").read_text())


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def seconds_of(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    return median(a / b for a, b in zip(times[one], times[other], strict=True))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=150)
    options.add_argument("--steps", type=int, default=4, help="steps per round, of the trainer and of the bare loop")
    options.add_argument("--saves", type=int, default=7)
    options.add_argument("--child", nargs="*")
    args = options.parse_args()
    if args.child:
        import trainer_parts

        job, folder, *numbers = args.child
        getattr(trainer_parts, job)(folder, *map(int, numbers))
        return
    got = child("overhead", args.rounds, args.steps)
    cpu, wall = ({who: times[1:] for who, times in got[kind].items()} for kind in ("cpu", "wall"))
    saves = child("saves", args.saves)
    imports = [median(float(seconds_of([sys.executable, "-c", IMPORT.format(m)])[1]) for _ in range(5)) for m in MODULES]
    help_s = median(seconds_of([str(Path(sys.executable).parent / "autopar"), "--help"])[0] for _ in range(5))
    if not args.json:
        own, bare = (median(cpu[who]) / args.steps * 1e3 for who in ("trainer", "bare"))
        clock = ratio(wall, "trainer", "bare")
        print(f"a step: {own:.2f} ms by the trainer, {bare:.2f} ms bare, CPU of both ranks; ratio by the clock {clock:.3f}")
        at_once, behind = median(saves["sync"]), median(saves["async"])
        print(f"{saves['bytes'] / 1e6:.0f} MB: {at_once * 1e3:.0f} ms at once, {behind * 1e3:.0f} ms until training goes on")
    figures = [
        Figure("trainer_overhead", ratio(cpu, "trainer", "bare"), "ratio", "a bare loop around the same generated module", 1.03),
        Figure("async_save_stall", median(saves["async"]) / median(saves["sync"]), "ratio", "saving the same 200 MB at once", 0.15),
        Figure("import_s_over_torch", max(imports), "s", "import torch", 0.3),
        Figure("help_s", help_s, "s", "autopar --help", 1.5),
    ]
    report(figures, args.json)


if __name__ == "__main__":
    main()
