"""The errors a user can meet, and the helper that suggests the nearest valid name.
Knows nothing of any stage: every part of the package may import it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
