"""The mode: records every torch-level call of a running module.
Must not know blocks (build.py) nor what the recording is used for; how ops are executed is strategies.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from autopar.errors import TraceError
from autopar.ir.graph import Context, Ref, Source, refs
from autopar.trace import trees
from autopar.trace.known import BLANK, BY_CONTENT, DATA_SHAPES, DETACHED, ELIDED, FROM_DATA, READS, Known, classify
from autopar.trace.ledger import Ledger
from autopar.trace.names import import_name
from autopar.trace.recording import RecordedOp
from autopar.trace.state import ModuleState
from autopar.trace.strategies import Real, ValueNeeded, map_tensors
from autopar.trace.values import DATA_SHAPE, INPUT, NUMBERS, PARAM, RANDOM, SHAPE

LIST_LIMIT = 4096  # elements: larger lists read from tensors are not guarded


class Tracer(Ledger, TorchFunctionMode):
    """Records while active as a mode."""

    def __init__(self, module: torch.nn.Module, strategy: Real, *, fold: bool, device: torch.device, state: ModuleState) -> None:
        TorchFunctionMode.__init__(self)
        Ledger.__init__(self, module, strategy, fold=fold, device=device, state=state)
        self.op_failed = False  # a call raised while it was executed
        self._known: dict[Any, Known] = {}
        self._inlined: dict[Any, Callable[..., Any]] = {}

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
        self,
        known: Known,
        rec_args: Any,
        rec_kwargs: Any,
        args: Any,
        kwargs: Any,
        tensors: list[torch.Tensor],
        bits: int,
        versions: list[int],
        out: Any,
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
        if short in ELIDED and not written and isinstance(out, torch.Tensor) and values.find(out) is not None:
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
        elif isinstance(out, (tuple, list)) and not hasattr(out, "_fields") and len(names) == len(out):
            parts = [trees.encode(o, partial(bind, name=n), f"the result of {known.fn}") for o, n in zip(out, names, strict=True)]
            tree = parts if isinstance(out, list) else tuple(parts)
        else:
            name = names[0] if len(names) == 1 else _plain_name(short)
            tree = trees.encode(out, partial(bind, name=name), f"the result of {known.fn}")
        if not pairs and next(refs(tree), None) is None:
            return self._no_tensor(known, bits, out, tensors, effect, rec_args, rec_kwargs, source, ctx)
        self.events.append(RecordedOp(known.fn, rec_args, rec_kwargs, tree, source, ctx, tuple(pairs), effect, training))
        return out

    def _no_tensor(
        self, known: Known, bits: int, out: Any, tensors: Any, effect: bool, rec_args: Any, rec_kwargs: Any, source: Source, ctx: Context
    ) -> Any:
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
            with self.hidden():
                return self.strategy.run(torch.ops.aten.alias.default, (t,), {}, [t], writes=False, params=False)  # type: ignore[no-any-return]

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

    def _counts_batches(self, vid: int) -> bool:
        module = self.modules[-1][1] if self.modules else None
        counted = self.values.list[vid].name == "num_batches_tracked"  # a new version keeps the name
        return counted and isinstance(module, torch.nn.modules.batchnorm._NormBase)

    # ---- other kinds of calls ---------------------------------------------------------------------------------------

    def _free(self, known: Known, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = self._local(args), self._local(kwargs)
        with self.hidden():
            return func(*args, **kwargs)

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
        tensors, _, rec_args, _ = self._encode_call(known, args, kwargs)
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
