"""Loggers: one four-method protocol; JSON lines, TensorBoard, Weights & Biases, and all of a run together. The console is console.py.
Must not know loops, nor what the metrics mean.

Only rank 0 has loggers. `run`, which setup gets, is a dict: "args" (the configuration as plain data), "finished_train_steps" (where it
resumes), "total_train_steps" (or None), "device" (one line on devices and flops).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from autopar.train.console import ConsoleLogger

__all__ = ["ConsoleLogger", "JsonLinesLogger", "Logger", "Loggers", "TensorBoardLogger", "WandbLogger"]

log = logging.getLogger("autopar.train")
HELD_S = 1.0  # seconds that TensorBoardLogger keeps numbers back


class Logger(Protocol):
    """What a run tells. A class of your own needs these four methods, and can be named in the configuration."""

    def setup(self, run: Mapping[str, Any]) -> None:
        """Training is about to start. What cannot work (a folder that cannot be written) is an error here."""

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, tag: str) -> None:
        """Metrics after so many finished steps; tag is 'train' or 'val'."""

    def flush(self) -> None:
        """Write what is held back: the run was saved, or may end soon."""

    def finalize(self, status: str) -> None:
        """The run has ended: 'finished', 'interrupted' or 'failed'."""


class Loggers:
    """All loggers of a run. One that fails while training runs is named in a warning, once, and left out; training goes on."""

    def __init__(self, loggers: Sequence[Logger] = ()):
        self._loggers = list(loggers)

    def __iter__(self) -> Iterator[Logger]:
        return iter(self._loggers)

    def __len__(self) -> int:
        return len(self._loggers)

    def setup(self, run: Mapping[str, Any]) -> None:
        """Raises what a logger raises."""
        for logger in self._loggers:
            logger.setup(run)

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, tag: str) -> None:
        self._each("log_metrics", metrics, step, tag=tag)

    def flush(self) -> None:
        self._each("flush")

    def finalize(self, status: str) -> None:
        self._each("finalize", status)

    def _each(self, method: str, *args: Any, **kwargs: Any) -> None:
        for logger in tuple(self._loggers):
            try:
                getattr(logger, method)(*args, **kwargs)
            except Exception as e:
                self._loggers.remove(logger)
                log.warning("%s.%s failed, and is left out from now on: %s: %s", type(logger).__name__, method, type(e).__name__, e)


class JsonLinesLogger:
    """One JSON object per line: step, tag and the metrics; null for what is not finite. A resumed run appends to the same file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: Any = None

    def setup(self, run: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", buffering=1)
        if _torn(self.path):  # a run was killed while it wrote
            self._file.write("\n")

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, tag: str) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        self._file.write(json.dumps({"step": step, "tag": tag, **finite}, default=float) + "\n")

    def flush(self) -> None:
        self._file.flush()

    def finalize(self, status: str) -> None:
        self._file.close()


def _torn(path: Path) -> bool:
    with path.open("rb") as f:
        end = f.seek(0, 2)
        f.seek(max(0, end - 1))
        return end > 0 and f.read() != b"\n"


class TensorBoardLogger:
    """Scalars `tag/name` in the folder root_dir/name, and the configuration as a text. kwargs are SummaryWriter's (flush_secs: 10).

    .writer: the SummaryWriter, for more from hooks. Needs the extra autopar[tensorboard].
    """

    def __init__(self, name: str = "run", root_dir: str | Path = "./runs", **kwargs: Any):
        try:
            from tensorboard.compat.proto.summary_pb2 import Summary
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise _missing("TensorBoardLogger", "tensorboard", e) from e
        self.folder = Path(root_dir) / name
        self.writer: Any = None
        self._held: list[tuple[Any, int, float]] = []
        self._make, self._summary, self._kwargs = SummaryWriter, Summary, kwargs

    def setup(self, run: Mapping[str, Any]) -> None:
        done = run.get("finished_train_steps", 0)
        # NB: purged steps are those that an earlier run made after the checkpoint this one resumes from.
        resumed = {"purge_step": done + 1} if done else {}
        self.writer = self._make(str(self.folder), **{"flush_secs": 10, **resumed, **self._kwargs})
        if "args" in run:
            self.writer.add_text("args", f"```\n{json.dumps(run['args'], indent=2, default=str)}\n```", done)

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, tag: str) -> None:
        now = time.time()
        # NB: one event for all metrics; add_scalar for each takes eight times as long.
        values = [self._summary.Value(tag=f"{tag}/{name}", simple_value=float(value)) for name, value in metrics.items()]
        self._held.append((self._summary(value=values), step, now))
        if not 0 <= now - self._held[0][2] < HELD_S:
            self._pass_on()

    def _pass_on(self) -> None:
        """NB: many at once; the writer's thread takes turns with training, which costs more than what it writes."""
        for event in self._held:
            self.writer.file_writer.add_summary(*event)
        self._held.clear()

    def flush(self) -> None:
        self._pass_on()
        self.writer.flush()

    def finalize(self, status: str) -> None:
        self._pass_on()
        self.writer.close()


class WandbLogger:
    """Metrics as `tag/name`, the configuration as config. kwargs are wandb.init's: id and resume, group, tags, ...

    mode: 'online', 'offline' (files in root_dir, for `wandb sync` later) or 'disabled'; None: as the environment says.
    .run: wandb's, for more from hooks. Needs the extra autopar[wandb].
    """

    def __init__(
        self, name: str | None = None, root_dir: str | Path = "./runs", project: str = "autopar", mode: str | None = None, **kwargs: Any
    ):
        try:
            import wandb
        except ImportError as e:
            raise _missing("WandbLogger", "wandb", e) from e
        self.run: Any = None
        self._init = wandb.init
        self._kwargs = {"project": project, "name": name, "dir": str(root_dir), "mode": mode, **kwargs}

    def setup(self, run: Mapping[str, Any]) -> None:
        Path(self._kwargs["dir"]).mkdir(parents=True, exist_ok=True)
        self.run = self._init(config=run.get("args"), **self._kwargs)
        self.run.define_metric("*", step_metric="step")

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, tag: str) -> None:
        # NB: not wandb's own step, which takes no smaller number again: validation logs the step that training has logged.
        self.run.log({"step": step, **{f"{tag}/{name}": value for name, value in metrics.items()}})

    def flush(self) -> None:
        """wandb writes by itself."""

    def finalize(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "finished" else 1)


def _missing(logger: str, extra: str, error: ImportError) -> ImportError:
    return ImportError(f"{logger} needs the package {extra}, and {error}; install it with: pip install 'autopar[{extra}]'")
