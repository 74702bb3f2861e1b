"""Small graphs and rules written by hand, so that plans, policies and lowering can be tested without a tracer.
Must not be imported by the package.
"""

from __future__ import annotations

from math import prod

from autopar.ir.graph import Argument, Block, Call, Graph, Op, Param, Ref, Source, Tensor, Value
from autopar.rules.recipe import Factor, Recipe

B, T, D, H, V = 4, 8, 16, 64, 24


class Maker:
    """Builds one block op by op."""

    def __init__(self, name: str, path: str = "") -> None:
        self.name, self.values, self.ops, self.params, self.inputs = name, [], [], [], []

    def value(self, name, shape, dtype="float32", grad=True):
        self.values.append(Value(len(self.values), name, "tensor", tuple(shape), dtype, grad))
        return Ref(len(self.values) - 1)

    def input(self, name, shape, dtype="float32", grad=True):
        r = self.value(name, shape, dtype, grad)
        self.inputs.append(r.id)
        return r

    def param(self, name, shape):
        r = self.value(name.rpartition(".")[2], shape)
        self.params.append(Param(name, r.id, "param"))
        return r

    def op(self, id, fn, args, shape, dtype="float32", grad=True, **extra):
        out = self.value(id.rpartition("/")[2], shape, dtype, grad)
        src = Source("model.py", 10 + len(self.ops), "forward", f"{out} = {fn}(...)")
        self.ops.append(Op(id, fn, tuple(args), {}, out, id.rpartition("/")[0], src, **extra))
        return out

    def call(self, id, block: Block, args):
        outs = [self.value(block.values[i].name, block.values[i].shape) for i in block.outputs]
        self.ops.append(Call(id, block.name, tuple(a.id for a in args), tuple(o.id for o in outs)))
        return outs[0]

    def block(self, outputs, instances=("",)) -> Block:
        outs = tuple(o.id for o in outputs)
        return Block(self.name, f"handmade.{self.name}", tuple(self.inputs), outs, tuple(self.params), tuple(self.values), tuple(self.ops),
                     instances=tuple(instances))  # fmt: skip


def mlp_layer(instances) -> Block:
    """x + down(gelu(up(x))) with a bias on both projections."""
    m = Maker("Layer")
    x = m.input("x", (B, T, D))
    n = m.op("norm/layer_norm", "layer_norm", [x, m.param("norm.weight", (D,))], (B, T, D))
    u = m.op("up/linear", "linear", [n, m.param("up.weight", (H, D)), m.param("up.bias", (H,))], (B, T, H))
    g = m.op("/gelu", "gelu", [u], (B, T, H))
    d = m.op("down/linear", "linear", [g, m.param("down.weight", (D, H)), m.param("down.bias", (D,))], (B, T, D))
    y = m.op("/add", "add", [x, d], (B, T, D))
    return m.block([y], instances)


def stack(n: int = 4, path: str = "model.layers") -> Graph:
    """Embedding, n equal layers, head, and a summary no rule knows."""
    layer = mlp_layer([f"{path}.{i}" for i in range(n)])
    m = Maker("Model")
    ids = m.input("ids", (B, T), "int64", grad=False)
    h = m.op("embed/embedding", "embedding", [ids, m.param("embed.weight", (V, D))], (B, T, D))
    for i in range(n):
        h = m.call(f"{path}.{i}", layer, [h])
    h = m.op("head/linear", "linear", [h, m.param("head.weight", (V, D)), m.param("head.bias", (V,))], (B, T, V))
    s = m.op("/mystery", "mystery", [h], (B, T, V))
    z = m.op("/mul_", "mul", [s, s], (B, T, V), whole=True)
    root = m.block([z])
    tensors = [Tensor(p.name, "param", root.values[p.value].shape, "float32", True) for p in root.params]
    for i in range(n):
        tensors += [Tensor(f"{path}.{i}.{p.name}", "param", layer.values[p.value].shape, "float32", True) for p in layer.params]
    argument = Argument("ids", "positional", Ref(root.inputs[0]), True)
    return Graph(root.name, {"Layer": layer, "Model": root}, tuple(tensors), (argument,), Ref(root.outputs[0]), False, True, module="Model")


def nested(n: int = 3, k: int = 2) -> Graph:
    """n outer blocks, each calling k layers."""
    layer = mlp_layer([f"outer.{i}.inner.{j}" for i in range(n) for j in range(k)])
    o = Maker("Outer")
    x = o.input("x", (B, T, D))
    for j in range(k):
        x = o.call(f"inner.{j}", layer, [x])
    outer = o.block([o.op("act/gelu", "gelu", [x], (B, T, D))], [f"outer.{i}" for i in range(n)])
    m = Maker("Model")
    x = m.input("x", (B, T, D))
    for i in range(n):
        x = m.call(f"outer.{i}", outer, [x])
    root = m.block([x])
    return Graph("Model", {"Layer": layer, "Outer": outer, "Model": root}, (), (), Ref(root.outputs[0]), False, True, module="Model")


def _recipe(notation_in, notation_out, sizes, kept=(), inner=(), reduce="sum", **extra) -> Recipe:
    """Recipe from 'b t d' texts; factors that some output lacks are reduced."""
    ins = tuple(tuple((n,) for n in t.split()) for t in notation_in)
    outs = tuple(tuple((n,) for n in t.split()) for t in notation_out)
    names = dict.fromkeys(n for dims in ins + outs for (n,) in dims)
    factors = {}
    for n in names:
        lost = any((n,) not in dims for dims in outs)
        factors[n] = Factor(n, sizes[n], n not in kept, "inner" if n in inner else reduce if lost and n not in kept else None)
    return Recipe(ins, outs, factors, **extra)


def recipe_of(block: Block, op: Op) -> Recipe | None:
    """The rules of the ops above."""
    shape = block.values[op.out.id].shape
    args = [block.values[a.id].shape for a in op.args]
    if op.fn == "linear":
        sizes = dict(zip("btkn", (*args[0], shape[-1])))
        return _recipe(["b t k", "n k", "n"], ["b t n"], sizes, linear=((0,), (1,)), partial_bias=(2,), matmul=True,
                       flops=2.0 * prod(args[0]) * shape[-1])  # fmt: skip
    if op.fn == "embedding":
        return _recipe(["b t", "v d"], ["b t d"], dict(zip("btvd", (*args[0], *args[1]))), inner=("v",), linear=((1,),))
    names = " ".join("btd"[: len(shape)])
    sizes = dict(zip("btd", shape))
    if op.fn == "layer_norm":
        return _recipe([names, "d"], [names], sizes, kept=("d",))
    if op.fn == "gelu":
        return _recipe([names], [names], sizes)
    if op.fn == "add":
        return _recipe([names, names], [names], sizes, linear=((0, 1),))
    if op.fn == "mul":
        return _recipe([names, names], [names], sizes, linear=((0,), (1,)))
    return None
