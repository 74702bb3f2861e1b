"""Interrupts: SIGTERM and Ctrl-C as a request that a run ends at its next step; a second one ends it at once.
Must not know what is done about it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("autopar.train")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 3.0  # seconds: of Ctrl-C on a terminal a process hears twice, from the terminal and from torchrun


class Interrupts:
    """.requested: the number of the signal that came, or 0."""

    def __init__(self) -> None:
        self.requested = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._owner = os.getpid()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Signals are requests inside. Only the main thread gets signals; in others this does nothing."""
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._come) for s in SIGNALS}
        try:
            yield
        finally:
            self._restore()

    def _restore(self) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _come(self, number: int, frame: Any) -> None:
        if os.getpid() != self._owner:  # a worker of a loader, which has inherited this
            # NB: Ctrl-C on a terminal reaches workers too, and the run still needs them.
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if not self.requested:
            self.requested, self._since = number, time.monotonic()
            log.warning("%s: ending after this step; once more ends at once", signal.Signals(number).name)
        elif time.monotonic() >= self._since + GRACE:
            self._restore()
            if signal.getsignal(number) == signal.SIG_IGN:  # as a shell has it for what it starts in the background
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(self._owner, number)
