"""ZeRO-3: whole parameters exist only while a block needs them, in the forward, in recomputation and in the backward.
Must not know how parameters are sharded (zero.py) nor how gradients travel (reducer.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from autopar.runtime.zero import Shard


class _Unit:
    """A block, and the shards of all parameters that its own code uses."""

    def __init__(self, path: str, block: nn.Module, shards: list[Shard]):
        self.path, self.block, self.shards = path, block, shards


class _Order:
    """In which order units were needed the last time, to fetch the next one while one computes. All ranks run alike, so they agree."""

    def __init__(self) -> None:
        self.after: dict[_Unit, _Unit] = {}
        self.last: _Unit | None = None
        self.ahead: _Unit | None = None

    def restart(self) -> None:
        self.last = self.ahead = None

    def enter(self, unit: _Unit) -> _Unit | None:
        """The unit that came after this one the last time."""
        if self.last is not None and self.last is not unit:
            self.after[self.last] = unit
        self.last = unit
        return self.after.get(unit)


class Gatherer:
    """Hooks on every block that gather its shards before use and free them after.

    Forward: from the start of a block's forward to its end. Backward: from the first gradient of an output of the block until all of its
    gradients have been accumulated (release(), called by the reducer), at the latest the end of the backward.
    """

    def __init__(self, module: nn.Module, shards: Sequence[Shard]):
        self.shards = list(shards)
        self._users: dict[Shard, int] = dict.fromkeys(self.shards, 0)  # forwards under way that need it
        self._depth = 0
        self._task = -1  # the backward that we will clean up after
        self._forward, self._backward = _Order(), _Order()
        self.units = list(self._find(module))
        for u in self.units:
            u.block.register_forward_pre_hook(partial(self._before, u), prepend=True)
            u.block.register_forward_hook(partial(self._after, u), always_call=True)
        for s in self.shards:
            s.free()

    def _find(self, module: nn.Module) -> Iterator[_Unit]:
        from autopar.runtime.module import Block

        by_param = {id(i.param): s for s in self.shards for i in s.bucket.items}
        for path, block in module.named_modules():
            if isinstance(block, Block):
                # NB: by what its code uses, not by the tree: a block may use a parameter that hangs below another one, or is tied.
                names = [*(n for n, p in block._declared.items() if p.kind == "param"), *block._aliases]
                found = [by_param[id(p)] for n in names if id(p := _tensor(block, n)) in by_param]
                found += [s for s in self.shards if any(i.block == path for i in s.bucket.items)]
                if found:
                    yield _Unit(path, block, list(dict.fromkeys(found)))

    # -- forward

    def _before(self, unit: _Unit, block: nn.Module, args: Any) -> None:
        if _in_backward():  # recomputation: freed when its gradients are there
            self._enter_backward(unit)
            return
        if self._depth == 0:
            self._forward.restart()
        self._depth += 1
        for s in unit.shards:
            self._users[s] += 1
        self._need(unit, self._forward)

    def _after(self, unit: _Unit, block: nn.Module, args: Any, out: Any) -> None:
        if _in_backward():
            return
        self._depth -= 1
        for s in unit.shards:
            self._users[s] -= 1
            self.release(s)
        if self._depth == 0 and self._forward.ahead is not None:
            self._drop(self._forward)
        if torch.is_grad_enabled():
            for t in pytree.tree_leaves(out):
                if isinstance(t, Tensor) and t.requires_grad:
                    t.register_hook(partial(self._on_grad, unit))

    # -- backward

    def _on_grad(self, unit: _Unit, grad: Tensor) -> None:
        self._enter_backward(unit)

    def _enter_backward(self, unit: _Unit) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            self._backward.restart()
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        if unit is not self._backward.last or any(not s.full for s in unit.shards):
            self._need(unit, self._backward)

    def _end_backward(self) -> None:
        self._task = -1
        self._backward.restart()
        for s in self.shards:
            self.release(s)

    # -- both

    def _need(self, unit: _Unit, order: _Order) -> None:
        following = order.enter(unit)
        if order.ahead is not None and order.ahead is not unit:
            self._drop(order)
        order.ahead = None
        for s in unit.shards:
            s.gather()
        if following is not None and following is not unit:
            order.ahead = following
            for s in following.shards:
                s.start_gather()

    def _drop(self, order: _Order) -> None:
        """What was fetched ahead is not needed after all."""
        unit, order.ahead = order.ahead, None
        for s in unit.shards:
            self.release(s)

    def release(self, shard: Shard) -> None:
        """Free a shard unless a forward still needs it."""
        if self._users[shard] == 0:
            shard.free()

    def restart(self) -> None:
        """Free everything: nothing is under way, whatever an error has left behind."""
        self._depth, self._task = 0, -1
        self._forward.restart()
        self._backward.restart()
        for s in self.shards:
            self._users[s] = 0
            s.free()


def _tensor(block: nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    return getattr(block.get_submodule(path), last, None)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
