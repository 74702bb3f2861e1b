"""Listening to the log of a compile: how long each stage took, what was reused, warnings to standard error.
Must not know what the stages do.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Listener(logging.Handler):
    """Collects what the driver and the tracer say while a command runs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds: dict[str, float] = {}
        self.decision: Any = None  # codegen.savedir.Decision
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "stage"):
            self.seconds[record.stage] = self.seconds.get(record.stage, 0.0) + record.seconds
        elif hasattr(record, "decision"):
            self.decision = record.decision
        elif record.levelno >= logging.WARNING:
            self.warnings.append(record.getMessage())
        elif record.name == "autopar.trace":
            self.notes.append(record.getMessage())


@contextmanager
def listening() -> Iterator[Listener]:
    logger, listener = logging.getLogger("autopar"), Listener()
    before = logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield listener
        # NB: not where the command fails, for then its error is all that counts.
        sys.stderr.writelines(f"autopar: warning: {w}\n" for w in dict.fromkeys(listener.warnings))
    finally:
        logger.removeHandler(listener)
        logger.setLevel(before[0])
        logger.propagate = before[1]
