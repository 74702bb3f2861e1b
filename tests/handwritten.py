"""Three graphs and their lowered programs, both written by hand: what the checker must accept without any lowering.
Must not import the tracer or lower.py.
"""

from __future__ import annotations

from autopar.ir.graph import Argument, AxisRef, Block, Graph, Op, Param, Ref, Source, Tensor, Value
from autopar.ir.mesh import Mesh
from autopar.ir.types import I, P, R, S
from autopar.lower.program import Convert, Local, LoweredBlock, Placement, Program, TypedValue
from autopar.pas.plan import Plan

F = "torch.nn.functional."


class Pair:
    """A block and its lowering, written side by side."""

    def __init__(self, name: str, mesh: Mesh) -> None:
        self.name, self.mesh = name, mesh
        self.values, self.ops, self.low, self.body = [], [], [], []
        self.inputs, self.params, self.low_inputs, self.low_params, self.tensors = [], [], [], [], []

    def value(self, name, shape, *type, dtype="float32", grad=True):
        """A source value and the lowered value that its op makes: (Ref, lowered Ref)."""
        v = Value(len(self.values), name, "tensor", shape, dtype, grad)
        self.values.append(v)
        return Ref(v.id), self.hold(Ref(v.id), *type)

    def hold(self, r, *type):
        v = self.values[r.id]
        self.low.append(TypedValue(len(self.low), v.id, v.name, v.kind, v.shape, v.dtype, v.grad, type))
        return Ref(len(self.low) - 1)

    def input(self, name, shape, *, grad=True, dtype="float32"):
        got = self.value(name, shape, *[I] * len(self.mesh.axes), grad=grad, dtype=dtype)
        self.inputs.append(got[0].id)
        self.low_inputs.append(got[1].id)
        return got

    def tensor(self, name, shape, *type, kind="param", grad=True, dtype="float32"):
        got = self.value(name, shape, *type, grad=grad, dtype=dtype)
        self.params.append(Param(name, got[0].id, kind))
        self.low_params.append(Param(name, got[1].id, kind))
        self.tensors.append(Tensor(name, kind, shape, dtype, grad))
        return got

    def convert(self, pair, axis, dst, copy=False):
        """The lowered value in another type along one axis."""
        r, low = pair
        k, t = self.mesh.index(axis), list(self.low[low.id].type)
        src, t[k] = t[k], dst
        out = self.hold(r, *t)
        self.body.append(Convert(low.id, out.id, axis, src, dst, copy))
        return r, out

    def op(self, id, fn, args, choice, out, *, local=None, low_fn=None, whole=False, writes=(), **low):
        """args and out: pairs and literals. `local`: the local arguments where they differ."""
        pick = lambda tree, k: tuple(a[k] if isinstance(a, tuple) and len(a) == 2 and isinstance(a[0], Ref) else a for a in tree)  # noqa: E731
        src = Source("model.py", 10 + len(self.ops), "forward", f"{id} ...")
        path = id.rpartition("/")[0]
        pairs = [tuple((a[k].id, b[k].id) for a, b in writes) for k in (0, 1)]
        self.ops.append(Op(id, fn, pick(args, 0), {}, out[0], path, src, writes=pairs[0], whole=whole))
        self.body.append(
            Local(id, low_fn or fn, pick(local or args, 1), {}, out[1], choice, src, path=path, writes=pairs[1], **low),
        )
        return out

    def done(self, out) -> tuple[Graph, Program]:
        r, low = out
        n = self.name
        block = Block(n, f"m:{n}", tuple(self.inputs), (r.id,), tuple(self.params), tuple(self.values), tuple(self.ops), instances=("",))
        arguments = tuple(Argument(self.values[i].name, "positional", Ref(i), True) for i in self.inputs)
        graph = Graph(n, {n: block}, tuple(self.tensors), arguments, r, False, True, module=f"m:{n}")
        params, values, body = tuple(self.low_params), tuple(self.low), tuple(self.body)
        lowered = LoweredBlock(n, n, tuple(self.low_inputs), (low.id,), params, values, body, instances=("",))
        placements = tuple(Placement(p.name, self.low[p.value].type) for p in self.low_params)
        return graph, Program(self.mesh, n, {n: lowered}, placements, low, Plan(self.mesh))


def mlp() -> tuple[Graph, Program]:
    """x + down(dropout(gelu(up(x)))), columns and rows split over two ranks; the bias of the second enters once."""
    m = Pair("MLP", Mesh((("tp", 2),)))
    x = m.input("x", (4, 8))
    up, ub = m.tensor("up.weight", (16, 8), S(0)), m.tensor("up.bias", (16,), S(0))
    down, db = m.tensor("down.weight", (8, 16), S(1)), m.tensor("down.bias", (8,), I)
    xr = m.convert(x, "tp", R)
    h = m.op("up/linear", F + "linear", (xr, up, ub), ("n",), m.value("h", (4, 16), S(1)))
    g = m.op("act/gelu", F + "gelu", (h,), ("d1",), m.value("g", (4, 16), S(1)))
    bias = m.convert(db, "tp", P)
    d = m.op("down/linear", F + "linear", (g, down, bias), ("k",), m.value("d", (4, 8), P))
    e = m.convert(d, "tp", I)
    return m.done(m.op("/add", "torch.Tensor.__add__", (x, e), ("I",), m.value("y", (4, 8), I)))


def embed() -> tuple[Graph, Program]:
    """mean(view(embedding(ids))): the batch split by dp, the vocabulary by tp; then heads by tp and a mean over both."""
    m = Pair("Embed", Mesh((("dp", 2), ("tp", 2))))
    ids = m.input("ids", (4, 6), grad=False, dtype="int64")
    w = m.tensor("embed.weight", (16, 8), R, S(0))
    shard = m.convert(ids, "dp", S(0))
    h = m.value("h", (4, 6, 8), S(0), P)
    m.op("embed/embedding", F + "embedding", (shard, w), ("i0", "v"), h, low_fn="ap.vocab_embedding", local=(shard, w, AxisRef("tp")))
    h = m.convert(h, "tp", S(2))
    v = m.value("v", (4, 6, 2, 4), S(0), S(2))
    local = (h, 2, 6, 1, 4)
    v = m.op("/view", "torch.Tensor.view", (h, 4, 6, 2, 4), ("v0", "v2"), v, local=local, low_fn="torch.Tensor.reshape")
    s = m.op("/mean", "torch.Tensor.mean", (v,), ("d0", "d2"), m.value("s", (), P, P), divide=4)
    s = m.convert(s, "dp", I)
    return m.done(m.convert(s, "tp", I))


def counter() -> tuple[Graph, Program]:
    """A buffer counted in place, a view written through, and a split temporary written in place."""
    m = Pair("Counter", Mesh((("tp", 2),)))
    x = m.input("x", (4, 8))
    n = m.tensor("steps", (), I, kind="buffer", grad=False, dtype="int64")
    t = m.op("/mul", "torch.Tensor.__mul__", (x, 2.0), ("I",), m.value("t", (4, 8), I))
    n2 = m.value("steps", (), I, grad=False, dtype="int64")
    m.op("/add_", "torch.Tensor.add_", (n, 1), ("I",), n2, whole=True, writes=((n, n2),))
    v = m.op("/view", "torch.Tensor.view", (t, 32), ("I",), m.value("v", (32,), I), whole=True)
    v2, t2 = m.value("v", (32,), I), m.value("t", (4, 8), I)
    m.op("/mul_", "torch.Tensor.mul_", (v, 3.0), ("I",), v2, whole=True, writes=((v, v2), (t, t2)))
    u = m.op("/exp", "torch.exp", (t2,), ("I",), m.value("u", (4, 8), I))
    us = m.convert(u, "tp", S(1), copy=True)
    u2 = m.value("u", (4, 8), S(1))
    m.op("/relu_", "torch.relu_", (us,), ("d1",), u2, writes=((us, u2),))
    w = m.op("/mul#1", "torch.Tensor.__mul__", (u2, n2), ("d1",), m.value("w", (4, 8), S(1)))
    return m.done(m.convert(w, "tp", I))


PAIRS = {"mlp": mlp, "embed": embed, "counter": counter}
