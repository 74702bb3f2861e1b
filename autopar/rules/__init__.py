"""Op rules: how each op may be split, and what one rank then runs.
Must not know traces, plans or generated code.
"""

from typing import Any

from autopar.rules.names import canonical
from autopar.rules.registry import localise, recipe_of

__all__ = ["canonical", "localise", "recipe_of", "register_op", "verify_op"]


def __getattr__(name: str) -> Any:
    if name in ("register_op", "verify_op"):  # they run ops, so they need torch
        from autopar.rules import register

        return getattr(register, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
