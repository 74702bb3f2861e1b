"""The ledger of a trace: values, events, regions, scalars and reads, and how arguments become references.
Must not know how ops are executed or what a function means; tracer.py tells it what happened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import torch

from autopar.errors import TraceError
from autopar.ir.graph import Context, Global, Ref, Tensor
from autopar.trace import symbolic, trees
from autopar.trace.arguments import named_values, tensors_in
from autopar.trace.flags import Flags
from autopar.trace.known import Known
from autopar.trace.names import qualified
from autopar.trace.recording import Enter, Exit, RecordedGuard, RecordedOp
from autopar.trace.sources import Sources
from autopar.trace.state import ModuleState
from autopar.trace.strategies import Real
from autopar.trace.values import DATA_SHAPE, INPUT, NUMBERS, PARAM, RANDOM, SHAPE, Values

DEVICE = Global("autopar:device")

_functorch_level = torch._C._functorch.peek_interpreter_stack


class ValueReadError(TraceError):
    """The model reads numbers that the strategy does not compute."""


class Ledger:
    """What a running trace knows. `live` is False once it is over; `off` is True inside a recorded call."""

    def __init__(self, module: torch.nn.Module, strategy: Real, *, fold: bool, device: torch.device, state: ModuleState) -> None:
        self.strategy, self.fold, self.device, self.state = strategy, fold, device, state
        self.live, self.off = True, False
        self.values = Values()
        self.events: list[RecordedOp | RecordedGuard | Enter | Exit] = []
        self.warnings: dict[str, None] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.failure: TraceError | None = None
        self.sources = Sources()
        self.flags = Flags(self.sources, module.training)
        self.paths = {id(m): name for name, m in module.named_modules()}
        self.modules: list[tuple[str, torch.nn.Module | None]] = []  # the module calls that run, outermost first
        self._contexts: dict[Any, Context] = {}
        self._external: dict[int, tuple[str, Tensor, torch.Tensor]] = {}  # id -> (name, description, what stands in for it)
        self._kept: list[Any] = []  # constants, so that their ids stay taken
        self._shared: set[int] = set()  # memories that outlive the run: inputs, parameters, buffers, constants
        self._scopes: list[dict[Any, Any]] = [{}]  # scalars computed so far in each running region
        # of the call being recorded
        self._tensors: list[torch.Tensor] = []
        self._bits = 0
        self._remap = False

    # ---- arguments --------------------------------------------------------------------------------------------------

    def _encode_call(self, known: Known, args: Any, kwargs: Any) -> tuple[list[torch.Tensor], int, tuple[Any, ...], dict[str, Any]]:
        if _functorch_level() is not None:
            self.unseen(f"{known.short} inside torch.vmap or torch.func")
        self._tensors, self._bits, self._remap = [], 0, False
        encode = self._encode
        rec_args = tuple([encode(a, known) for a in args])
        rec_kwargs = {k: encode(v, known) for k, v in kwargs.items()} if kwargs else {}
        if isinstance(rec_kwargs.get("device"), (str, int)) or (known.short == "to" and len(args) > 1 and type(args[1]) is str):
            rec_args, rec_kwargs = self._devices(rec_args, rec_kwargs)
        return self._tensors, self._bits, rec_args, rec_kwargs

    def _encode(self, a: Any, known: Known) -> Any:
        kind = type(a)
        if kind is torch.device:
            return self._device(a)
        if kind in trees.LITERALS:
            return a
        if isinstance(a, torch.Tensor) or kind in symbolic.SCALARS:
            return self._leaf(a)
        if kind is tuple or kind is torch.Size:
            return tuple([self._encode(x, known) for x in a])
        if kind is list:
            return [self._encode(x, known) for x in a]
        try:
            return trees.encode(a, self._leaf, f"an argument of {known.fn or known.short}")
        except TraceError as e:
            self.fail(str(e))

    def _leaf(self, a: Any) -> Ref:
        if type(a) in symbolic.SCALARS:
            self._remap = True
            if a.tracer is not self:
                return symbolic.plain(a)  # type: ignore[no-any-return]
            self._bits |= self.values.bits[a.vid] | SHAPE
            return self.values.refs[a.vid]
        vid = self.values.find(a)
        if vid is None:
            vid = self._adopt(a)
            a = self._canonical(a)
        self._tensors.append(a)
        self._bits |= self.values.bits[vid]
        return self.values.refs[vid]

    def _device(self, device: torch.device) -> Any:
        if device == self.device or device == self.strategy.device or (self.strategy.name == "meta" and device.type in ("meta", "cuda")):
            if device != self.strategy.device:
                self._remap = True
            return DEVICE
        return device

    def _devices(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Device names given as text."""
        if isinstance(kwargs.get("device"), (str, int)):
            kwargs["device"] = self._device(torch.device(kwargs["device"]))
        if len(args) > 1 and type(args[1]) is str:
            args = (args[0], self._device(torch.device(args[1])), *args[2:])
        self._remap = True
        return args, kwargs

    def _local(self, tree: Any) -> Any:
        """Arguments as the strategy runs them: stand-ins for the user's tensors, plain numbers, its own device."""
        kind = type(tree)
        if isinstance(tree, torch.Tensor):
            return self._canonical(tree)
        if kind in symbolic.SCALARS:
            return symbolic.plain(tree)
        if kind is torch.device:
            return self.strategy.device if self._device(tree) is DEVICE else tree
        if kind is tuple or kind is torch.Size:
            return tuple([self._local(x) for x in tree])
        if kind is list:
            return [self._local(x) for x in tree]
        if kind is dict:
            out = {k: self._local(v) for k, v in tree.items()}
            if isinstance(out.get("device"), (str, int)) and self._device(torch.device(out["device"])) is DEVICE:
                out["device"] = self.strategy.device
            return out
        if kind is slice:
            return slice(self._local(tree.start), self._local(tree.stop), self._local(tree.step))
        if isinstance(tree, tuple) and hasattr(kind, "_fields"):
            return kind(*[self._local(x) for x in tree])
        return tree

    # ---- tensors that were there before -----------------------------------------------------------------------------

    def place(self, name: str, described: Tensor, original: torch.Tensor, stand_in: torch.Tensor) -> None:
        """Make a parameter or buffer known; it becomes a value when it is first used."""
        entry = (name, described, stand_in)
        self._external[id(original)] = entry
        self._external[id(stand_in)] = entry

    def input(self, tensor: torch.Tensor, name: str) -> int:
        grad = tensor.is_floating_point() or tensor.is_complex()
        vid = self.values.tensor(tensor, name, "input", grad=grad, bits=INPUT | SHAPE)
        self._shared.add(self.values.list[vid].storage)
        return vid

    def _canonical(self, t: torch.Tensor) -> torch.Tensor:
        entry = self._external.get(id(t))
        return t if entry is None else entry[2]

    def _adopt(self, t: torch.Tensor) -> int:
        """The value of a tensor that no recorded op made: a parameter, buffer or constant."""
        entry = self._external.get(id(t))
        if entry is None:
            entry = self._constant(t)
        name, described, stand_in = entry
        if stand_in is not t:
            self._remap = True
        vid = self.values.find(stand_in)
        if vid is not None:
            return vid
        bits = {"param": PARAM, "buffer": INPUT, "constant": 0}[described.kind]
        vid = self.values.tensor(stand_in, name.rpartition(".")[2], described.kind, grad=described.grad, bits=bits, qualified=name)
        self._shared.add(self.values.list[vid].storage)
        return vid

    def _constant(self, t: torch.Tensor) -> tuple[str, Tensor, torch.Tensor]:
        if t.grad_fn is not None:
            self.unseen(f"a tensor was made by code the tracer cannot see (its grad_fn is {t.grad_fn.name()})")
        if t.requires_grad:
            self.fail(
                "a tensor that requires grad is neither a registered parameter nor an input; register it (nn.ParameterList for lists); "
                "if the module builds parts of itself on its first call, run it once before tracing"
            )
        if not self.strategy.readable(t) or t.is_meta:
            if t.is_meta:
                self.fail("a tensor attribute on the meta device has no numbers; make it a registered buffer")
            self.unseen("a tensor was made by code the tracer cannot see")
        path = self.modules[-1][0] if self.modules else ""
        n = 0
        while (name := f"{path}.constant{n}".lstrip(".")) in self.constants:
            n += 1
        with self.hidden():
            stand_in = self.strategy.constant(t)
            self.constants[name] = t.detach().clone()
            self.state.save_data(t)
        described = Tensor(name, "constant", tuple(t.shape), str(t.dtype).removeprefix("torch."), False)
        self.place(name, described, t, stand_in)
        self._kept.append((t, stand_in))
        return self._external[id(t)]

    def described_constants(self) -> list[Tensor]:
        found = {e[0]: e[1] for e in self._external.values() if e[1].kind == "constant"}
        return list(found.values())

    def _save_before_write(self, t: torch.Tensor) -> None:
        """Keep the numbers of a real parameter whose memory is about to be written, to put them back after the trace."""
        vid = self.values.find(t)
        if vid is None or self.strategy.name == "meta" or self.values.list[vid].storage not in self._shared:
            return
        for _, tensor, stand_in in self._external.values():
            found = self.values.find(stand_in)
            if tensor.kind == "param" and found is not None and self.values.list[found].storage == self.values.list[vid].storage:
                with self.hidden():
                    self.state.save_data(stand_in)

    # ---- scalars (called by symbolic.py) ----------------------------------------------------------------------------

    def size(self, vid: int, dim: int, value: int) -> Any:
        bits = self.values.bits[vid]
        return self.scalar(
            "torch.Tensor.size",
            (self.values.refs[vid], dim),
            value,
            f"size_{dim}",
            (bits & (DATA_SHAPE | SHAPE)) | INPUT | self._of_data(bits),
        )

    @staticmethod
    def _of_data(bits: int) -> int:
        return bits & NUMBERS if bits & DATA_SHAPE else 0

    def scalar(self, fn: str, args: tuple[Any, ...], value: Any, name: str, bits: int) -> Any:
        """The symbolic result of a scalar op; computed once in each region."""
        key = (fn, *[(type(a), a) for a in args])
        found = self._scopes[-1].get(key)
        if found is None:
            source, names = self.sources.where(2)
            vid = self.values.scalar(value, names[0] if len(names) == 1 else name, bits)
            self.events.append(RecordedOp(fn, args, {}, self.values.refs[vid], source, self.context()))
            found = self._scopes[-1][key] = vid
        return value if isinstance(value, bool) else symbolic.make(value, self, found)

    def scalar_op(self, fn: str, operands: tuple[Any, ...], value: Any) -> Any:
        if self.off:
            return value
        args, bits = self._operands(operands)
        return self.scalar(fn, args, value, fn.rpartition(".")[2], bits)

    def scalar_compare(self, fn: str, a: Any, b: Any, result: bool) -> bool:
        if not self.off:
            args, bits = self._operands((a, b))
            self.scalar(fn, args, result, fn.rpartition(".")[2], bits)
            self.read(self._scopes[-1][(fn, *[(type(x), x) for x in args])], "bool", result)
        return result

    def scalar_guard(self, x: Any) -> None:
        if not self.off:
            value = symbolic.plain(x)
            self.read(x.vid, "int" if isinstance(value, int) else "float", value)

    def _operands(self, operands: tuple[Any, ...]) -> tuple[tuple[Any, ...], int]:
        bits = 0
        out = []
        for o in operands:
            if type(o) in symbolic.SCALARS and o.tracer is self:
                bits |= self.values.bits[o.vid]
                out.append(self.values.refs[o.vid])
            else:
                out.append(symbolic.plain(o))
        return tuple(out), bits

    # ---- regions ----------------------------------------------------------------------------------------------------

    def enter(
        self, path: str, cls: str, module: torch.nn.Module | None, recompute: bool = False, args: Any = (), kwargs: Any = None
    ) -> None:
        inputs = named_values(module, args, kwargs or {}, self._known_id) if module is not None and not recompute else ()
        self.events.append(Enter(path, cls, recompute, inputs))
        self.modules.append((path, module))
        self._scopes.append({})

    def exit(self, out: Any = None) -> None:
        ids = tuple(map(self._known_id, tensors_in(out))) if out is not None else ()
        names = self.sources.where(2)[1] if ids else ()
        self.events.append(Exit(ids, names if len(names) == len(ids) else ()))
        self.modules.pop()
        self._scopes.pop()

    def _known_id(self, x: Any) -> int | None:
        return x.vid if type(x) in symbolic.SCALARS else self.values.find(x)

    def read_flag(self, module: torch.nn.Module, frame: FrameType) -> None:
        """Python code reads module.training."""
        with self.hidden():
            self.flags.read(module, self.modules[-1][0] if self.modules else "", frame)

    def enter_recompute(self, fn: Any) -> None:
        """A checkpointed function begins: a region of its own at the enclosing module's path."""
        path, module = self.modules[-1] if self.modules else ("", None)
        while hasattr(fn, "func"):  # functools.partial
            fn = fn.func
        target = fn if hasattr(fn, "__qualname__") else type(fn)
        self.enter(path, qualified(target), module, True)

    # ---- reads, messages --------------------------------------------------------------------------------------------

    def read(self, vid: int, how: str, expected: Any) -> None:
        """The program looked at a value: a guard if only inputs decide it, a warning if more does."""
        bits = self.values.bits[vid]
        if bits & PARAM:
            self.warn("a value that depends on parameters is read: the path taken is frozen")
        elif bits & RANDOM:
            self.warn("a random number is read: the path taken is frozen")
        elif bits & INPUT:
            key = ("guard", vid, how)
            if key not in self._scopes[-1]:
                self._scopes[-1][key] = True
                source, _ = self.sources.where(2)
                self.events.append(RecordedGuard(self.values.refs[vid], how, expected, source))

    def warn(self, what: str) -> None:
        source, _ = self.sources.where(2)
        self.warnings[f"{source}: `{source.text}`: {what}"] = None

    def fail(self, what: str, error: type[TraceError] = TraceError) -> NoReturn:
        """Stop the trace; the message names the user's line. Kept, in case the model swallows the exception."""
        source, _ = self.sources.where(2)
        failure = error(f"{source}: `{source.text}`: {what}")
        self.failure = self.failure or failure
        raise failure

    def unseen(self, what: str) -> NoReturn:
        self.fail(f"{what}; the tracer cannot look inside: register the enclosing function as one op with autopar.register_op")

    def need_values(self, what: str) -> NoReturn:
        self.fail(
            f"{what} numbers that depend on parameters or floating inputs, which trace_strategy='meta' does not compute; "
            "use 'cpu', 'cuda' or 'cuda_run_cpu_offload'",
            ValueReadError,
        )

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Calls inside are not recorded."""
        before, self.off = self.off, True
        try:
            yield
        finally:
            self.off = before

    def context(self) -> Context:
        """The ambient state an op runs under."""
        on = tuple([d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)])
        key: Any = (torch.is_grad_enabled(), on)
        if on:
            key = (*key, *[torch.get_autocast_dtype(d) for d in on])
        found = self._contexts.get(key)
        if found is None:
            autocast = tuple((d, str(torch.get_autocast_dtype(d)).removeprefix("torch."), True) for d in on)
            found = self._contexts[key] = Context(key[0], autocast)
        return found
