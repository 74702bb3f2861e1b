"""The mode: records every torch-level call of a running module.
Must not know blocks (build.py) nor what the recording is used for; how ops are executed is strategies.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from autopar.errors import TraceError
from autopar.ir.graph import Context, Global, Ref, Source, Tensor
from autopar.trace import symbolic, trees
from autopar.trace.known import BLANK, BY_CONTENT, DATA_SHAPES, DETACHED, ELIDED, FROM_DATA, READS, Known, classify
from autopar.trace.names import import_name, qualified
from autopar.trace.recording import Enter, Exit, RecordedGuard, RecordedOp
from autopar.trace.sources import Sources
from autopar.trace.state import ModuleState
from autopar.trace.strategies import Real, ValueNeeded, map_tensors
from autopar.trace.values import DATA_SHAPE, INPUT, NUMBERS, PARAM, RANDOM, SHAPE, Values

LIST_LIMIT = 4096  # elements: larger lists read from tensors are not guarded
DEVICE = Global("autopar:device")

_functorch_level = torch._C._functorch.peek_interpreter_stack


class ValueReadError(TraceError):
    """The model reads numbers that the strategy does not compute."""


class Tracer(TorchFunctionMode):
    """Records while active as a mode. `live` is False once the trace is over; `off` is True inside a recorded call."""

    def __init__(self, module: torch.nn.Module, strategy: Real, *, fold: bool, device: torch.device, state: ModuleState) -> None:
        super().__init__()
        self.strategy, self.fold, self.device, self.state = strategy, fold, device, state
        self.live, self.off, self.op_failed = True, False, False
        self.values = Values()
        self.events: list[RecordedOp | RecordedGuard | Enter | Exit] = []
        self.warnings: dict[str, None] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.failure: TraceError | None = None
        self.sources = Sources()
        self.paths: dict[int, str] = {}
        for name, m in module.named_modules():
            self.paths[id(m)] = name
        self.modules: list[tuple[str, torch.nn.Module | None]] = []  # the module calls that run, outermost first
        self._known: dict[Any, Known] = {}
        self._contexts: dict[Any, Context] = {}
        self._external: dict[int, tuple[str, Tensor, torch.Tensor]] = {}  # id -> (name, description, what stands in for it)
        self._shared: set[int] = set()  # memories that outlive the run: inputs, parameters, buffers, constants
        self._scopes: list[dict[Any, Any]] = [{}]  # scalars computed so far in each running region
        self._inlined: dict[Any, Callable[..., Any]] = {}
        # of the call being recorded
        self._tensors: list[torch.Tensor] = []
        self._bits = 0
        self._remap = False

    # ---- the mode ---------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.off:
            return func(*args, **kwargs)
        known = self._known.get(func)
        if known is None:
            known = self._known[func] = self._classify(func)
        kind = known.kind
        if kind == "op":
            return self.call(known, func, args, kwargs)
        return getattr(self, "_" + kind)(known, func, args, kwargs)

    def _classify(self, func: Any) -> Known:
        try:
            return classify(func)
        except TraceError as e:
            self.fail(str(e))

    def call(self, known: Known, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run one call and record it as an op."""
        if known.short in FROM_DATA and _holds_array((args, kwargs)):
            self.warn("a NumPy array becomes a constant of the trace")
            return self._free(known, func, args, kwargs)
        tensors, bits, rec_args, rec_kwargs = self._encode_call(known, args, kwargs)
        if self._remap:
            args, kwargs = self._local(args), self._local(kwargs)
        if known.writes and tensors:
            self._save_before_write(tensors[0])
        versions = [_version(t) for t in tensors]
        out = self._run(known, func, args, kwargs, tensors, bits)
        return self._record(known, rec_args, rec_kwargs, args, kwargs, tensors, bits, versions, out)

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

    def _run(self, known: Known, func: Callable[..., Any], args: Any, kwargs: Any, tensors: list[torch.Tensor], bits: int) -> Any:
        self.off = True
        try:
            return self.strategy.run(func, args, kwargs, tensors, writes=known.writes or "out" in kwargs, params=bool(bits & PARAM))
        except ValueNeeded:
            self.need_values(f"{known.fn or known.short} needs")
        except Exception:
            self.op_failed = True
            raise
        finally:
            self.off = False

    def _record(
        self, known: Known, rec_args: Any, rec_kwargs: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], bits: int, versions: list[int], out: Any
    ) -> Any:
        values = self.values
        short = known.short
        ctx = self.context()
        grad_in = ctx.grad and any(values.list[values.find(t)].grad for t in tensors)  # type: ignore[index]
        shape_known = not (ctx.grad and any(t.requires_grad for t in tensors))
        if short in BLANK:
            bits &= ~NUMBERS
        if known.random:
            bits |= RANDOM
        if bits & NUMBERS and (short in DATA_SHAPES or (short in BY_CONTENT and _by_content(short, args, kwargs))):
            bits |= DATA_SHAPE | SHAPE
        if short in DETACHED or short in BLANK:
            grad_in = False

        written = [t for t, v in zip(tensors, versions, strict=True) if _version(t) != v]
        for t in _written_by_name(known, args, kwargs):
            if not any(t is w for w in written):
                written.append(t)
        keep = {id(t) for t in written}
        if isinstance(out, torch.Tensor) and id(out) not in keep and values.find(out) is not None:
            if short in ELIDED and not written:
                return out
        source, names = self.sources.where(2)
        out = self._unshare(out, keep)
        pairs: list[tuple[int, int]] = []
        effect = known.random
        seen: set[int] = set()
        for t in written:
            if self._write(t, pairs, seen, (grad_in or (t.requires_grad and ctx.grad)) and short != "detach_", bits, short):
                effect = True
        training = bool(pairs) and self._counts_batches(pairs[0][0])

        def bind(t: torch.Tensor, name: str) -> Ref:
            vid = values.find(t)
            if vid is None:
                dtype = t.dtype
                differentiable = dtype.is_floating_point or dtype.is_complex
                grad = t.requires_grad or (grad_in and shape_known and differentiable)
                vid = values.tensor(t, name, "op", grad=grad, bits=bits)
            elif names:
                values.list[vid].name = name
            return values.refs[vid]

        if isinstance(out, torch.Tensor):
            tree: Any = bind(out, names[0] if len(names) == 1 else _plain_name(short))
        elif isinstance(out, (tuple, list)) and len(names) == len(out):
            tree = type(out)([trees.encode(o, lambda t, n=n: bind(t, n), "result") for o, n in zip(out, names)]) if type(out) in (tuple, list) else tuple(
                [trees.encode(o, lambda t, n=n: bind(t, n), "result") for o, n in zip(out, names)]
            )
        else:
            name = names[0] if len(names) == 1 else _plain_name(short)
            tree = trees.encode(out, lambda t: bind(t, name), f"the result of {known.fn}")
        if not pairs and not any(True for _ in _leaves(tree)):
            return self._no_tensor(known, bits, out, tensors, effect, rec_args, rec_kwargs, source, ctx)
        self.events.append(RecordedOp(known.fn, rec_args, rec_kwargs, tree, source, ctx, tuple(pairs), effect, training))
        return out

    def _no_tensor(self, known: Known, bits: int, out: Any, tensors: Any, effect: bool, rec_args: Any, rec_kwargs: Any, source: Source, ctx: Context) -> Any:
        """A call that gave no tensor: an effect to keep, or a number read from tensors."""
        if effect or known.short in ("register_hook", "retain_grad") or known.fn.startswith(("apply:", "torch.ops.")) or ":" in known.fn:
            self.events.append(RecordedOp(known.fn, rec_args, rec_kwargs, None, source, ctx, (), True))
        elif out is not None and tensors and bits & NUMBERS and isinstance(out, (bool, int, float)):
            vid = self.values.scalar(out, known.short, bits)
            self.events.append(RecordedOp(known.fn, rec_args, rec_kwargs, self.values.refs[vid], source, ctx))
            self.read(vid, "item", out)
        return out

    def _unshare(self, out: Any, keep: set[int]) -> Any:
        """Results that are a value already (an input returned as it is) become new tensors on the same memory."""

        def fresh(t: torch.Tensor) -> torch.Tensor:
            if id(t) in keep or self.values.find(t) is None:
                return t
            self.off = True
            try:
                return self.strategy.run(torch.ops.aten.alias.default, (t,), {}, [t], writes=False, params=False)  # type: ignore[no-any-return]
            finally:
                self.off = False

        if isinstance(out, torch.Tensor):
            return fresh(out)
        return map_tensors(out, fresh) if isinstance(out, (tuple, list, dict)) else out

    def _write(self, t: torch.Tensor, pairs: list[tuple[int, int]], seen: set[int], grad: bool, bits: int, short: str) -> bool:
        """New versions of a written tensor and its aliases. Returns whether the memory outlives the run."""
        values = self.values
        vid = values.find(t)
        if vid is None or vid in seen:
            return False
        for key, old in values.aliases(t):
            v = values.list[old]
            flows = grad and v.dtype.startswith(("float", "bfloat", "complex"))
            new = values.version(key, old, (v.grad or flows) and short != "detach_", values.bits[old] | bits)
            seen.add(new)
            pairs.append((old, new))
            if short == "detach_":
                break
        return values.list[vid].storage in self._shared and short != "detach_"

    def _save_before_write(self, t: torch.Tensor) -> None:
        vid = self.values.find(t)
        if vid is not None and self.strategy.name != "meta":
            memory = self.values.list[vid].storage
            if memory in self._shared:
                for _, (_, tensor, stand_in) in self._external.items():
                    found = self.values.find(stand_in)
                    if tensor.kind != "buffer" and found is not None and self.values.list[found].storage == memory:
                        self.state.save_data(stand_in)

    def _counts_batches(self, vid: int) -> bool:
        module = self.modules[-1][1] if self.modules else None
        name = self.values.list[vid].qualified
        return isinstance(module, torch.nn.modules.batchnorm._NormBase) and (name or self._first_name(vid)).endswith("num_batches_tracked")

    def _first_name(self, vid: int) -> str:
        return self.values.list[vid].name

    # ---- other kinds of calls ---------------------------------------------------------------------------------------

    def _free(self, known: Known, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = self._local(args), self._local(kwargs)
        self.off = True
        try:
            return func(*args, **kwargs)
        finally:
            self.off = False

    def _size(self, known: Known, func: Any, args: Any, kwargs: Any) -> Any:
        out = self._free(known, func, args, kwargs)
        vid = self.values.find(self._canonical(args[0]))
        bits = self.values.bits[vid] if vid is not None else 0
        if vid is None or not (bits & DATA_SHAPE or (bits & SHAPE and not self.fold)):
            return out
        if known.short in ("numel", "nelement"):
            return self.scalar("torch.Tensor.numel", (self.values.refs[vid],), int(out), "numel", bits | INPUT)
        if known.short == "__len__":
            return self.size(vid, 0, int(out))
        if isinstance(out, tuple):
            return torch.Size([self.size(vid, i, n) for i, n in enumerate(out)])
        dim = int(args[1] if len(args) > 1 else kwargs["dim"])
        return self.size(vid, dim % len(args[0].shape), int(out))

    def _read(self, known: Known, func: Any, args: Any, kwargs: Any) -> Any:
        tensors, bits, _, _ = self._encode_call(known, args, kwargs)
        if self._remap:
            args, kwargs = self._local(args), self._local(kwargs)
        if not all(self.strategy.readable(t) for t in tensors):
            self.need_values(f"torch.Tensor.{known.short} reads")
        out = self._free(known, func, args, kwargs)
        vid = self.values.find(tensors[0])
        assert vid is not None
        how = READS[known.short]
        expected = out
        if known.short in ("numpy", "__array__"):
            expected = out.tolist()
            if bits & NUMBERS:
                self.warn("a tensor is converted to NumPy: what NumPy computes from it is a constant of the trace")
        if tensors[0].numel() > LIST_LIMIT and bits & NUMBERS:
            self.warn(f"{known.short}() reads {tensors[0].numel()} numbers, too many to guard: they are constants of the trace")
        else:
            self.read(vid, how, expected)
        return out

    def _compare(self, known: Known, func: Any, args: Any, kwargs: Any) -> Any:
        tensors, bits, rec_args, rec_kwargs = self._encode_call(known, args, kwargs)
        if self._remap:
            args, kwargs = self._local(args), self._local(kwargs)
        if not all(self.strategy.readable(t) for t in tensors):
            self.need_values(f"{known.fn} reads")
        out = self._free(known, func, args, kwargs)
        if bits & NUMBERS:
            vid = self.values.scalar(out, known.short.strip("_"), bits)
            source, _ = self.sources.where(2)
            self.events.append(RecordedOp(known.fn, rec_args, rec_kwargs, self.values.refs[vid], source, self.context()))
            self.read(vid, "bool", out)
        return out

    def _inline(self, known: Known, func: Any, args: Any, kwargs: Any) -> Any:
        body = self._inlined.get(func)
        if body is None:
            from autopar.trace.patches import inlined

            body = self._inlined[func] = inlined(func)
        with self:
            return body(*args, **kwargs)

    def _forbidden(self, known: Known, func: Any, args: Any, kwargs: Any) -> Any:
        if "higher_order" in known.why:
            self.unseen(known.why)
        self.fail(f"{known.why}, which generated code cannot repeat")

    def _grad_flag(self, known: Known, func: Any, args: Any, kwargs: Any) -> Any:
        """x.requires_grad_() and x.requires_grad = flag: no numbers change, only who gets a gradient."""
        tensors, _, rec_args, rec_kwargs = self._encode_call(known, args, kwargs)
        out = self._free(known, func, args, kwargs)
        flag = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
        vid = self.values.find(tensors[0])
        assert vid is not None
        if flag:
            self.values.list[vid].grad = True
        source, _ = self.sources.where(2)
        self.events.append(RecordedOp("torch.Tensor.requires_grad_", (rec_args[0], bool(flag)), {}, None, source, self.context(), (), True))
        return out

    def _set_data(self, known: Known, func: Any, args: Any, kwargs: Any) -> Any:
        """x.data = y is refused, except where y is x's own data (module.to() of what is there already)."""
        tensors, _, _, _ = self._encode_call(known, args, kwargs)
        memories = {self.values.list[self.values.find(t)].storage for t in tensors}  # type: ignore[index]
        if len(memories) > 1:
            self.fail("assigning to x.data cannot be recorded; write x.copy_(...) under torch.no_grad() instead")
        return None

    # ---- arguments --------------------------------------------------------------------------------------------------

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
            self.fail("a tensor that requires grad is neither a registered parameter of the module nor an input; register it (nn.ParameterList for lists)")
        stand_in = self.strategy.constant(t)
        if not self.strategy.readable(t) or t.is_meta:
            if t.is_meta:
                self.fail("a tensor attribute on the meta device has no numbers; make it a registered buffer")
            self.unseen("a tensor was made by code the tracer cannot see")
        path = self.modules[-1][0] if self.modules else ""
        n = 0
        while (name := f"{path}.constant{n}".lstrip(".")) in self.constants:
            n += 1
        self.constants[name] = t.detach().clone()
        self.state.save_data(t)
        described = Tensor(name, "constant", tuple(t.shape), str(t.dtype).removeprefix("torch."), False)
        self.place(name, described, t, stand_in)
        self._keep = [*getattr(self, "_keep", ()), t, stand_in]
        return self._external[id(t)]

    def described_constants(self) -> list[Tensor]:
        found = {e[0]: e[1] for e in self._external.values() if e[1].kind == "constant"}
        return list(found.values())

    # ---- scalars (called by symbolic.py) ----------------------------------------------------------------------------

    def size(self, vid: int, dim: int, value: int) -> Any:
        bits = self.values.bits[vid]
        return self.scalar("torch.Tensor.size", (self.values.refs[vid], dim), value, f"size_{dim}", (bits & (DATA_SHAPE | SHAPE)) | INPUT | self._of_data(bits))

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

    def enter(self, path: str, cls: str, module: torch.nn.Module | None, recompute: bool = False) -> None:
        self.events.append(Enter(path, cls, recompute))
        self.modules.append((path, module))
        self._scopes.append({})

    def exit(self) -> None:
        self.events.append(Exit())
        self.modules.pop()
        self._scopes.pop()

    def enter_recompute(self, fn: Any) -> None:
        """A checkpointed function begins: a region of its own at the enclosing module's path."""
        path, module = self.modules[-1] if self.modules else ("", None)
        while hasattr(fn, "func"):  # functools.partial
            fn = fn.func
        target = fn if hasattr(fn, "__qualname__") else type(fn)
        self.enter(path, qualified(target), module, True)

    def leaf(self, fn: Any, body: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a function registered as one op, or of an autograd.Function (fn is its class)."""
        known = self._known.get(fn)
        if known is None:
            try:
                name = import_name(fn)
            except TraceError as e:
                self.fail(str(e))
            apply = "apply:" if isinstance(fn, type) else ""
            known = self._known[fn] = Known(apply + name, "op", fn.__name__)
        return self.call(known, body, args, kwargs)

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
            "use 'cpu', 'cuda', 'cuda_run_cpu_offload' or 'reuse_cache'",
            ValueReadError,
        )

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


def _version(t: torch.Tensor) -> int:
    try:
        return t._version
    except RuntimeError:  # inference tensors have none; then the name of the function tells
        return 0


def _written_by_name(known: Known, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Tensors a call writes though their version counters need not show it."""
    if known.writes and not known.fn.startswith("torch.ops."):
        return [args[0]] if args and isinstance(args[0], torch.Tensor) else []
    if "out" in kwargs and kwargs["out"] is not None:
        return [kwargs["out"]] if isinstance(kwargs["out"], torch.Tensor) else list(kwargs["out"])
    if known.short in ("batch_norm", "instance_norm"):
        names = ["input", "running_mean", "running_var", "weight", "bias", "training"]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("training", given.get("use_input_stats", known.short == "instance_norm")):
            return [given[n] for n in names[1:3] if given.get(n) is not None]
    return []


def _by_content(short: str, args: Any, kwargs: Any) -> bool:
    """Whether the shape of this call's result depends on numbers."""
    if short == "where":
        return len(args) + len(kwargs) == 1
    if short == "repeat_interleave":
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats", args[0])
        return isinstance(repeats, torch.Tensor) and kwargs.get("output_size") is None
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)


def _holds_array(tree: Any) -> bool:
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, (tuple, list)):
        return any(_holds_array(x) for x in tree)
    return isinstance(tree, np.ndarray)


def _plain_name(short: str) -> str:
    return short.strip("_") or "value"


def _leaves(tree: Any) -> Any:
    from autopar.ir.graph import refs

    return refs(tree)
