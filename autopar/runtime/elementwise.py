"""Is an optimizer elementwise? Found by trying it: a parameter updated whole and in pieces has to become the same.
Must not know any optimizer by name, nor modules.

Only an elementwise optimizer gives the same result on a shard as on the whole parameter. Adam is; Adafactor (row and column means),
Muon (a matrix as a whole), LAMB (norms) and LBFGS (products over all parameters) are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

SHAPE, CUTS, STEPS = (4, 6), (10, 14), 3


def why_not_elementwise(make: Callable[..., Any], options: Mapping[str, Any], kwargs: Mapping[str, Any]) -> str | None:
    """None if make([{params, **options}], **kwargs) treats every entry by itself, else a sentence that says how it was found not to."""
    n = sum(CUTS)
    start = torch.linspace(-1.0, 1.0, n).cos()
    grads = [(torch.arange(n, dtype=torch.float32) * (k + 2)).sin() * 10.0 ** (k - 1) for k in range(STEPS)]

    def train(lo: int, hi: int, shape: tuple[int, ...]) -> torch.Tensor:
        p = nn.Parameter(start[lo:hi].clone().view(shape))
        optimizer = make([{"params": [p], **options}], **kwargs)
        for g in grads:
            p.grad = g[lo:hi].clone().view(shape)
            optimizer.step()
        return p.detach().view(-1)

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            whole = train(0, n, SHAPE)
        except Exception as e:
            return f"it could not be tried on a parameter of shape {SHAPE} ({type(e).__name__}: {e})"
        try:
            pieces = torch.cat([train(0, CUTS[0], (CUTS[0],)), train(CUTS[0], n, (CUTS[1],))])
        except Exception as e:
            return f"it updates a matrix but not a part of one ({type(e).__name__}: {e})"
    if torch.allclose(whole, pieces, rtol=1e-5, atol=1e-7):
        return None
    return "a parameter that it updates in two parts becomes something else than one that it updates whole"
