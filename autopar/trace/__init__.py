"""Tracing: a module and dummy inputs in, a Graph out.
Must not know plans or devices; record() is the run, build() folds it into blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from autopar.ir.graph import Graph


def trace(
    module: torch.nn.Module, dummy_forward_args: Mapping[str, Any], *, strategy: str = "auto", constant_folding: bool = False
) -> Graph:
    """Run `module` once on the dummy inputs (forward argument name -> value) and return what it computes.

    strategy: what executes the ops (docs/tracing.md). constant_folding: bake input shapes in.
    Raises TraceError for what cannot be recorded faithfully; the module is unchanged afterwards.
    """
    from autopar.trace.build import build
    from autopar.trace.record import record

    return build(record(module, dummy_forward_args, strategy=strategy, constant_folding=constant_folding))
