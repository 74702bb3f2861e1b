"""check: on all ranks, stop before a NaN or infinity of one rank is summed into the gradients of all, and say whose it is.
Must not know steps or reducers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autopar.errors import StepError
from autopar.runtime.faults import control, gather, listed

_KINDS = ("", "the parameter {name} itself", "the loss of sample {index}", "the gradient of {name}")


def check(module: nn.Module, losses: Sequence[Tensor | None] = ()) -> None:
    """Raise StepError on every rank if a parameter, a loss or a gradient that is not summed yet is NaN or infinite on any.

    The module is a ParallelModule. The message names ranks and tensors: those with bad parameters, else bad losses, else gradients.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    groups = (
        [(i, p.detach()) for i, (_, p) in enumerate(named)],
        [(i, loss) for i, loss in enumerate(losses) if loss is not None],
        [(i, p.grad) for i, (_, p) in enumerate(named) if p.grad is not None],
    )
    mine = next(((kind, bad[0], len(bad)) for kind, bad in enumerate(map(_bad, groups), 1) if bad), (0, 0, 0))
    rows = gather(control(module.mesh), mine)
    found = {tuple(row): [r for r, other in enumerate(rows) if other == row] for row in rows if row[0]}
    if not found:
        return
    first = min(kind for kind, _, _ in found)
    parts = []
    for (kind, index, n), ranks in sorted(found.items()):
        if kind == first:
            name = named[index][0] if kind != 2 else ""
            more = f" and {n - 1} more" if n > 1 else ""
            parts.append(f"{_KINDS[kind].format(name=name, index=index)}{more} on {listed(ranks)}")
    error = StepError(f"NaN or infinite before the gradients are summed: {'; '.join(parts)}. No rank has changed a parameter in this step")
    error.everywhere = True
    raise error


@torch.no_grad()
def _bad(tensors: Sequence[tuple[int, Tensor]]) -> list[int]:
    """Indices of the tensors with an entry that is not finite. Reads one number per group from the device where all is well."""
    groups: dict[tuple, list[tuple[int, Tensor]]] = {}
    for i, t in tensors:
        if t.numel() and (t.is_floating_point() or t.is_complex()):
            groups.setdefault((t.device, t.dtype), []).append((i, t))
    out = []
    for group in groups.values():
        good = torch.stack(torch._foreach_norm([t for _, t in group], float("inf"))).isfinite()
        if not good.all():
            out += [i for (i, _), ok in zip(group, good.tolist(), strict=True) if not ok]
    return sorted(out)
