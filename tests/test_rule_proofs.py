"""Every sample of every op: each legal factor, group, linear group and pair of axes equals the whole op, forward and backward.
Must not know rules: the prover reads recipes; the negative tests break rules to see that it notices.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from autopar.ir.graph import Op, Ref
from autopar.rules import canonical, localise, recipe_of, registry
from autopar.rules.oneop import one_op
from autopar.rules.prove import Row, prove
from autopar.rules.recipe import Factor, Recipe, Split
from autopar.rules.registry import known_ops
from autopar.rules.samples import Sample, T, samples

F = "torch.nn.functional."
pytestmark = pytest.mark.filterwarnings("ignore")  # torch on deprecated ops and broadcast targets
BY_OP = {k: list(g) for k, g in itertools.groupby(sorted(samples(), key=lambda s: canonical(s.fn)), key=lambda s: canonical(s.fn))}


@pytest.mark.parametrize("name", BY_OP)
def test_samples(name):
    row = Row(name)
    for sample in BY_OP[name]:
        row.add(sample)
    assert not row.complaints, "\n".join(row.complaints[:10])
    assert row.proofs or not any(s.splits for s in BY_OP[name])


# Results are uninitialised memory, so there is nothing to compare.
UNPROVABLE = {"empty", "new_empty", "empty_like"}


def test_every_op_has_a_sample():
    tables = {"elementwise", "matmul", "views", "indexing", "reduce", "create"}
    mine = {n for n in known_ops() if registry.find_rule(n).recipe.__module__.rpartition(".")[2] in tables}
    assert mine - set(BY_OP) == UNPROVABLE


def test_every_rule_has_a_sample():
    """Whatever may be split has been proven for at least one op of each rule; rules that never split are named so."""
    rules = {registry.find_rule(n) for n in known_ops() if ":" not in n}
    bare = {r.recipe.__name__ for r in rules if not set(r.names) & set(BY_OP)} - {"affine_grid"}  # never split either
    assert all("unsplit" in n or n.startswith("whole") for n in bare), bare


# -- broken on purpose


def broken(sample: Sample, change) -> list[str]:
    one = sample.make()
    recipe = recipe_of(one.block, one.op, strict=True)
    return [str(p) for p in prove(one, change(recipe)) if not p.ok]


def test_mean_without_its_division(monkeypatch):
    monkeypatch.setattr(registry.find_rule("mean"), "local_form", None)
    assert broken(Sample("torch.mean", T(8, 12), 1), lambda r: r)


def test_view_without_local_sizes(monkeypatch):
    monkeypatch.setattr(registry.find_rule("view"), "local_form", None)
    assert broken(Sample("torch.Tensor.view", T(8, 12), 8, 3, 4), lambda r: r)


def with_factor(name, **changes):
    return lambda r: replace(r, factors={**r.factors, name: replace(r.factors[name], **changes)})


def renamed(inputs, outputs):
    return lambda r: replace(r, inputs=inputs, outputs=outputs)


D0, D1 = ("d0",), ("d1",)
WRONG = {
    "softmax split on its dim": (Sample("torch.softmax", T(8, 12), 1), with_factor("d1", split=True)),
    "cumsum split on its dim": (Sample("torch.cumsum", T(8, 12), 1), with_factor("d1", split=True)),
    "max summed": (Sample("torch.amax", T(8, 12), 1), with_factor("d1", split=True, reduce="sum")),
    "prod summed": (Sample("torch.prod", T(8, 12), 1), with_factor("d1", split=True, reduce="sum")),
    "var summed": (Sample("torch.var", T(8, 12), 1), with_factor("d1", split=True, reduce="sum")),
    "layer_norm split on its dim": (Sample(F + "layer_norm", T(8, 12), (12,)), with_factor("n0", split=True)),
    "bias added on every rank": (Sample(F + "linear", T(8, 12), T(4, 12), T(4)), lambda r: replace(r, partial_bias=())),
    "bias as addend of nothing": (Sample(F + "linear", T(8, 12), T(4, 12), T(4)), lambda r: replace(r, linear=((0,),))),
    "scalar added to addends": (Sample("torch.add", T(8, 12), 1.0), lambda r: replace(r, linear=((0,),))),
    "add linear in one alone": (Sample("torch.add", T(8, 12), T(12)), lambda r: replace(r, linear=((0,),))),
    "mul linear in both": (Sample("torch.mul", T(8, 12), T(12)), lambda r: replace(r, linear=((0, 1),))),
    "division linear in the divisor": (Sample("torch.div", T(8, 12), T(12, values="positive")), lambda r: replace(r, linear=((1,),))),
    "relu of addends": (Sample(F + "relu", T(8, 12)), lambda r: replace(r, linear=((0,),))),
    "fill with a number": (Sample("torch.masked_fill", T(8, 12), T(12, values="bool"), 1.0), lambda r: replace(r, linear=((0,),))),
    "transposed output": (Sample("torch.sin", T(12, 12)), renamed(((D0, D1),), ((D1, D0),))),
    "shard taken for whole": (Sample("torch.mul", T(12, 12), T(12, 12)), renamed(((D0, D1), ((), D1)), ((D0, D1),))),
    "inner factor as outer": (
        Sample("torch.Tensor.view", T(8, 16), 8, 4, 4),
        renamed(((("v0",), ("v2", "v1")),), ((("v0",), ("v1",), ("v2",)),)),
    ),
    "tril split": (
        Sample("torch.tril", T(8, 12)),
        lambda r: Recipe(((D0, D1),), ((D0, D1),), {n: Factor(n, s, True) for n, s in (("d0", 8), ("d1", 12))}),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_prover_notices(name):
    sample, change = WRONG[name]
    assert broken(sample, change), name
    assert not broken(sample, lambda r: r)


# -- forms without a rule


def test_canonical_names():
    table = {
        "add": "torch.add torch.Tensor.add_ torch.Tensor.__add__ torch.Tensor.__radd__ torch.Tensor.__iadd__ operator.add operator.iadd",
        "linear": "torch.nn.functional.linear torch._C._nn.linear",
        "to": "torch.Tensor.float torch.Tensor.to torch.Tensor.bool torch.Tensor.type",
        "T": "torch.Tensor.T.__get__ torch.Tensor.T",
        "getitem": "torch.Tensor.__getitem__ operator.getitem",
        "floor_divide": "torch.floor_divide torch.Tensor.__floordiv__ operator.floordiv",
        "rsub": "torch.rsub torch.Tensor.__rsub__",
        "linalg_norm": "torch.linalg.norm",
        "sigmoid": "torch.special.expit torch.Tensor.sigmoid_",
        "pkg.mod:add_": "pkg.mod:add_",
        "apply:pkg.mod:Add": "apply:pkg.mod:Add",
        "torch.ops.my.op": "torch.ops.my.op torch.ops.my.op.default",
        "__bool__": "torch.Tensor.__bool__",
    }
    for name, spellings in table.items():
        for fn in spellings.split():
            assert canonical(fn) == name, fn


ODD = [None, -7, 99, 2.5, True, "x", (), (0, 0), (1, "a"), [3], ..., slice(None), torch.float32, {"a": 1}, Ref(0), (Ref(0), Ref(0))]


@pytest.mark.parametrize("name", [n for n in known_ops() if ":" not in n])
def test_odd_arguments_never_raise(name):
    """Wrong or unknown forms give no recipe or one that fits; they never raise."""
    one = one_op("torch.add", torch.randn(4, 8), torch.randn(8))
    forms = [((Ref(0), a), {}) for a in ODD] + [((Ref(0), Ref(1), a), {}) for a in ODD] + [((Ref(0),), {"dim": a}) for a in ODD]
    for args, kwargs in [*forms, ((), {}), ((), {"out": Ref(0)}), ((Ref(0),), {"what": Ref(1)})]:
        op = replace(one.op, fn=name, args=args, kwargs=kwargs)
        recipe = recipe_of(one.block, op)
        assert recipe is None or isinstance(recipe, Recipe)


def test_whole_ops_stay_whole():
    one = one_op("torch.Tensor.add_", torch.randn(4, 8), torch.randn(8))
    recipe = recipe_of(one.block, replace(one.op, whole=True))
    assert recipe.choices(2) == () and not recipe.linear


def test_unknown_op():
    one = one_op("torch.add", torch.randn(4, 8), torch.randn(8))
    assert recipe_of(one.block, replace(one.op, fn="torch.some_new_function")) is None


def test_local_form_keeps_the_users_spelling():
    one = one_op("torch.Tensor.view", torch.randn(8, 24), 8, -1, 6)
    recipe = recipe_of(one.block, one.op)
    (v0, *_), (v1, *_) = recipe.outputs[0][:2]
    assert localise(one.block, one.op, recipe, (Split("tp", 2, v1),)).args == (Ref(0), 8, -1, 6)
    assert localise(one.block, one.op, recipe, (Split("tp", 2, v0), Split("dp", 2, v0))).args == (Ref(0), 2, -1, 6)
    assert localise(one.block, one.op, recipe, ()).args == one.op.args


def test_flops_of_matmuls():
    for sample, flops in (
        (Sample(F + "linear", T(8, 12, 16), T(4, 16), T(4)), 2 * 8 * 12 * 16 * 4),
        (Sample("torch.matmul", T(4, 8, 12), T(12, 16)), 2 * 4 * 8 * 12 * 16),
        (Sample("torch.bmm", T(4, 8, 12), T(4, 12, 16)), 2 * 4 * 8 * 12 * 16),
        (Sample("torch.addmm", T(16), T(8, 12), T(12, 16)), 2 * 8 * 12 * 16),
        (Sample("torch.einsum", "bhid,bhjd->bhij", T(2, 4, 8, 16), T(2, 4, 12, 16)), 2 * 2 * 4 * 8 * 12 * 16),
    ):
        one = sample.make()
        recipe = recipe_of(one.block, one.op)
        assert isinstance(one.op, Op) and recipe.matmul and recipe.flops == flops, sample
