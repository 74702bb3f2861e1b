"""State: puts the user's module and the random generators back exactly as they were before a trace.
Must not know how the module is run in between.
"""

from __future__ import annotations

import random
from typing import Any

import torch


class ModuleState:
    """A shallow picture of every submodule, and deep enough to undo list.append, self.config.x = 1 and in-place writes to parameters."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._modules: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._parameters = [(p, p.requires_grad, p.grad) for p in module.parameters()]
        self._data: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        objects: dict[int, dict[str, Any]] = {}
        for m in module.modules():
            d = m.__dict__
            self._modules.append((d, dict(d)))
            for v in d.values():
                if isinstance(v, (dict, list, set)):
                    self._containers.append((v, v.copy()))
                elif not isinstance(v, (torch.Tensor, torch.nn.Module, type)) and type(getattr(v, "__dict__", None)) is dict:
                    objects[id(v)] = v.__dict__
        self._containers += [(d, d.copy()) for d in objects.values()]

    def save_data(self, tensor: torch.Tensor) -> None:
        """Keep the numbers of a parameter that is about to be written in place."""
        if id(tensor) not in self._data:
            self._data[id(tensor)] = (tensor, tensor.detach().clone())

    def new_attributes(self) -> list[str]:
        """Names of attributes that hold a tensor now and held another object before."""
        return sorted({k for d, before in self._modules for k, v in d.items() if isinstance(v, torch.Tensor) and before.get(k) is not v})

    def restore(self) -> None:
        for d, before in self._modules:
            d.clear()
            d.update(before)
        for container, before in self._containers:
            if isinstance(container, list):
                container[:] = before
            else:
                container.clear()
                container.update(before)
        for tensor, data in self._data.values():
            with torch.no_grad():
                tensor.copy_(data)
        for p, requires_grad, grad in self._parameters:
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
            if p.grad is not grad:
                p.grad = grad


class RandomState:
    """The states of torch's, Python's and NumPy's generators."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        self.python = random.getstate()
        self.numpy = _numpy_random().get_state() if _numpy_random() else None

    def drawn(self) -> bool:
        """Whether Python's or NumPy's generator has moved."""
        if random.getstate() != self.python:
            return True
        if self.numpy is None:
            return False
        now = _numpy_random().get_state()
        return now[2] != self.numpy[2] or bool((now[1] != self.numpy[1]).any())

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        if self.numpy is not None:
            _numpy_random().set_state(self.numpy)


def _numpy_random() -> Any:
    try:
        import numpy.random
    except ImportError:
        return None
    return numpy.random
