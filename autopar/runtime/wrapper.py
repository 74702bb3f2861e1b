"""Wrapper: a torch optimizer around another one, for learning-rate schedulers, GradScaler and hooks the optimizer itself.
Must not know what is done around the inner step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from autopar.errors import ConfigError


class Wrapper(Optimizer):
    """Groups, state and defaults are those of `self.optimizer`, so that whoever changes one changes the other."""

    def __init__(self, optimizer: Optimizer):
        super().__init__([{"params": []}], {})  # hooks and the like; what it makes of groups and state is dropped below
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        if "optimizer" not in self.__dict__:
            return []
        # NB: GradScaler has no hook: reading the groups in this one function is all it does before it looks at gradients.
        if sys._getframe(1).f_code.co_name == "_unscale_grads_":
            return self._groups_to_unscale()
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        if "optimizer" in self.__dict__:
            self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        if "optimizer" in self.__dict__:
            self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults if "optimizer" in self.__dict__ else {}

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        if "optimizer" in self.__dict__:
            self.optimizer.defaults = value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled; use state_dict()")

    def _groups_to_unscale(self) -> list[dict[str, Any]]:
        """What GradScaler.unscale_ sees: groups whose gradients are ready."""
        return self.optimizer.param_groups

    def register_step_pre_hook(self, hook: Callable) -> Any:
        """As torch's; the hook runs when gradients are ready."""
        return self.optimizer.register_step_pre_hook(lambda _, args, kwargs: hook(self, args, kwargs))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "optimizer" in self.__dict__:
            raise ConfigError("parameter groups are chosen when the optimizer is built: build_optimizer(..., param_group_fn=...)")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)
