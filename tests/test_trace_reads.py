"""What the tracer does with reads, draws, opaque code, wrong arguments and strategies that cannot run."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from replay import Mismatch, replay
from torch import nn
from trace_cases import CASES, Base, X, check, guards, module, ops, per_row

from autopar.errors import ConfigError, TraceError
from autopar.ir.graph import Ref
from autopar.trace.leaves import register_leaf, unregister_leaf
from autopar.trace.record import record


def test_leaves_are_one_op_also_through_early_references() -> None:
    early = per_row

    def forward(self, x):
        return (early(self.lin(x), scale=3.0) + per_row(x)).sum()

    m = module(forward)()
    with pytest.raises(TraceError, match=r"vmap.*register_op"):
        record(m, {"x": X})
    register_leaf(per_row)
    try:
        for strategy in ("meta", "cpu"):
            rec = record(m, {"x": X}, strategy=strategy)
            assert [op.fn for op in ops(rec, "per_row")] == ["trace_cases:per_row"] * 2
            check(m, rec, {"x": X})
    finally:
        unregister_leaf(per_row)


def test_reads_of_inputs_become_guards() -> None:
    def forward(self, x, ids):
        y = self.lin(x)
        if ids.max() > 2:
            y = y * 2
        n = int(ids.sum())
        if 7 in ids or torch.equal(ids, ids + 1):
            y = y * 5
        return y.sum() * n * ids[0].item() * ids.tolist()[1]

    m = module(forward)()
    ids = torch.tensor([1, 2, 3])
    for strategy in ("meta", "cpu"):
        rec = record(m, {"x": X, "ids": ids}, strategy=strategy)
        assert [(g.read, g.expected) for g in guards(rec)] == [
            ("bool", True), ("int", 6), ("bool", False), ("bool", False), ("item", 1), ("tolist", [1, 2, 3]),
        ]  # fmt: skip
        assert not rec.warnings
        assert "ids.max()" in guards(rec)[0].src.text
        check(m, rec, {"x": X, "ids": ids})
        with pytest.raises(Mismatch, match=r"test_trace_reads.py.*ids.max"):
            replay(rec, m, {"x": X, "ids": ids - 1})


def test_reads_of_constants_need_no_guard() -> None:
    def forward(self, x):
        return self.lin(x).sum() if torch.arange(3).sum() > 2 and bool(self.extra.sum() > 0) else x.sum()

    rec = record(module(forward)(), {"x": X})
    assert not guards(rec) and not rec.warnings


def test_comparisons_of_sizes_become_guards() -> None:
    def forward(self, x):
        y = self.lin(x)
        if x.shape[0] > 2:
            y = y * 2
        for _ in range(x.size(1) // 3):
            y = y + 1
        return y.sum()

    m = module(forward)()
    rec = record(m, {"x": X})
    assert [g.expected for g in guards(rec)] == [True, 2]
    check(m, rec, {"x": torch.randn(3, 6)})
    with pytest.raises(Mismatch):
        replay(rec, m, {"x": torch.randn(2, 6)})
    assert not guards(record(m, {"x": X}, constant_folding=True))


def test_sizes_that_depend_on_numbers_stay_symbolic_even_folded() -> None:
    def forward(self, x, ids):
        chosen = x[ids > 1]
        return self.lin(chosen).sum() / chosen.shape[0]

    m = module(forward)()
    rec = record(m, {"x": X, "ids": torch.arange(4)}, constant_folding=True, strategy="cpu")
    check(m, rec, {"x": X, "ids": torch.tensor([2, 2, 2, 0])})


def test_reads_of_parameters_and_draws_are_warnings() -> None:
    def forward(self, x):
        y = self.lin(x)
        if self.lin.weight.sum() > 1000:
            y = y * 2
        if torch.rand([]) < 0:
            y = y * 3
        y = y * random.random() * float(np.random.rand())
        return y.sum() + torch.from_numpy(np.ones(6)).sum() + torch.tensor(np.ones(2)).sum()

    rec = record(module(forward)(), {"x": X}, strategy="cpu")
    text = "\n".join(rec.warnings)
    for part in ("depends on parameters", "random number", "random.random", "numpy.random.rand", "from_numpy", "NumPy array", __file__):
        assert part in text
    assert not guards(rec)


def test_a_read_under_meta_names_the_line_and_auto_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    def forward(self, x):
        y = self.lin(x)
        return y.sum() * 2 if y.sum() > 1e9 else y.sum()

    m = module(forward)()
    with pytest.raises(TraceError, match=r"test_trace_reads.py:\d+: `return y.sum\(\) \* 2.*'cpu', 'cuda'"):
        record(m, {"x": X}, strategy="meta")
    with caplog.at_level("INFO", "autopar.trace"):
        rec = record(m, {"x": X})
    assert "'cpu'" in caplog.text
    check(m, rec, {"x": X})
    with pytest.raises(TraceError, match="meta"):
        record(copy.deepcopy(m).to("meta"), {"x": X})


def test_a_swallowed_error_is_still_an_error() -> None:
    def forward(self, x):
        y = self.lin(x)
        try:
            return y.sum() if y.sum() > 0 else y.sum() * 2
        except RuntimeError:
            return y.sum()

    with pytest.raises(TraceError):
        record(module(forward)(), {"x": X}, strategy="meta")


def test_parameters_on_meta_are_never_allocated() -> None:
    with torch.device("meta"):
        m = nn.Sequential(nn.Linear(1 << 20, 1 << 20), nn.LayerNorm(1 << 20))
    rec = record(m, {"input": torch.empty(2, 1 << 20, device="meta")})
    assert [op.fn for op in ops(rec, "")] == ["torch.nn.functional.linear", "torch.nn.functional.layer_norm"]
    for strategy in ("cpu", "reuse_cache"):
        with pytest.raises(TraceError, match="meta"):
            record(m, {"input": torch.empty(2, 1 << 20, device="meta")}, strategy=strategy)


def test_devices_of_the_model_are_recorded_as_such() -> None:
    def forward(self, x):
        return self.lin(x + torch.ones(6, device=x.device) + torch.zeros(6, device="cpu").to(x.device)).sum()

    text = repr(ops(record(module(forward)(), {"x": X}), "ones")[0].kwargs)
    assert "autopar:device" in text


UNSEEN: list[tuple[str, Any, str]] = [
    ("vmap", lambda self, x: torch.vmap(lambda r: r * 2)(self.lin(x)).sum(), "vmap.*register_op"),
    ("grad", lambda self, x: torch.func.grad(lambda w: (x @ w).sum())(self.lin.weight).sum(), "torch.func.*register_op"),
    ("jvp", lambda self, x: torch.func.jvp(torch.sin, (x,), (x,))[1].sum(), "torch.func.*register_op"),
    ("cond", lambda self, x: torch.cond(torch.tensor(True), torch.sin, torch.cos, (self.lin(x),)).sum(), "cond.*register_op"),
    ("script", lambda self, x: scripted(self.lin(x)).sum(), "ScriptFunction.*register_op"),
    ("backward", lambda self, x: self.lin(x).sum().backward(), "backward"),
    ("set_data", lambda self, x: setattr(self.lin.weight, "data", x.clone()), "x.data"),
    ("leaf", lambda self, x: (self.lin(x) * STRAY).sum(), "registered parameter"),
    ("graph", lambda self, x: (self.lin(x) * STRAY_GRAPH).sum(), "cannot see"),
    ("hook", lambda self, x: self.lin(x).register_hook(lambda g: g), "importable|top level"),
    ("cache", lambda self, x: DynamicThing(), "DynamicThing"),
]
STRAY = torch.ones(6, requires_grad=True)
STRAY_GRAPH = STRAY * 2


class DynamicThing:
    pass


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@pytest.mark.parametrize(("body", "message"), [u[1:] for u in UNSEEN], ids=[u[0] for u in UNSEEN])
@pytest.mark.parametrize("strategy", ["meta", "cpu"])
def test_what_cannot_be_recorded_is_refused(body: Any, message: str, strategy: str) -> None:
    m = type("M", (Base,), {"forward": body})()
    with pytest.raises(TraceError, match=message):
        record(m, {"x": X}, strategy=strategy)
    assert not m.lin.weight.is_meta and type(m.lin.weight) is nn.Parameter
    m.lin(X)


def test_a_parameter_made_inside_is_refused_or_followed() -> None:
    m = type("M", (Base,), {"forward": lambda self, x: (self.lin(x) * nn.Parameter(x.detach())).sum()})()
    with pytest.raises(TraceError, match=r"cannot see|registered parameter"):
        record(m, {"x": X}, strategy="cpu")
    check(m, record(m, {"x": X}, strategy="meta"), {"x": X})


def test_script_modules_are_refused() -> None:
    m = nn.Sequential(torch.jit.script(nn.Linear(6, 6)))
    for root in (m, m[0]):
        with pytest.raises(TraceError, match="ScriptModule"):
            record(root, {"input": X})


@pytest.mark.parametrize(
    ("given", "message"),
    [({}, "'x'"), ({"x": X, "z": 1}, "'z'.*x"), ({"x": object()}, "forward argument 'x'")],
)
def test_wrong_arguments_are_named(given: dict[str, Any], message: str) -> None:
    def forward(self, x):
        return self.lin(x)

    with pytest.raises(TraceError, match=message):
        record(module(forward)(), given)


def test_errors_of_the_model_pass_through_with_a_note() -> None:
    def forward(self, x):
        raise KeyError("mine")

    m = module(forward)()
    with pytest.raises(KeyError) as e:
        record(m, {"x": X})
    assert "while tracing" in e.value.__notes__[0]


def test_nothing_is_left_in_the_module() -> None:
    def forward(self, x):
        y = self.lin(x)
        self.seen = y
        self.log.append(y)
        self.cache[x.shape[0]] = y
        self.lin.weight.data.clamp_(-0.1, 0.1)
        return y.sum()

    for strategy in ("meta", "cpu"):
        m = module(forward)()
        m.log, m.cache = [], {}
        weight = m.lin.weight.detach().clone()
        rec = record(m, {"x": X}, strategy=strategy)
        assert not hasattr(m, "seen") and m.log == [] and m.cache == {}
        assert torch.equal(weight, m.lin.weight)
        assert any("'seen'" in w for w in rec.warnings)
        (clamp,) = ops(rec, "clamp_")
        assert clamp.effect and len(clamp.writes) == 2


def test_intermediates_are_not_kept_alive() -> None:
    import weakref

    alive: list[Any] = []
    most = 0

    def forward(self, x):
        nonlocal most
        with torch.no_grad():
            for _ in range(20):
                x = self.lin(x)
                alive.append(weakref.ref(x))
                most = max(most, sum(r() is not None for r in alive))
        return self.lin(x).sum()

    for strategy in ("meta", "cpu"):
        most, alive[:] = 0, []
        record(module(forward)(), {"x": X}, strategy=strategy)
        assert most <= 3


def test_out_of_memory_falls_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from autopar.trace import strategies

    offload = strategies.Offload("cuda_run_cpu_offload", torch.device("meta"))  # 'meta' plays a device that never gives numbers back
    calls: list[str] = []

    def func(*tensors: torch.Tensor) -> torch.Tensor:
        calls.append(tensors[0].device.type)
        if calls[-1] == "meta":
            raise torch.OutOfMemoryError("full")
        return tensors[0] + 1

    out = offload.run(func, (X,), {}, [X], writes=False, params=True)
    assert calls == ["meta", "cpu"] and torch.equal(out, X + 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_cuda_device_is_said() -> None:
    for strategy in ("cuda", "cuda_run_cpu_offload"):
        with pytest.raises(ConfigError, match=r"none here.*'meta'"):
            record(nn.Linear(2, 2), {"input": torch.ones(2)}, strategy=strategy)
    with pytest.raises(ConfigError, match="did you mean 'meta'"):
        record(nn.Linear(2, 2), {"input": torch.ones(2)}, strategy="mta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("strategy", ["cuda", "cuda_run_cpu_offload", "reuse_cache"])
@pytest.mark.parametrize("cls", CASES, ids=lambda c: c.__name__)
def test_cuda_strategies_record_the_same_program(cls: type[Base], strategy: str) -> None:
    if cls.__name__ in ("contexts", "unregistered") or (cls.__name__ == "requires" and strategy != "cuda"):
        pytest.skip("names the CPU or needs history")
    given = {"ids" if cls.__name__ == "shifted" else "x": X}
    m = cls()
    a, b = record(m, given, strategy=strategy), record(m, given, strategy="cpu")
    assert [e.fn for e in ops(a, "")] == [e.fn for e in ops(b, "")]


def test_recordings_refer_to_values_by_position() -> None:
    rec = record(nn.Linear(6, 2), {"input": X})
    assert rec.module == "torch.nn.modules.linear.Linear"
    assert rec.output == Ref(len(rec.values) - 1)
