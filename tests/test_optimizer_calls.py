"""ParallelOptimizer as torch's: the order of calls, groups, state, hooks; and everything that is refused.
Must not know how gradients are summed.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_optimizer import SCHEDULES, layout, no_decay

from autopar.codegen.load import load_module_class
from autopar.config import ComputeConfig
from autopar.errors import ConfigError, LayoutError
from autopar.runtime.axis import record
from autopar.runtime.inproc import run_ranks
from autopar.runtime.optimizer import build_optimizer
from tests.training import batches, original, train_rank, zero_config

# -- order of calls


def one_rank(model="tied"):
    at = layout(model, "one")
    out = []
    run_ranks(at.mesh, lambda mesh, rank: out.append(at.load(mesh)))
    return out[0]


def loss_of(model):
    return model(*batches(0)[0])


def test_step_before_backward():
    model = one_rank()
    o = build_optimizer(model, torch.optim.SGD, lr=0.1)
    for call in (o.step, o.clip_gnorm, o.sync_shard_grad, lambda: o.scale_grads(0.5)):
        with pytest.raises(LayoutError, match=r"no parameter has a gradient: call backward\(\)"):
            call()
    loss_of(model).backward()
    o.step()
    o.zero_grad()
    with pytest.raises(LayoutError, match="no parameter has a gradient"):
        o.step()


def test_step_twice():
    model = one_rank()
    o = build_optimizer(model, torch.optim.SGD, lr=0.1)
    loss_of(model).backward()
    o.step()
    with pytest.raises(LayoutError, match="second time on the same gradients"):
        o.step()


@pytest.mark.parametrize("before", ["step", "clip_gnorm", "sync_shard_grad"])
def test_backward_after_the_sum(before):
    model = one_rank()
    o = build_optimizer(model, torch.optim.SGD, lr=0.1)
    loss_of(model).backward()
    loss_of(model).backward()  # accumulation
    getattr(o, before)()
    with pytest.raises(LayoutError, match=r"after the gradients were summed.*call zero_grad\(\)"):
        loss_of(model).backward()
    o.zero_grad()
    loss_of(model).backward()
    o.step()


def test_unfrozen_too_late():
    model = one_rank()
    o = build_optimizer(model, torch.optim.SGD, lr=0.1)
    model.requires_grad_(True)
    loss_of(model).backward()
    with pytest.raises(LayoutError, match=r"frozen\.weight has a gradient, but was frozen when the optimizer was built"):
        o.step()


def test_gradients_are_summed_once():
    """Also where train_step has asked for it already."""
    at = layout("tied", "tp2x2")

    def fn(mesh, rank):
        model = at.load(mesh)
        o = build_optimizer(model, torch.optim.SGD, at.config, lr=0.1)
        loss_of(model).backward()
        with record() as log:
            model._grad_reducer.reduce()
        first = len(log)
        with record() as log:
            o.sync_shard_grad()
            o.scale_grads(1 / mesh.units)
            norms = len(log)
            norm = o.clip_gnorm(1e9)
            norms = len(log) - norms
            o.step()
        assert first > 0 and len(log) == norms == 1, "the norm's one number is all that is sent"
        return norm.item()

    plain = original("tied")
    loss_of(plain).backward()
    want = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e9).item()
    for got in run_ranks(at.mesh, fn, units=2):
        assert abs(got - want) < 1e-12


# -- groups


def test_groups():
    model = one_rank()
    asked = []

    def fn(name):
        asked.append(name)
        return no_decay(name)

    o = build_optimizer(model, torch.optim.AdamW, lr=0.1, param_group_fn=fn)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert asked == names
    groups = [[next(n for n in names if model.get_parameter(n) is p) for p in g["params"]] for g in o.param_groups]
    small = [n for n in names if no_decay(n)]
    assert sorted(groups) == sorted([small, [n for n in names if n not in small]])
    assert {(g["lr"], g["weight_decay"]) for g in o.param_groups} == {(3e-3, 0.0), (0.1, 1e-2)}
    assert o.param_groups is o.optimizer.param_groups and o.defaults is o.optimizer.defaults and isinstance(o, torch.optim.Optimizer)


def test_a_rank_that_updates_nothing_of_a_group():
    """ZeRO may leave a rank without a piece of a group, or without any; schedulers see the same groups everywhere."""
    at = layout("tied", "units2")

    def fn(mesh, rank):
        model = at.load(mesh)
        o = build_optimizer(
            model, torch.optim.AdamW, zero_config(at, use_zero=1), lr=1e-2, param_group_fn=lambda n: {"lr": 1e-3} if n == "pos" else None
        )
        got = train_rank(model, mesh, o, schedule=SCHEDULES["step"](o), clip=1.0)
        return [g["lr"] for g in o.param_groups], [len(g["params"]) for g in o.param_groups], got[1]

    a, b = run_ranks(at.mesh, fn, units=2)
    assert a[0] == b[0] and a[2] == b[2] and 0 in (*a[1], *b[1])


@pytest.mark.parametrize("given", [None, {"zero_ngroups": 1}, {"use_zero": False}])
def test_the_configuration_that_the_module_was_compiled_with(given):
    """It is what counts where none is given; a dict changes settings of it."""
    at = layout("tied", "units2")

    def fn(mesh, rank):
        model = at.load(mesh)
        model.compute_config = zero_config(at, use_zero=1)  # as parallelize leaves it
        o = build_optimizer(model, torch.optim.SGD, given, lr=0.1)
        return sum(p.param.numel() for p, _ in o.named_pieces()), sum(p.numel() for p in model.parameters() if p.requires_grad)

    (a, all_), (b, _) = run_ranks(at.mesh, fn, units=2)
    assert a + b == (2 * all_ if given == {"use_zero": False} else all_)


# -- state


def test_state_dict_resumes():
    at = layout("tied", "tp2x2")

    def fn(mesh, rank):
        model, again = at.load(mesh), at.load(mesh)
        o = build_optimizer(model, torch.optim.AdamW, at.config, lr=1e-2, param_group_fn=no_decay)
        train_rank(model, mesh, o, steps=2)
        again.load_state_dict({n: v.clone() for n, v in model.state_dict().items()})
        p = build_optimizer(again, torch.optim.AdamW, at.config, param_group_fn=no_decay)
        p.load_state_dict(copy.deepcopy(o.state_dict()))
        assert p.param_groups[0]["lr"] == o.param_groups[0]["lr"]
        train_rank(model, mesh, o)
        train_rank(again, mesh, p)
        for a, b in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)

    run_ranks(at.mesh, fn, units=2)


def test_named_pieces():
    model = one_rank()
    o = build_optimizer(model, torch.optim.AdamW, lr=1e-2)
    assert all(state == {} for _, state in o.named_pieces())
    loss_of(model).backward()
    o.step()
    for piece, state in o.named_pieces():
        assert piece.param is model.get_parameter(piece.name) and (piece.start, piece.stop) == (0, piece.param.numel())
        if piece.name == "unused":
            assert state == {}
        else:
            assert state["exp_avg"].shape == piece.param.shape and state["step"] == 1
            o.load_piece(piece, {k: v * 2 for k, v in state.items()})
            assert o.state[piece.param]["step"] == 2
    assert [p.name for p, _ in o.named_pieces()] == [n for n, p in model.named_parameters() if p.requires_grad]


# -- hooks


def test_hooks():
    model = one_rank()
    o = build_optimizer(model, torch.optim.SGD, lr=0.1)
    seen = []
    o.register_step_pre_hook(lambda opt, args, kwargs: seen.append(("before", opt is o, model.pos.grad is not None)))
    o.register_step_post_hook(lambda opt, args, kwargs: seen.append(("after", opt is o, True)))
    loss_of(model).backward()
    o.step()
    assert seen == [("before", True, True), ("after", True, True)]


def test_reducer_hooks():
    at = layout("tied", "units2")

    def fn(mesh, rank):
        model = at.load(mesh)
        o = build_optimizer(model, torch.optim.SGD, at.config, lr=0.1)
        seen = []
        o.register_reducer_pre_hook(lambda reducer, grad: (seen.append("pre"), grad.mul_(0.5)))
        o.register_reducer_post_hook(lambda reducer, grad: seen.append("post"))
        loss_of(model).backward()
        norm = o.clip_gnorm()
        assert seen == ["pre"] * (len(seen) // 2) + ["post"] * (len(seen) // 2) and seen
        return norm.item()

    plain = original("tied")
    loss_of(plain).backward()
    want = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e9).item()  # half of two equal batches
    assert all(abs(n - want) < 1e-12 for n in run_ranks(at.mesh, fn, units=2))


# -- bad input


class Other(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(3, 7))


def some(groups, **kwargs):
    groups[0]["params"] = groups[0]["params"][1:]
    return torch.optim.SGD(groups, **kwargs)


BAD = {
    "foreign": (lambda groups, **k: torch.optim.SGD(Other().parameters(), **k), {}, r"1 tensors that are not parameters.*\(3, 7\)"),
    "a copy": (lambda groups, **k: torch.optim.SGD([p.clone().detach() for p in groups[0]["params"]], **k), {}, "not parameters of"),
    "left out": (some, {}, r"leaves out pos; freeze"),
    "an instance": (torch.optim.SGD(Other().parameters(), lr=0.1), {}, "give a class, e.g. torch.optim.AdamW"),
    "no optimizer": (lambda groups, **k: 7, {}, "returned int"),
    "a typo": (torch.optim.SGD, dict(param_group_fn=lambda n: {"wieght_decay": 0.0}), r"'wieght_decay'.*did you mean 'weight_decay'"),
    "a number": (torch.optim.SGD, dict(param_group_fn=lambda n: 7), r"param_group_fn\('pos'\) returned 7; it returns a dict"),
    "config": (torch.optim.SGD, dict(compute_config=ComputeConfig(plan_ngpus=2)), "plan_ngpus=2, but the module was compiled for 1"),
    "config key": (torch.optim.SGD, dict(compute_config={"use_zro": 1}), "did you mean 'use_zero'"),
    "inference": (torch.optim.SGD, dict(compute_config={"inference_only": True}), "inference_only=True"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, kwargs, text = BAD[case]
    with pytest.raises(ConfigError, match=text):
        build_optimizer(one_rank(), make, lr=0.1, **kwargs)


def test_nothing_to_train():
    model = one_rank().requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        build_optimizer(model, torch.optim.SGD, lr=0.1)


def test_two_optimizers():
    model = one_rank("around")
    build_optimizer(model.a, torch.optim.SGD, lr=0.1)
    with pytest.raises(ConfigError, match="a has an optimizer already"):
        build_optimizer(model, torch.optim.SGD, lr=0.1)


def test_what_is_fixed_when_it_is_built():
    model = one_rank()
    o = build_optimizer(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(ConfigError, match="param_group_fn"):
        o.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ConfigError, match=r"zero_grad\(set_to_none=False\) is not supported"):
        o.zero_grad(set_to_none=False)
    with pytest.raises(TypeError, match="use state_dict"):
        copy.deepcopy(o)


def test_weights_not_loaded():
    at = layout("tied", "one")

    def fn(mesh, rank):
        return load_module_class(at.parts[""].texts)(mesh)

    with pytest.raises(ConfigError, match="has no memory yet"):
        build_optimizer(run_ranks(at.mesh, fn)[0], torch.optim.SGD, lr=0.1)
