"""Block and ParallelModule on hand-written generated code: names, local tensors, loading, ties, gradients over axes and scale units.
Must not know the compiler."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from autopar import runtime as ap
from autopar.errors import LayoutError, SavedirError
from autopar.runtime.inproc import run_ranks
from autopar.runtime.placement import Placement
from tests.procs import run_processes

DIM, VOCAB = 8, 12


class Original(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(DIM, 16), "down": nn.Linear(16, DIM)}) for _ in range(2))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, ids):
        h = self.embed(ids)
        for layer in self.layers:
            h = h + layer["down"](torch.tanh(layer["up"](h)))
        self.steps = self.steps + 1
        return self.head(self.norm(h))


class Layer(ap.Block):
    """As codegen writes it: Megatron over tp, batch over dp."""

    def __init__(self, mesh, bind=True):
        super().__init__(mesh) if bind else super().__init__()
        self.tp = mesh["tp"]
        self.declare("up.weight", (16, DIM), torch.float32, "R", "S(0)")
        self.declare("up.bias", (16,), torch.float32, "R", "S(0)")
        self.declare("down.weight", (DIM, 16), torch.float32, "R", "S(1)")
        self.declare("down.bias", (DIM,), torch.float32, "R", "I")

    def forward(self, h):
        x = ap.i_to_r(h, self.tp)
        y = F.linear(torch.tanh(F.linear(x, self.up.weight, self.up.bias)), self.down.weight)
        return h + ap.p_to_i(y, self.tp) + self.down.bias


class Model(ap.ParallelModule):
    def __init__(self, mesh, bind=True):
        super().__init__(mesh)
        self.dp, self.tp = mesh["dp"], mesh["tp"]
        self.declare("embed.weight", (VOCAB, DIM), torch.float32, "R", "I")
        self.declare("norm.weight", (DIM,), torch.float32, "R", "R")  # R on tp: its gradient comes in parts
        self.declare("norm.bias", (DIM,), torch.float32, "R", "I")
        self.declare("steps", (), torch.int64, "I", "I", kind="buffer")
        self.declare("scale", (2,), torch.float32, "I", "I", kind="constant")
        for i in range(2):
            self.add(f"layers.{i}", Layer(mesh, bind))
        self.alias("head.weight", "embed.weight")

    def forward(self, ids):
        h = F.embedding(ap.i_to_s(ids, self.dp, 0), self.embed.weight)
        for layer in self.layers:
            h = layer(h)
        self.steps = self.steps + 1
        n = F.layer_norm(h, (DIM,), None, None)
        w = ap.r_to_i(self.norm.weight, self.tp)
        return ap.s_to_i(F.linear(n * w + self.norm.bias, self.head.weight), self.dp, 0)


MESH = (("dp", 2), ("tp", 2))


def original(seed=0):
    torch.manual_seed(seed)
    m = Original()
    torch.nn.init.normal_(m.norm.weight)
    return m


def reader_of(module, log=None):
    full = {**module.state_dict(keep_vars=False), "scale": torch.tensor([1.0, 2.0])}

    def read(name, slices):
        if log is not None:
            log.append((name, slices))
        return full[name][slices]

    return read


def step(axes, rank, bind=True):
    """Losses and whole gradients of two accumulated batches; each scale unit takes its own."""
    torch.manual_seed(0)
    m = Model(axes, bind).load(reader_of(original()))
    ids = torch.randint(VOCAB, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    for batch in ids if axes.units == 1 else ids[axes.unit : axes.unit + 1]:
        m(batch).square().sum().backward()
    m.sync_grads()
    grads = {n: p.grad for n, p in m.named_parameters()}
    return (
        {n: (g, m.local_slice(n)) for n, g in grads.items()},
        sorted(m.state_dict()),
        int(m.steps),
        {n: tuple(p.shape) for n, p in m.named_parameters()},
    )


def expected():
    m = original()
    for batch in torch.randint(VOCAB, (2, 4, 5), generator=torch.Generator().manual_seed(1)):
        m(batch).square().sum().backward()
    return m


def compare(results, steps=2):
    m = expected()
    want = {n: p.grad for n, p in m.named_parameters()}
    for grads, keys, count, shapes in results:
        assert keys == sorted(m.state_dict()) and count == steps
        assert set(grads) == set(want)
        assert shapes["layers.0.up.weight"] == (8, DIM) and shapes["layers.1.down.weight"] == (DIM, 8)
        for n, (g, slices) in grads.items():
            torch.testing.assert_close(g, want[n][slices], rtol=1e-4, atol=1e-4, msg=lambda s, n=n: f"{n}: {s}")


@pytest.mark.parametrize("bind", [True, False])
def test_gradients_equal_one_device(bind):
    compare(ap.run_ranks(MESH, lambda axes, rank: step(axes, rank, bind)))


def test_scale_units_sum_their_gradients():
    compare(ap.run_ranks(MESH, step, units=2), steps=1)


@pytest.mark.procs
def test_under_gloo_with_scale_units():
    mesh = (("dp", 1), ("tp", 2))
    compare(run_processes(lambda rank: step(ap.rank_mesh(mesh), rank), 4), steps=1)


def test_one_rank_is_the_original():
    compare(ap.run_ranks((("dp", 1), ("tp", 1)), step_shapes_free))


def step_shapes_free(axes, rank):
    grads, keys, count, shapes = step(axes, rank)
    assert shapes["layers.0.up.weight"] == (16, DIM)
    return grads, keys, count, {"layers.0.up.weight": (8, DIM), "layers.1.down.weight": (DIM, 8)}


def test_names_ties_and_state_dict():
    def fn(axes, rank):
        m = Model(axes)
        assert all(t.is_meta for t in [*m.parameters(), *m.buffers()])
        log = []
        m.load(reader_of(original(), log))
        assert m.head.weight is m.embed.weight and m.get_parameter("layers.1.up.weight").shape == (8, DIM)
        assert not any(t.is_meta for t in [*m.parameters(), *m.buffers()])
        slices = dict(log)
        assert slices["layers.0.up.weight"] == (slice(8 * axes["tp"].rank, 8 * axes["tp"].rank + 8), slice(None))
        assert "head.weight" not in slices and slices["steps"] == ()
        assert m.local_slice("head.weight") == (slice(None), slice(None))
        assert repr(m.named_placements()["layers.0.down.weight"].types) == "('R', 'S(1)')"
        n = copy.deepcopy(m)
        assert n.head.weight is n.embed.weight and n.mesh is m.mesh and n.layers[0].tp is m.layers[0].tp
        n.load_state_dict(m.state_dict())
        assert "scale" not in m.state_dict() and m.scale.tolist() == [1, 2]
        with pytest.raises(LayoutError, match="'nope' is no parameter or buffer of Model"):
            m.local_slice("nope")
        return True

    assert all(ap.run_ranks(MESH, fn))


def test_nested_shards_of_one_dim():
    """S(0,0) on one axis is outside of S(0,1) on the other, whichever comes first in the mesh."""

    def fn(axes, rank):
        m = ap.ParallelModule(axes)
        m.declare("a", (8,), torch.float32, "S(0)", "S(0,1)")
        m.declare("b", (8,), torch.float32, "S(0,1)", "S(0,0)")
        m.load(lambda name, slices: torch.arange(8.0)[slices])
        return m.a.tolist(), m.b.tolist()

    assert ap.run_ranks(MESH, fn) == [([0, 1], [0, 1]), ([2, 3], [4, 5]), ([4, 5], [2, 3]), ([6, 7], [6, 7])]


def bad_declare(*args, **kwargs):
    return lambda axes: ap.ParallelModule(axes).declare(*args, **kwargs)


def tied_to_nothing(axes):
    ap.ParallelModule(axes).alias("a.b", "c.d")


def wrong_weights(axes):
    Model(axes).load(lambda name, slices: torch.zeros(3))


def declared_twice(axes):
    m = Model(axes)
    m.declare("steps", (), torch.int64, "I", "I")


BAD = {
    "types": (bad_declare("w", (4,), torch.float32, "R"), r"w has 1 types, but the mesh has the 2 axes dp, tp"),
    "text": (bad_declare("w", (4,), torch.float32, "R", "P"), r"'P' is not how a tensor of a module can be held; write R, I, S"),
    "dim": (bad_declare("w", (4,), torch.float32, "R", "S(1)"), r"type S\(1\) does not fit shape \(4,\)"),
    "odd": (bad_declare("w", (5,), torch.float32, "R", "S(0)"), r"w: dim 0 of size 5 does not split evenly over 2 ranks"),
    "kind": (bad_declare("w", (4,), torch.float32, "R", "R", kind="thing"), r"unknown kind 'thing'"),
    "taken": (bad_declare("load.weight", (4,), torch.float32, "R", "R"), r"calls a submodule 'load'.*rename it"),
    "tie": (tied_to_nothing, r"a.b is tied to c.d, which is not declared"),
    "weights": (wrong_weights, r"the weights of embed.weight are \(3,\) torch.float32; this rank's slice of \(12, 8\)"),
    "twice": (declared_twice, r"steps is declared twice"),
}


@pytest.mark.parametrize("fn,message", BAD.values(), ids=BAD)
def test_errors(fn, message):
    with pytest.raises(LayoutError, match=message):
        ap.run_ranks(MESH, lambda axes, rank: fn(axes))


def test_reader_reads_slices(tmp_path):
    a, b = torch.arange(24.0).view(4, 6), torch.tensor(7, dtype=torch.int64)
    save_file({"a": a, "b": b}, tmp_path / "1.safetensors")
    save_file({"c": a.bfloat16()}, tmp_path / "2.safetensors")
    read = ap.SafetensorsReader(tmp_path)
    assert read.names() == ["a", "b", "c"] and "a" in read
    assert torch.equal(read("a", (slice(1, 3), slice(None))), a[1:3]) and torch.equal(read("a", (slice(None), slice(2, 4))), a[:, 2:4])
    assert torch.equal(read("a"), a) and read("b", ()).item() == 7 and read("c", (slice(0, 1), slice(None))).dtype == torch.bfloat16
    with pytest.raises(SavedirError, match=r"no weights for 'aa' in .*did you mean 'a'\?"):
        read("aa", ())
    with pytest.raises(SavedirError, match=r"no \.safetensors file"):
        (tmp_path / "empty").mkdir()
        ap.SafetensorsReader(tmp_path / "empty")
    (tmp_path / "3.safetensors").write_bytes(b"half")
    with pytest.raises(SavedirError, match=r"cannot read weights from .*3.safetensors"):
        ap.SafetensorsReader(tmp_path)


def test_dims_sharded_inside_groups_are_read_in_pieces():
    whole = torch.arange(12 * 8).view(12, 8)
    want = whole.view(3, 4, 2, 4)

    def read(axes, rank):
        p = Placement("w", (12, 8), torch.int64, ("S(0/3)", "S(1/2)"))
        p.check(axes)
        return p.local_shape(axes), p.shard(axes, lambda slices: whole[slices]), [axes[n].rank for n in "ab"]

    for shape, got, (a, b) in run_ranks((("a", 2), ("b", 2)), read):
        expected = want[:, 2 * a : 2 * a + 2, :, 2 * b : 2 * b + 2].reshape(6, 4)
        assert shape == (6, 4) and torch.equal(got, expected)
    for shape, got, _ in run_ranks((("a", 2), ("b", 1)), read):
        assert shape == (6, 8) and got.shape == shape
