"""ConsoleLogger: a progress bar where standard error is a terminal, plain lines elsewhere.
Must not know loops, nor where metrics come from beyond their names.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

REFRESH_S = 0.1  # the bar is written this often, at most

FORMATS = {  # what a line shows, in this order; other metrics follow as they are
    "train_loss": "loss {:.4f}",
    "val_loss": "val_loss {:.4f}",
    "gnorm": "gnorm {:.3g}",
    "lr": "lr {:.3g}",
    "tokens_per_s": "{:,.0f} tok/s",
    "tflops": "{:.3g} TFLOP/s",
    "mfu": "MFU {:.1%}",
    "memory_gb": "mem {:.2f} GB",
    "data_wait_s": "data {:.0%}",
}
QUIET = {"epoch", "step_s", "samples_per_s"}  # shown elsewhere, or in place of tokens


class ConsoleLogger:
    """progress_bar: False writes lines on a terminal too. every_n_steps: of training, between two lines; a bar shows every step."""

    def __init__(self, progress_bar: bool = True, every_n_steps: int = 100):
        self._want_bar, self._every = progress_bar, max(1, every_n_steps)
        self._bar: tqdm | None = None
        self._total: int | None = None
        self._shown = self._first = self._last = 0  # step in the bar or on a line; before the run; logged
        self._held: Mapping[str, float] | None = None  # metrics of a step that no line has shown
        self._next = 0.0

    def setup(self, run: Mapping[str, Any]) -> None:
        self._total = run.get("total_train_steps")
        self._first = self._last = self._shown = run.get("finished_train_steps", 0)
        self._start = time.perf_counter()
        self._print(f"training from step {self._first}" + (f" to {self._total}" if self._total else "") + f" on {run.get('device', '?')}")
        if self._want_bar and sys.stderr.isatty():
            # NB: written when this class says so, which costs less per step than to let tqdm decide.
            sized = os.get_terminal_size(sys.stderr.fileno()).columns > 0  # the terminals of some programs have no size
            size = {"dynamic_ncols": True} if sized else {"ncols": 120, "nrows": 20}
            text = "{desc}{n_fmt}/{total_fmt} |{bar:12}| {elapsed}<{remaining}{postfix}" if self._total else None
            self._bar = tqdm(total=self._total, initial=self._first, unit="step", bar_format=text, mininterval=0, miniters=1, **size)

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, tag: str) -> None:
        if tag != "train":
            self._print(f"{tag} after step {step}: {describe(metrics)}")
            return
        self._last, self._held = step, metrics
        if self._bar is None:
            if step % self._every == 0 or step in (self._first + 1, self._total):
                self._line()
        elif step == self._total or time.perf_counter() >= self._next:
            self._update()

    def flush(self) -> None:
        sys.stdout.flush()

    def finalize(self, status: str) -> None:
        if self._bar is not None:
            self._update()
            self._bar.close()
            self._bar = None
        elif self._last != self._shown:
            self._line()
        seconds = time.perf_counter() - self._start
        self._print(f"{status} after step {self._last}: {self._last - self._first} steps in {tqdm.format_interval(seconds)}")

    def _update(self) -> None:
        if self._held is not None:
            if "epoch" in self._held:
                self._bar.set_description_str(f"epoch {self._held['epoch']}  step ", refresh=False)
            self._bar.set_postfix_str(describe(self._held), refresh=False)
        self._bar.update(self._last - self._shown)
        self._shown, self._next = self._last, time.perf_counter() + REFRESH_S

    def _line(self) -> None:
        self._shown = self._last
        epoch = f"epoch {self._held['epoch']}  " if "epoch" in self._held else ""
        self._print(f"{epoch}step {self._last}{f'/{self._total}' if self._total else ''}  {describe(self._held)}")

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)


def describe(metrics: Mapping[str, float]) -> str:
    """The metrics as a person reads them; time waiting for data is a share of the step."""
    values = dict(metrics)
    if "data_wait_s" in values:
        values["data_wait_s"] /= values.get("step_s") or 1.0
    known = [text.format(values[name]) for name, text in FORMATS.items() if name in values]
    if "tokens_per_s" not in values and "samples_per_s" in values:
        known.insert(min(3, len(known)), f"{values['samples_per_s']:,.4g} samples/s")
    return "  ".join([*known, *(f"{k} {v:.4g}" for k, v in values.items() if k not in FORMATS and k not in QUIET)])
