"""The errors a user can meet, the helper that suggests the nearest valid name, and errors as one line.
Knows nothing of any stage: every part of the package may import it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from typing import Any


class AutoparError(Exception):
    """Base class of everything autopar raises on purpose."""


class ConfigError(AutoparError, ValueError):
    """A setting is wrong: an unknown name, a number out of range, two settings that contradict."""


class TraceError(AutoparError, RuntimeError):
    """The model does something the tracer cannot record faithfully."""


class RuleError(AutoparError, ValueError):
    """A notation that does not parse, or does not fit the op's inputs."""


class PlanError(AutoparError, ValueError):
    """A plan that cannot be applied to the graph."""


class CheckError(AutoparError, RuntimeError):
    """The type checker could not prove a lowered program equal to its graph."""


class VerifyError(AutoparError, AssertionError):
    """A verified module differs numerically from the original."""


class SavedirError(AutoparError, OSError):
    """A generated folder is missing, half written, read-only or belongs to another configuration."""


class GuardError(AutoparError, RuntimeError):
    """A run-time input takes another path through the model than the traced one."""


class CheckpointError(AutoparError, RuntimeError):
    """A checkpoint or state dict is damaged, incomplete, or does not fit the module or optimizer."""


class StepError(AutoparError, RuntimeError):
    """train_step or infer_step cannot go on: called wrongly, unlike on other ranks, or another rank has failed."""

    everywhere = False  # raised by all ranks alike, so nobody waits for anybody


class LayoutError(AutoparError, RuntimeError):
    """The running processes do not fit the generated code (world size, rank, device, shapes)."""


def suggest(name: object, valid: Iterable[str]) -> str:
    """A sentence naming the nearest valid name and the full list, to end an error message with."""
    names = sorted(str(v) for v in valid)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Valid: {', '.join(names)}"


def one_line(e: BaseException) -> str:
    """An error as one line: its text, and for other than autopar's own its kind and the last line of user code."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    text = "".join(line if i == 0 else f" {line}" if lines[i - 1].endswith(":") else f"; {line}" for i, line in enumerate(lines))
    if isinstance(e, AutoparError):
        return text
    notes = "".join(f"; {n}" for n in getattr(e, "__notes__", ()))
    return f"{type(e).__name__}: {text}{_place(e.__traceback__)}{notes}"


def _place(tb: Any) -> str:
    inside = os.path.dirname(os.path.abspath(__file__))
    place = ""
    while tb is not None:
        file = tb.tb_frame.f_code.co_filename
        if not file.startswith((inside, "<frozen")) and f"{os.sep}torch{os.sep}" not in file:
            place = f" ({file}:{tb.tb_lineno})"
        tb = tb.tb_next
    return place
