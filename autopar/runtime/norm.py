"""GradNorm: one true norm of gradients that ranks hold in different ways, clipping by it, and agreement on whether all are finite.
Must not know optimizers or modules: it is handed parameters, how many ranks hold each of their entries, and an axis over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autopar.errors import AutoparError, ConfigError
from autopar.runtime.axis import Axis


def count_copies(held: Sequence[int], whole: Sequence[int], names: Sequence[str], world: Axis, device: torch.device) -> list[int]:
    """How many ranks hold each entry of every parameter: the entries held on all ranks over the entries there are. NB: collective.

    This needs no knowledge of how a parameter is sharded, replicated or cut up by ZeRO, only that its entries are treated alike.
    """
    total = world.all_reduce(torch.tensor(held, dtype=torch.int64, device=device)).tolist() if held else []
    for name, n, entries in zip(names, total, whole, strict=True):
        assert entries == 0 or (n and n % entries == 0), f"{name}: {n} entries are held on all ranks, of {entries}"
    return [n // entries if entries else 1 for n, entries in zip(total, whole, strict=True)]


class GradNorm:
    """The gradients of these parameters as parts of those of the whole model; entry i of `copies` ranks hold the same as parameter i here.

    `names` says whose part each parameter is. Parameters without a gradient take no part. One collective of one number per call.
    """

    def __init__(self, params: Sequence[Tensor], copies: Sequence[int], names: Sequence[str], world: Axis, device: torch.device):
        self.params, self.copies, self.names, self.world, self.device = list(params), list(copies), list(names), world, device
        self._weights: tuple[list[float], Tensor] | None = None

    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.params if p.grad is not None]

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The 2-norm of the gradient of the whole model, the same on every rank, in float32 (float64 if there are such parameters)."""
        weights: list[float] = []
        norms: list[Tensor] = []
        for group in _alike(self.params, self.copies):
            grads = [p.grad for p, _ in group]
            weights += [1.0 / n for _, n in group]
            wide = torch.float32 if grads[0].dtype.itemsize < 4 else None
            # NB: squares are added in float64: of one number per parameter, and what float32 holds does not overflow there.
            norms.append(torch.stack(torch._foreach_norm(grads, 2.0, wide)).to(self.device, torch.float64))
        if norms:
            total = torch.dot(torch.cat(norms).square(), self._on_device(weights))
        else:
            total = torch.zeros((), dtype=torch.float64, device=self.device)
        out = self.world.all_reduce_(total).sqrt()
        return out if any(p.dtype == torch.float64 for p in self.params) else out.float()

    def _on_device(self, weights: list[float]) -> Tensor:
        """The same list step after step, so it is copied to the device once."""
        if self._weights is None or self._weights[0] != weights:
            self._weights = weights, torch.tensor(weights, dtype=torch.float64, device=self.device)
        return self._weights[1]

    @torch.no_grad()
    def scale(self, factor: float | Tensor) -> None:
        for group in _alike(self.params, self.copies):
            grads = [p.grad for p, _ in group]
            torch._foreach_mul_(grads, factor.to(grads[0].device) if isinstance(factor, Tensor) else factor)

    def clip(self, max_norm: float | None, error_if_nonfinite: bool = False) -> Tensor:
        """Scale all gradients so that their norm is at most max_norm (None: leave them), and return the norm before that.

        The same formula as torch.nn.utils.clip_grad_norm_. Raises AutoparError on every rank if asked to where the norm is not finite.
        """
        if max_norm is not None and not max_norm > 0:
            raise ConfigError(f"max_norm is {max_norm!r}; give a number above 0, or None to measure without clipping")
        norm = self.norm()
        if error_if_nonfinite and not torch.isfinite(norm):
            raise AutoparError(f"the gradient norm is {norm.item()}: {self.culprits()}")
        if max_norm is not None:
            self.scale((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def found_inf(self) -> Tensor:
        """1.0 on every rank if any gradient on any rank has an entry that is infinite or NaN, else 0.0; as GradScaler decides it."""
        found = torch.zeros((), dtype=torch.float32, device=self.device)
        one = torch.ones((), dtype=torch.float32, device=self.device)
        for group in _alike(self.params, self.copies):
            torch._amp_foreach_non_finite_check_and_unscale_([p.grad for p, _ in group], found, one)
        return self.world.all_reduce_(found, "max")

    def culprits(self) -> str:
        """Which ranks hold a gradient that is not finite, and of which parameter the first one is. NB: collective."""
        bad = [i for i, p in enumerate(self.params) if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
        text = f"rank {self.world.rank}: {', '.join(self.names[i] for i in bad[:3])}" if bad else ""
        line = torch.zeros(200, dtype=torch.uint8, device=self.device)
        line[: len(text.encode()[:200])] = torch.tensor(list(text.encode()[:200]), dtype=torch.uint8, device=self.device)
        lines = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in self.world.stack(line).tolist()]
        return "; ".join(filter(None, lines)) or "every gradient is finite, but their squares overflow"


def _alike(params: Sequence[Tensor], copies: Sequence[int]) -> list[list[tuple[Tensor, int]]]:
    """Parameters that have a gradient, grouped as foreach operations want them: by device and dtype."""
    groups: dict[tuple, list[tuple[Tensor, int]]] = {}
    for p, n in zip(params, copies, strict=True):
        if p.grad is not None:
            groups.setdefault((p.grad.device, p.grad.dtype), []).append((p, n))
    return list(groups.values())
