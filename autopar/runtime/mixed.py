"""MixedPrecision: any optimizer over float32 master copies of float16 or bfloat16 parameters; updated weights are rounded back.
Must not know how parameters are held by ranks: it works on a plain module in one process just as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autopar.errors import ConfigError
from autopar.runtime.wrapper import Wrapper

HALF = (torch.float16, torch.bfloat16)
MASTER = "master"  # its key among the state of a parameter


def mixed_precision(optimizer_fn: Callable[..., Optimizer]) -> Callable[..., MixedPrecision]:
    """The optimizer with float32 master weights: mixed_precision(torch.optim.AdamW)(params, lr=1e-3), or given to build_optimizer.

    For any optimizer that computes its updates from parameters, gradients and its own state. Its state, and the gradients it sees, are
    float32. Parameters of other dtypes are updated as they are.
    """
    if isinstance(optimizer_fn, Optimizer):
        raise ConfigError(f"mixed_precision takes an optimizer class, e.g. torch.optim.AdamW, not a {type(optimizer_fn).__name__}")
    return partial(MixedPrecision, optimizer_fn)


class MixedPrecision(Wrapper):
    """See mixed_precision. param_groups, state and gradients are those of the masters; `sources` are the parameters themselves."""

    def __init__(self, optimizer_fn: Callable[..., Optimizer], params: Iterable, **kwargs: Any):
        given = list(params)
        groups = [dict(g) for g in given] if given and isinstance(given[0], dict) else [{"params": given}]
        self.masters: dict[Tensor, Tensor] = {}  # parameter -> its master, or itself
        for g in groups:
            g["params"] = [g["params"]] if isinstance(g["params"], Tensor) else list(g["params"])
            for p in g["params"]:
                self.masters[p] = nn.Parameter(p.detach().float(), p.requires_grad) if p.dtype in HALF else p
            g["params"] = [self.masters[p] for p in g["params"]]
        super().__init__(optimizer_fn(groups, **kwargs))
        self._pairs = [(low, master) for low, master in self.masters.items() if low is not master and low.numel()]
        self._collected = False

    @property
    def sources(self) -> list[Tensor]:
        return list(self.masters)

    def state_of(self, param: Tensor) -> dict[str, Any]:
        """The state of a parameter, its master included."""
        master = self.masters[param]
        return dict(self.optimizer.state.get(master, {})) | ({MASTER: master.detach()} if master is not param else {})

    @torch.no_grad()
    def load_state_of(self, param: Tensor, state: dict[str, Any]) -> None:
        """The converse of state_of. Without a master among the state, the one there is stays. Weights are loaded by themselves."""
        state, master = dict(state), self.masters[param]
        saved = state.pop(MASTER, None)
        if saved is not None and master is not param:
            master.copy_(saved.view_as(master))
        if state:
            self.optimizer.state[master] = state

    # -- a step

    @torch.no_grad()
    def collect(self) -> None:
        """Give every master the gradient of its parameter, once; it is float32 from here on, for unscaling and clipping too."""
        if self._collected:
            return
        self._take_over_foreign_weights()
        pairs = [(low.grad, master) for low, master in self._pairs if low.grad is not None]
        for low, master in self._pairs:
            master.grad = None if low.grad is None else torch.empty_like(master)
        if pairs:
            torch._foreach_copy_([m.grad for _, m in pairs], [g for g, _ in pairs])
        self._collected = True

    @torch.no_grad()
    def round(self) -> None:
        """Parameters become their masters, rounded."""
        if self._pairs:
            torch._foreach_copy_([low for low, _ in self._pairs], [master for _, master in self._pairs])

    def _take_over_foreign_weights(self) -> None:
        """A parameter that is not its master rounded was written by somebody else (weights were loaded): the step would undo that."""
        lows, masters = [low for low, _ in self._pairs], [master for _, master in self._pairs]
        if not lows:
            return
        # NB: by value. Version counters miss writes through .data, and with ZeRO through the parameter that this one is a piece of.
        rounded = [torch.empty_like(low) for low in lows]
        torch._foreach_copy_(rounded, masters)
        torch._foreach_sub_(rounded, lows)
        if any(n != 0 for n in torch.stack(torch._foreach_norm(rounded, float("inf"))).tolist()):
            for low, master in self._pairs:
                master.copy_(torch.where(master.to(low.dtype) == low, master, low.float()))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            self.collect()
            loss = self.optimizer.step()
        else:
            evaluations = 0

            def evaluate() -> Any:
                nonlocal evaluations
                if evaluations:
                    self.round()  # what the optimizer has made of the masters meanwhile
                evaluations += 1
                with torch.enable_grad():
                    loss = closure()
                self._collected = False
                self.collect()
                return loss

            loss = self.optimizer.step(evaluate)
        self.round()
        for _, master in self._pairs:
            master.grad = None
        self._collected = False
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for low, master in self.masters.items():
            master.grad = None
            if low.grad is not None:
                low.grad = None if set_to_none else low.grad.detach().zero_()
        self._collected = False

    def _groups_to_unscale(self) -> list[dict[str, Any]]:
        self.collect()
        return self.optimizer.param_groups

    # -- state

    def _indices(self) -> dict[int, Tensor]:
        """Number in a state dict -> parameter."""
        lows = {id(master): low for low, master in self.masters.items()}
        return dict(enumerate(lows[id(p)] for g in self.param_groups for p in g["params"]))

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the master among the state of each parameter that has one."""
        out = self.optimizer.state_dict()
        state = {k: dict(v) if isinstance(v, dict) else v for k, v in out["state"].items()}
        for i, p in self._indices().items():
            if self.masters[p] is not p:
                state.setdefault(i, {})[MASTER] = self.masters[p].detach()
        return {**out, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = {k: dict(v) if isinstance(v, dict) else v for k, v in state_dict["state"].items()}
        masters = {k: v.pop(MASTER) for k, v in state.items() if isinstance(v, dict) and MASTER in v}
        self.optimizer.load_state_dict({**state_dict, "state": {k: v for k, v in state.items() if v != {}}})
        for i, p in self._indices().items():
            if i in masters:
                self.load_state_of(p, {MASTER: masters[i]})
