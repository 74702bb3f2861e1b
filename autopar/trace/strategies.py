"""Strategies: what executes the ops while tracing (on real, fake or borrowed tensors).
Must not know recordings or names; each strategy only turns (function, arguments) into results.

meta is a hybrid: parameters and floating inputs are fake; what depends on neither (masks, positions, token ids) is
computed for real below a size limit, so that reads of it work and libraries take the path they take in training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode

from autopar.config import TRACE_STRATEGIES
from autopar.errors import ConfigError, TraceError, suggest

log = logging.getLogger("autopar.trace")

REAL_LIMIT = 1 << 22  # elements: larger tensors of the hybrid are fake even if they could be computed
BORROW_LIMIT = 1 << 26  # elements: up to here a missing fake kernel is replaced by the real one on zeros
BORROWED = frozenset(["ctc_loss"])  # torch says the result's shape depends on numbers; it does not
NEEDS_CUDA = ("cuda", "cuda_run_cpu_offload")

Tensor = torch.Tensor


class ValueNeeded(Exception):
    """A fake tensor's numbers were asked for."""


class _Attach(torch.autograd.Function):
    """Gives `box[0]` a history, as if it had been computed from `anchor`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, box: list[Tensor]) -> Tensor:  # type: ignore[override]
        return box[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise TraceError("this trace strategy keeps no autograd history; use trace_strategy='cpu' or 'cuda'")


def attach(out: Any, tensors: list[Tensor]) -> Any:
    """Results computed without history, made to require grad if one of the inputs does."""
    anchor = next((t for t in tensors if t.requires_grad), None) if torch.is_grad_enabled() else None
    if anchor is None:
        return out
    return map_tensors(out, lambda t: _Attach.apply(anchor, [t]) if t.is_floating_point() or t.is_complex() else t)


def map_tensors(tree: Any, f: Callable[[Tensor], Any]) -> Any:
    """The tree with f applied to tensors."""
    kind = type(tree)
    if isinstance(tree, Tensor):
        return f(tree)
    if kind is tuple or kind is torch.Size:
        return tuple([map_tensors(x, f) for x in tree])
    if kind is list:
        return [map_tensors(x, f) for x in tree]
    if isinstance(tree, tuple):  # named tuples and torch.return_types
        items = [map_tensors(x, f) for x in tree]
        return kind(*items) if hasattr(kind, "_make") else kind(items)
    if kind is dict:
        return {k: map_tensors(v, f) for k, v in tree.items()}
    if kind is slice:
        return slice(map_tensors(tree.start, f), map_tensors(tree.stop, f), map_tensors(tree.step, f))
    return tree


class Real:
    """Runs ops as they are, on one device."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device

    @property
    def runs_on(self) -> str:
        """The kind of device that ops run on, or pretend to."""
        return self.device.type

    def place(self, tensor: Tensor, buffer: bool) -> Tensor:
        """What stands in for a parameter or buffer of the module while tracing. Buffers are always copies."""
        if tensor.is_meta:
            raise TraceError(f"trace_strategy={self.name!r} runs the model for real, but its tensors are on the meta device; use 'meta'")
        if not buffer and tensor.device == self.device:
            return tensor
        with torch.no_grad():
            out = tensor.detach().to(self.device, copy=True)
        if isinstance(tensor, torch.nn.Parameter):
            out = torch.nn.Parameter(out, requires_grad=tensor.requires_grad)
        return out

    def input(self, tensor: Tensor) -> Tensor:
        """A private copy of an input."""
        if tensor.is_meta:
            raise TraceError(
                f"trace_strategy={self.name!r} runs the model for real, but an input is on the meta device; use 'meta' or give a real input"
            )
        return tensor.detach().to(self.device, copy=True).requires_grad_(tensor.requires_grad)

    def constant(self, tensor: Tensor) -> Tensor:
        """What an unregistered tensor of the user's is run as."""
        return tensor if tensor.device == self.device else tensor.to(self.device)

    def run(self, func: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor], *, writes: bool, params: bool) -> Any:
        """Execute one call. writes: it may write in place. params: its inputs depend on parameters."""
        return func(*args, **kwargs)

    def readable(self, tensor: Tensor) -> bool:
        return True


class Meta(Real):
    """The hybrid of fake and real tensors; everything is on one pretended CPU."""

    def __init__(self) -> None:
        super().__init__("meta", torch.device("cpu"))
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._written: dict[int, Tensor] = {}  # real memory that fake values were written to: its numbers mean nothing now
        self._stand_in: dict[int, tuple[Tensor, Tensor]] = {}

    def fake(self, tensor: Tensor) -> FakeTensor:
        with torch.no_grad():
            shape = (
                tensor.detach()
                if tensor.is_meta
                else torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
            )
            return FakeTensor(self.mode, shape, self.device)

    def place(self, tensor: Tensor, buffer: bool) -> Tensor:
        if buffer and not tensor.is_meta and tensor.numel() <= REAL_LIMIT:
            return super().place(tensor, buffer)
        out = self.fake(tensor)
        out.requires_grad_(tensor.requires_grad)
        if isinstance(tensor, torch.nn.Parameter):
            out._is_param = True  # type: ignore[attr-defined]  # NB: what isinstance(x, nn.Parameter) looks at
        return out

    def input(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta or tensor.is_floating_point() or tensor.is_complex() or tensor.numel() > REAL_LIMIT:
            return self.fake(tensor).requires_grad_(tensor.requires_grad)
        return super().input(tensor)

    def constant(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor) or not (tensor.is_meta or tensor.device.type != "cpu"):
            return tensor
        known = self._stand_in.get(id(tensor))
        if known is None:
            out = self.fake(tensor) if tensor.is_meta or tensor.numel() > REAL_LIMIT else tensor.detach().cpu()
            known = self._stand_in[id(tensor)] = (tensor, out)
        return known[1]

    def readable(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, FakeTensor) and not self._unknown(tensor)

    def _unknown(self, tensor: Tensor) -> bool:
        return bool(self._written) and tensor.untyped_storage()._cdata in self._written

    def run(self, func: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor], *, writes: bool, params: bool) -> Any:
        real = [t for t in tensors if not isinstance(t, FakeTensor)]
        if len(real) == len(tensors):
            if not self._written or not any(self._unknown(t) for t in real):
                return self._run_real(func, args, kwargs, tensors)
        elif writes and real:
            target = kwargs["out"] if "out" in kwargs else args[0]
            if isinstance(target, Tensor) and not isinstance(target, FakeTensor):
                self._written[target.untyped_storage()._cdata] = target
        if not self._written:
            return self._run_fake(func, args, kwargs, tensors)
        originals: dict[int, Tensor] = {}

        def stand_in(t: Tensor) -> Tensor:
            if isinstance(t, FakeTensor) or not self._unknown(t):
                return t
            f = self.mode.from_tensor(t)  # memoised: in-place history stays with the tensor
            originals[id(f)] = t
            return f

        args, kwargs = map_tensors(args, stand_in), map_tensors(kwargs, stand_in)
        out = self._run_fake(func, args, kwargs, tensors)
        return originals.get(id(out), out) if originals else out

    def _run_real(self, func: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        bound = 1
        for t in tensors:
            bound *= t.numel() or 1
        if bound <= REAL_LIMIT:
            bound *= _product((args, kwargs))
        if bound <= REAL_LIMIT:
            return func(*args, **kwargs)
        out = self._run_fake(func, args, kwargs, tensors)
        sizes: list[int] = []
        map_tensors(out, lambda t: sizes.append(t.numel()))
        return func(*args, **kwargs) if sum(sizes) <= REAL_LIMIT else out

    def _run_fake(self, func: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        try:
            with self.mode:
                return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as e:
            if getattr(func, "__name__", "") in BORROWED:
                return self._borrow(func, args, kwargs, tensors)
            raise ValueNeeded(str(e)) from e
        except (RuntimeError, NotImplementedError):
            if sum(t.numel() for t in tensors) > BORROW_LIMIT:
                raise
            return self._borrow(func, args, kwargs, tensors)

    def _borrow(self, func: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """The fake kernel is missing or stricter than the real one: learn the result's shape from zeros."""
        originals: dict[int, Tensor] = {}

        def zeros(t: Tensor) -> Tensor:
            z = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype).zero_() if isinstance(t, FakeTensor) else t.clone()
            originals[id(z)] = t
            return z

        args, kwargs = map_tensors(args, zeros), map_tensors(kwargs, zeros)
        with torch.no_grad():
            out = func(*args, **kwargs)
        return attach(map_tensors(out, lambda t: originals[id(t)] if id(t) in originals else self.fake(t)), tensors)


def _product(tree: Any) -> int:
    n = 1
    for x in tree.values() if type(tree) is dict else tree:
        if type(x) is int:
            n *= max(x, 1)
        elif type(x) in (tuple, list, dict):
            n *= _product(x)
        if n > REAL_LIMIT:
            break
    return n


class Offload(Real):
    """Tensors live on the CPU; each op runs on another device, or on the CPU if that is out of memory."""

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__(name, torch.device("cpu"))
        self.remote = device

    @property
    def runs_on(self) -> str:
        return self.remote.type

    def run(self, func: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor], *, writes: bool, params: bool) -> Any:
        if writes or self.remote == self.device or not params:
            return func(*args, **kwargs)
        moved: dict[int, Tensor] = {}

        def away(t: Tensor) -> Tensor:
            if id(t) not in moved:
                moved[id(t)] = t.detach().to(self.remote)
            return moved[id(t)]

        try:
            with torch.no_grad():
                out = func(*map_tensors(args, away), **map_tensors(kwargs, away))
                memory = {t.untyped_storage()._cdata for t in moved.values()}
                shares: list[bool] = []
                map_tensors(out, lambda t: shares.append(t.untyped_storage()._cdata in memory))
                if not any(shares):  # NB: a view must stay a view of the CPU tensor
                    return attach(map_tensors(out, lambda t: t.to(self.device)), tensors)
        except torch.OutOfMemoryError:
            log.info("%s: out of memory on %s, runs on the CPU", getattr(func, "__name__", func), self.remote)
        except RuntimeError:  # e.g. a device named in the arguments; the CPU run below tells what is wrong, if anything is
            log.debug("%s failed on %s", getattr(func, "__name__", func), self.remote, exc_info=True)
        return func(*args, **kwargs)


class Reuse(Offload):
    """Offload that does not run an op again whose like it has run: same function, shapes and settings.

    Only ops on floating tensors that depend on parameters are reused, so masks and indices stay exact.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__("reuse_cache", device)
        self._results: dict[Any, Any] = {}

    def run(self, func: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor], *, writes: bool, params: bool) -> Any:
        if writes or not params or not all(t.is_floating_point() for t in tensors):
            return super().run(func, args, kwargs, tensors, writes=writes, params=params)
        key = (func, repr(map_tensors((args, kwargs), _signature)), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
        if key in self._results:
            with torch.no_grad():
                out = map_tensors(self._results[key], lambda t: t.clone())
            return attach(out, tensors)
        out = super().run(func, args, kwargs, tensors, writes=writes, params=params)
        memory = {t.untyped_storage()._cdata for t in tensors}
        fresh: list[bool] = []
        map_tensors(out, lambda t: fresh.append(t.untyped_storage()._cdata not in memory))
        if fresh and all(fresh):
            self._results[key] = map_tensors(out, lambda t: t.detach())
        return out


def _signature(t: Tensor) -> Any:
    return str((tuple(t.shape), t.stride(), t.dtype, t.requires_grad))


def pick(name: str, module: torch.nn.Module) -> Real:
    """The strategy of a name other than 'auto'. Raises ConfigError if it is unknown or this machine cannot run it."""
    if name == "meta":
        return Meta()
    if name not in TRACE_STRATEGIES:
        raise ConfigError(f"unknown trace_strategy {name!r}: {suggest(name, TRACE_STRATEGIES)}")
    cuda = torch.cuda.is_available()
    if name in NEEDS_CUDA and not cuda:
        working = ", ".join(repr(s) for s in TRACE_STRATEGIES if s not in NEEDS_CUDA)
        raise ConfigError(f"trace_strategy={name!r} needs a CUDA device and there is none here; these work: {working}")
    if name == "cpu":
        return Real(name, torch.device("cpu"))
    if name == "cuda":
        return Real(name, torch.device("cuda", torch.cuda.current_device()))
    remote = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return Offload(name, remote) if name == "cuda_run_cpu_offload" else Reuse(remote)
