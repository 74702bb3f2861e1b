"""Initial values for a module on the meta device: its own initialisation runs on the CPU, and each tensor is handed on and freed
as soon as nothing writes to it any more. Must not know placements or ranks: it hands whole tensors to `keep`.

The whole initialisation is defined by `initialise`; what `materialise` hands on is equal to it bit by bit for the same random state,
because the same functions draw the same numbers in the same order. Peak memory is what one submodule initialises at once.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autopar.errors import LayoutError

HOOKS = ("init_weights", "reset_parameters", "_reset_parameters")
# Looking at a tensor's form is no use of its numbers.
_FORM = ("shape", "dtype", "device", "requires_grad", "is_meta", "ndim", "layout", "is_leaf", "grad", "is_cuda", "grad_fn")
_PEEKS = {getattr(Tensor, n).__get__ for n in _FORM} | {
    getattr(Tensor, n) for n in ("size", "dim", "numel", "stride", "element_size", "is_floating_point", "is_complex", "__len__", "__hash__")
}
# What a freed tensor still says of itself.
_ON_CPU = {Tensor.device.__get__: torch.device("cpu"), Tensor.is_meta.__get__: False, Tensor.is_cuda.__get__: False}


def initialise(module: nn.Module) -> None:
    """Run a module's own initialisation, in place: its init_weights(), or every submodule's init_weights(), reset_parameters() or
    _reset_parameters(), in the order of construction: a module after those inside it.

    Raises LayoutError where an init_weights that has to be called asks for arguments.
    """
    if hasattr(module, "init_weights") and not _needs_arguments(module.init_weights):
        module.init_weights()
        return
    for name, m in _inner_first(module, "", set()):
        hook = next((h for h in HOOKS if callable(getattr(m, h, None))), None)
        if hook is None:
            continue
        if _needs_arguments(getattr(m, hook)):
            where = f"{name or type(m).__name__}.{hook}"
            raise LayoutError(f"{where} asks for arguments; give {type(module).__name__} an init_weights() without any, which calls it")
        getattr(m, hook)()


def materialise(module: nn.Module, keep: Callable[[str, Tensor], None], names: Collection[str]) -> None:
    """Call keep(name, tensor) once for each of the names with its initial value, drawn from torch's current random state.

    The module is not changed; tensors of it that are not on the meta device are initialised too, so that the draws are those of the
    whole, but not kept unless named. Raises LayoutError for names that the initialisation gives no value.
    """
    plan = _uses(module)
    state = torch.get_rng_state()
    try:
        _run(module, keep, set(names), plan)
    except _UsedAgain:
        torch.set_rng_state(state)
        _run(module, keep, set(names), None)


def _inner_first(module: nn.Module, name: str, seen: set[int]) -> list[tuple[str, nn.Module]]:
    if id(module) in seen:
        return []
    seen.add(id(module))
    found = [p for n, m in module.named_children() for p in _inner_first(m, f"{name}.{n}".lstrip("."), seen)]
    return [*found, (name, module)]


def _needs_arguments(fn: Callable[..., Any]) -> bool:
    try:
        inspect.signature(fn).bind()
    except TypeError:
        return True
    except ValueError:
        pass
    return False


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters are all on the meta device; real buffers are copied."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
        if not p.is_meta:
            memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    return copy.deepcopy(module, memo)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _place(t: Tensor) -> int:
    """The memory of a tensor; views share it."""
    return t.untyped_storage()._cdata


def _known(tree: Any, places: Collection[int]) -> set[int]:
    return {p for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and (p := _place(t)) in places}


class _Count(TorchFunctionMode):
    """Counts the calls that use each of the places."""

    def __init__(self, places: dict[int, int]):
        super().__init__()
        self.places, self.uses = places, Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _PEEKS:
            self.uses.update(self.places[p] for p in _known((args, kwargs), self.places))
        return func(*args, **(kwargs or {}))


def _uses(module: nn.Module) -> Counter | None:
    """How often the initialisation uses each piece of memory (numbered in order); None where it cannot run without numbers."""
    local = _on_meta(module)
    places = _numbered(local)
    drawn, others = torch.get_rng_state(), random.getstate()
    count = _Count(places)
    try:
        with count:
            initialise(local)
    except LayoutError:
        raise
    except Exception:
        return None
    finally:
        torch.set_rng_state(drawn)
        random.setstate(others)
    return count.uses


def _numbered(module: nn.Module) -> dict[int, int]:
    """The meta memory of a module's tensors -> its number, in the order of names."""
    places: dict[int, int] = {}
    for t in _tensors(module).values():
        if t.is_meta:
            places.setdefault(_place(t), len(places))
    return places


class _UsedAgain(Exception):
    """Memory was used after it had been freed."""


class _Real(TorchFunctionMode):
    """Runs every call on meta memory on real memory instead, which appears at its first use and goes after its last."""

    def __init__(self, places: dict[int, int], left: Counter | None, done: Callable[[int, _Real], None]):
        super().__init__()
        self.meta, self.left, self.done = places, Counter(left) if left is not None else None, done
        self.memory: dict[int, torch.UntypedStorage] = {}  # number -> real memory
        self.real: dict[int, int] = {}  # place of real memory -> number
        self.swapped: dict[int, Tensor] = {}  # id of a meta tensor -> what stands for it
        self.freed: set[int] = set()

    def swap(self, t: Any) -> Any:
        """What stands for a tensor: itself unless it is on the meta memory of the module."""
        if not isinstance(t, Tensor) or not t.is_meta or (number := self.meta.get(_place(t))) is None:
            return t
        if id(t) not in self.swapped:
            if number not in self.memory:
                self.memory[number] = torch.UntypedStorage(t.untyped_storage().nbytes())
                self.real[self.memory[number]._cdata] = number
            new = torch.empty(0, dtype=t.dtype).set_(self.memory[number], t.storage_offset(), t.size(), t.stride())
            self.swapped[id(t)] = nn.Parameter(new, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else new
        return self.swapped[id(t)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        peek = func in _PEEKS
        used = {self.meta[p] for p in _known((args, kwargs), self.meta)} | {self.real[p] for p in _known((args, kwargs), self.real)}
        if used & self.freed:
            if not peek:
                raise _UsedAgain
            return _ON_CPU[func] if func in _ON_CPU else func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map(self.swap, (args, kwargs or {}))
        out = func(*args, **kwargs)
        if self.left is not None and not peek:
            for number in used:
                self.left[number] -= 1
                if self.left[number] == 0:
                    self.done(number, self)
        return out

    def free(self, number: int, tensors: Collection[Tensor]) -> None:
        self.real.pop(self.memory.pop(number)._cdata, None)
        self.freed.add(number)
        for t in tensors:
            self.swapped.pop(id(t), None)


def _run(module: nn.Module, keep: Callable[[str, Tensor], None], names: set[str], plan: Counter | None) -> None:
    local = _on_meta(module)
    places, before = _numbered(local), _tensors(local)
    at: dict[int, list[str]] = {}
    for n, t in before.items():
        if t.is_meta:
            at.setdefault(places[_place(t)], []).append(n)
    given: dict[str, Tensor] = {}
    kept: set[str] = set()

    def done(number: int, mode: _Real) -> None:
        here = {n: before[n] for n in at[number]}
        for n, t in here.items():
            if n in names and n not in kept:
                keep(n, mode.swap(t).detach())
                kept.add(n)
        mode.free(number, here.values())

    mode = _Real(places, plan, done)
    with mode:
        initialise(local)
    for number in list(mode.memory):
        done(number, mode)
    # what the initialisation put in place of a tensor
    given = {n: t for n, t in _tensors(local).items() if n in names and not t.is_meta and (n not in kept or t is not before.get(n))}
    for n, t in given.items():
        keep(n, t.detach())
        kept.add(n)
    if lacking := sorted(names - kept):
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise LayoutError(
            f"nothing gives {lacking[0]}{more} a value: {type(module).__name__} is on the meta device, and no init_weights or "
            "reset_parameters sets it. "
            "Give the weights (parallelize(..., weights=...)), set it in init_weights(), or leave it off the meta device"
        )
