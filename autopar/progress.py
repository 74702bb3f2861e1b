"""stage: names and times the stages of long work; a terminal shows which one is running, the log tells how long it took.
Must not know what the stages do.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("autopar.stages")


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Everything done inside counts as this stage. Quiet where standard error is no terminal."""
    shown = sys.stderr.isatty()
    if shown:
        sys.stderr.write(f"\r\033[Kautopar: {name} ...")
        sys.stderr.flush()
    start = time.perf_counter()
    try:
        yield
        seconds = time.perf_counter() - start
    finally:
        if shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
    log.info("%s: %.2f s", name, seconds, extra={"stage": name, "seconds": seconds})
