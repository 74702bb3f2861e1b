"""What the benchmark scripts share: figures with goals, tables, --json lines, and measuring in a fresh process.
Must not know what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One number with its goal: `value` should be at most (or, for shares, at least) `goal`."""

    name: str
    value: float
    unit: str
    against: str
    goal: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def report(figures: list[Figure], as_json: bool) -> None:
    """Print a table, or one JSON line per figure."""
    if as_json:
        for f in figures:
            row = asdict(f)
            del row["at_least"]
            print(json.dumps(row))
        return
    print(f"\n{'figure':<28} {'value':>10} {'unit':<8} {'goal':>10}  {'':<4} against")
    for f in figures:
        bound = f"{'>=' if f.at_least else '<='} {f.goal:g}"
        print(f"{f.name:<28} {f.value:>10.3f} {f.unit:<8} {bound:>10}  {'ok' if f.met else 'MISS':<4} {f.against}")


def parser(doc: str | None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=doc)
    p.add_argument("--json", action="store_true", help="one JSON line per figure instead of the table")
    return p


def fresh(script: str, *args: str) -> dict[str, Any]:
    """Run a script in a new process with one thread and return the JSON of its last line."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([sys.executable, script, *args], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} {' '.join(args)} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def cpu_seconds(fn: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = fn()
    return time.process_time() - start, result


def peak_mb() -> float:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
