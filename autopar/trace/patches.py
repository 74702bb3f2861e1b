"""Patches: everything torch and Python must do differently while a trace runs, undone afterwards.
Must not know how calls are recorded: each patch hands the call to the tracer.
"""

from __future__ import annotations

import builtins
import contextlib
import logging
import math
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.trace import symbolic
from autopar.trace.flags import watched
from autopar.trace.leaves import LEAVES
from autopar.trace.names import qualified

_MARK = 7291  # stands for the hook in the constants of the template

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)
    _namespace: dict[str, Any] = {}
    exec(compile(f"def template(*args, **kwargs):\n    return ({_MARK})(args, kwargs)\n", "<autopar>", "exec"), _namespace)
_TEMPLATE: types.CodeType = _namespace["template"].__code__


def copy_of(fn: types.FunctionType, globals_: dict[str, Any] | None = None) -> types.FunctionType:
    """The same function as another object, so that it can be called while the first one's code is swapped."""
    out = types.FunctionType(fn.__code__, globals_ or fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    out.__kwdefaults__ = fn.__kwdefaults__
    return out


def inlined(fn: Any) -> types.FunctionType:
    """A copy of a torch.nn.functional function that does not hand itself to the mode, so that its body is traced."""
    off = {k: (lambda *_: False) for k in fn.__globals__ if k.startswith("has_torch_function")}
    return copy_of(fn, {**fn.__globals__, **off})


@contextlib.contextmanager
def swapped(fn: types.FunctionType, hook: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """While active every call of fn, also through references taken earlier, is hook(args, kwargs)."""
    code = fn.__code__
    consts = tuple(hook if c == _MARK else c for c in _TEMPLATE.co_consts)
    fn.__code__ = _TEMPLATE.replace(co_consts=consts, co_freevars=code.co_freevars, co_name=code.co_name, co_qualname=code.co_qualname)
    try:
        yield
    finally:
        fn.__code__ = code


@contextlib.contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextlib.contextmanager
def patched(tracer: Any) -> Iterator[None]:
    """All patches of one trace."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(torch.nn.Module, "__call__", _module_call(tracer)))
        stack.enter_context(watched(tracer))
        apply = torch.autograd.Function.__dict__["apply"].__func__
        stack.enter_context(swapped(apply, _function_apply(tracer, copy_of(apply))))
        generator = torch.utils.checkpoint._checkpoint_without_reentrant_generator
        stack.enter_context(swapped(generator, _checkpoint(tracer, copy_of(generator))))
        for leaf in LEAVES:
            stack.enter_context(swapped(leaf, _leaf(tracer, leaf, copy_of(leaf))))
        for name, value in _builtins(tracer).items():
            stack.enter_context(replaced(builtins, name, value))
        for name in ("sqrt", "log", "log2", "exp", "pow"):
            stack.enter_context(replaced(math, name, _math(getattr(math, name), name)))
        stack.enter_context(replaced(torch.jit.ScriptFunction, "__call__", _scripted(tracer)))
        for holder, names in _draws():
            for name in names:
                stack.enter_context(replaced(holder, name, _draw(tracer, getattr(holder, name), f"{holder.__name__}.{name}")))
        stack.enter_context(replaced(torch.autocast, "__init__", _autocast(tracer)))
        stack.enter_context(replaced(torch, "from_numpy", _from_numpy(tracer, torch.from_numpy)))
        # NB: torch logs a missing fake kernel as an error; the strategy deals with it
        stack.enter_context(replaced(logging.getLogger("torch._subclasses.fake_tensor"), "disabled", True))
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class Watch(TorchDispatchMode):
    """Sees the operations themselves, so that code which bypasses the torch-function level (a C++ extension) is noticed."""

    def __init__(self, tracer: Any) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.tracer.off and self.tracer.live:
            self.tracer.unseen(f"{func} is called by code the tracer cannot see")
        return func(*args, **(kwargs or {}))


def _module_call(tracer: Any) -> Callable[..., Any]:
    plain = torch.nn.Module.__call__

    def __call__(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if tracer.off:
            return plain(self, *args, **kwargs)
        if isinstance(self, torch.jit.ScriptModule):
            tracer.unseen(f"the module {tracer.paths.get(id(self), '')!r} is a ScriptModule")
        path = tracer.paths.get(id(self))
        if path is None:  # made inside forward: part of the module that made it
            return self._call_impl(*args, **kwargs)
        tracer.enter(path, qualified(type(self)), self, args=args, kwargs=kwargs)
        out = None
        try:
            out = self._call_impl(*args, **kwargs)
            return out
        finally:
            tracer.exit(out)

    return __call__


def _function_apply(tracer: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    def hook(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cls, *rest = args
        if tracer.off:
            return plain(*args, **kwargs)
        if cls is torch.utils.checkpoint.CheckpointFunction:
            return _reentrant(tracer, rest[0], rest[2:])
        if cls.__module__ == "torch.utils.checkpoint":
            return plain(*args, **kwargs)
        return tracer.leaf(cls, lambda *a, **k: plain(cls, *a, **k), tuple(rest), kwargs)

    return hook


def _reentrant(tracer: Any, fn: Callable[..., Any], args: list[Any]) -> Any:
    tracer.enter_recompute(fn)
    try:
        if torch.is_grad_enabled() and not any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            tracer.warn("reentrant checkpoint without an input that requires grad: as in eager mode, nothing inside it gets a gradient")
            with torch.no_grad():
                return fn(*args)
        return fn(*args)
    finally:
        tracer.exit()


def _checkpoint(tracer: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    def region(fn: Any) -> Iterator[None]:
        tracer.enter_recompute(fn)
        try:
            yield
        finally:
            tracer.exit()

    def hook(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return plain(*args, **kwargs) if tracer.off else region(args[0] if args else kwargs["fn"])

    return hook


def _leaf(tracer: Any, fn: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    def hook(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return plain(*args, **kwargs) if tracer.off else tracer.leaf(fn, plain, args, kwargs)

    return hook


def _builtins(tracer: Any) -> dict[str, Any]:
    """NB: these run in C and drop the int subclass, so a size would silently become a constant."""
    len_, max_, min_, range_ = builtins.len, builtins.max, builtins.min, builtins.range
    scalars = symbolic.SCALARS

    def length(x: Any, /) -> Any:
        if isinstance(x, torch.Tensor) and not tracer.off and x.dim():
            return x.size(0)
        return len_(x)

    def extreme(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def f(*args: Any, **kwargs: Any) -> Any:
            if len_(args) > 1 and not kwargs and any(type(a) in scalars for a in args) and all(isinstance(a, (int, float)) for a in args):
                return symbolic.apply(f"builtins.{name}", plain, *args)
            return plain(*args, **kwargs)

        return f

    class RangeMeta(type):
        def __instancecheck__(cls, x: Any) -> bool:
            return isinstance(x, range_)

        def __subclasscheck__(cls, c: Any) -> bool:
            return issubclass(c, range_)

    class Range(metaclass=RangeMeta):
        def __new__(cls, *args: Any) -> Any:
            return range_(*[symbolic.guard(a) if type(a) in scalars else a for a in args])

    return {"len": length, "max": extreme("max", max_), "min": extreme("min", min_), "range": Range}


def _math(plain: Callable[..., Any], name: str) -> Callable[..., Any]:
    def f(*args: Any) -> Any:
        if any(type(a) in symbolic.SCALARS for a in args):
            return symbolic.apply(f"math.{name}", plain, *args)
        return plain(*args)

    return f


def _scripted(tracer: Any) -> Callable[..., Any]:
    plain = torch.jit.ScriptFunction.__call__

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not tracer.off:
            tracer.unseen(f"{self.name} is a ScriptFunction")
        return plain(self, *args, **kwargs)

    return __call__


def _autocast(tracer: Any) -> Callable[..., Any]:
    """NB: generated code casts on the module's own device, so a trace that runs on the CPU casts there, whatever device is named."""
    plain = torch.autocast.__init__

    def __init__(self: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> None:
        if device_type == "cuda" and tracer.strategy.runs_on == "cpu" and not tracer.off:
            device_type, dtype = "cpu", dtype or torch.get_autocast_dtype("cuda")
        plain(self, device_type, dtype, enabled, cache_enabled)
        if enabled and not self._enabled and not tracer.off:
            tracer.warn(f"autocast for {device_type} does nothing without such a device, and is not recorded; trace where there is one")

    return __init__


def _draws() -> list[tuple[Any, list[str]]]:
    """Python and NumPy functions whose results are frozen by a trace."""
    python = "random randint randrange uniform choice choices sample shuffle gauss normalvariate getrandbits"
    found: list[tuple[Any, list[str]]] = [(random, python.split())]
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy = "rand randn randint random uniform normal choice shuffle permutation random_sample binomial beta poisson"
        found.append((numpy_random, numpy.split()))
    return found


def _draw(tracer: Any, plain: Callable[..., Any], name: str) -> Callable[..., Any]:
    def f(*args: Any, **kwargs: Any) -> Any:
        if not tracer.off:
            tracer.warn(f"{name} is drawn: its result is a constant of the trace")
        return plain(*args, **kwargs)

    return f


def _from_numpy(tracer: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    def from_numpy(array: Any) -> Any:
        if not tracer.off:
            tracer.warn("torch.from_numpy makes a constant of the trace")
        with tracer.hidden():
            return plain(array)

    return from_numpy
