"""Hand-made Recordings: a tiny notation for tests that need a trace without the tracer.
Must not know what build makes of them."""

from __future__ import annotations

from contextlib import contextmanager

from autopar.ir.graph import Argument, Context, Ref, Source, Tensor
from autopar.trace.recording import Enter, Exit, RecordedGuard, RecordedOp, RecordedValue, Recording

F = "torch.nn.functional."
T = "torch.Tensor."


class Recorder:
    """Write `r.op(...)` in the order a module would run; values are Refs."""

    def __init__(self, module: str = "tests.Model") -> None:
        self.values: list[RecordedValue] = []
        self.events: list = [Enter("", module)]
        self.tensors: dict[str, Tensor] = {}
        self.known: dict[str, Ref] = {}
        self.inputs: list[int] = []
        self.module, self.paths, self.constants = module, [""], {}
        self.buffers_set: list[tuple[str, int]] = []

    def value(self, name, shape=(2, 4), dtype="float32", grad=True, storage=None, origin="op", qualified="", kind="tensor") -> Ref:
        i = len(self.values)
        self.values.append(RecordedValue(name, kind, shape, dtype, grad, i if storage is None else storage, origin, qualified))
        return Ref(i)

    def input(self, name="x", shape=(2, 4), **kw) -> Ref:
        v = self.value(name, shape, origin="input", **kw)
        self.inputs.append(v.id)
        return v

    def tensor(self, name, shape=(4, 4), kind="param", grad=True, data=None, dtype="float32") -> Ref:
        if name not in self.known:
            self.tensors[name] = Tensor(name, kind, shape, dtype, grad)
            self.known[name] = self.value(name.rpartition(".")[2], shape, dtype, grad, origin=kind, qualified=name)
            if data is not None:
                self.constants[name] = data
        return self.known[name]

    def op(self, fn, *args, out="y", shape=(2, 4), writes=(), alias=None, line=1, effect=False, **kwargs) -> Ref | None:
        storage = self.values[alias.id].storage if alias else None
        result = self.value(out, shape, storage=storage) if isinstance(out, str) else out
        src = Source("model.py", line, "forward", f"line {line}")
        pairs = tuple((a.id, b.id) for a, b in writes)
        self.events.append(RecordedOp(fn, args, kwargs, result, src, Context(), pairs, effect))
        return result

    def inplace(self, fn, x, *args, aliases=(), line=1, **kwargs):
        """x.fn(*args): returns the new versions of x and its aliases."""
        new = [self.value(self.values[v.id].name, self.values[v.id].shape, storage=self.values[v.id].storage) for v in (x, *aliases)]
        out = None if fn.endswith("__setitem__") else new[0]
        self.op(fn, x, *args, out=out, writes=list(zip((x, *aliases), new, strict=True)), line=line, **kwargs)
        return new if aliases else new[0]

    def guard(self, v, read="item", expected=True, line=1) -> None:
        self.events.append(RecordedGuard(v, read, expected, Source("model.py", line, "forward", f"line {line}")))

    @contextmanager
    def call(self, path, cls="tests.Layer", recompute=False):
        self.events.append(Enter(path, cls, recompute))
        yield
        self.events.append(Exit())

    def linear(self, x, name, line=1, **kw) -> Ref:
        with self.call(name, "torch.nn.modules.linear.Linear"):
            return self.op(F + "linear", x, self.tensor(f"{name}.weight"), line=line, **kw)

    def done(self, output) -> Recording:
        args = tuple(Argument(self.values[i].name, "positional", Ref(i), True) for i in self.inputs)
        return Recording(
            self.module, self.values, [*self.events, Exit()], tuple(self.tensors.values()), args, tuple(self.inputs), output,
            True, True, tuple(self.buffers_set), (), self.constants,
        )  # fmt: skip
