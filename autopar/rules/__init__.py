"""Op rules: how each op may be split, and what one rank then runs.
Must not know traces, plans or generated code.
"""

from autopar.rules.names import canonical
from autopar.rules.registry import localise, recipe_of

__all__ = ["canonical", "localise", "recipe_of"]
