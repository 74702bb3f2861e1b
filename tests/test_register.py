"""register_op and verify_op as a user calls them.
Must not know the built-in tables.
"""

import pytest
import torch
import torch.nn.functional as F

from autopar.errors import ConfigError, RuleError, VerifyError
from autopar.rules.oneop import one_op
from autopar.rules.register import register_op, verify_op
from autopar.rules.registry import recipe_of
from autopar.trace.leaves import LEAVES, unregister_leaf


@register_op("* k+, n k+ -> * n", linear=((0,), (1,)))
def my_linear(x, w):
    return x @ w.T


@register_op(notation=lambda x, heads: "b s (h^ d) -> b s h^ d" if heads < 0 else "b s (h d^) -> b s h d^")
def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)) if heads > 0 else None


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x * scale

    @staticmethod
    def backward(ctx, g):
        return g * ctx.scale, None


def wrong_gradient(x):
    return x.detach() * 2 + (x - x.detach()) * x.mean()


def softmax_like(x):
    return torch.softmax(x, -1)


def gain(x, scale, bias):
    return x * scale + bias


X, W = torch.randn(8, 12, 16), torch.randn(4, 16)


def test_registered_function_is_a_leaf_with_a_rule():
    assert my_linear in LEAVES and my_linear(X, W).shape == (8, 12, 4)
    one = one_op(f"{__name__}:my_linear", X, W)
    recipe = recipe_of(one.block, one.op)
    assert set(recipe.choices(4)) == {"*0", "*1", "k", "n"} and recipe.linear == ((0,), (1,))


def test_verify_registered():
    report = verify_op(my_linear, None, X, W)
    assert len(report) > 20 and "agree with the whole op" in str(report)


def test_notation_given():
    assert verify_op(F.gelu, "a b -> a b", torch.randn(8, 12))
    assert verify_op(softmax_like, "* d^ -> * d^", X)
    assert verify_op(gain, "a b, ?, b -> a b", torch.randn(8, 12), 2.0, torch.randn(12))
    assert verify_op(gain, "a b, b -> a b", torch.randn(8, 12), 2.0, torch.randn(12))


def test_builtin_by_name():
    assert verify_op("torch.nn.functional.linear", None, X, W)
    assert verify_op(torch.sin, None, torch.randn(8, 12))


def test_autograd_function():
    register_op(Double, "* -> *", linear=((0,),))
    assert verify_op(Double, None, torch.randn(8, 12), 3.0)


def test_callable_notation_sees_the_arguments():
    one = one_op(f"{__name__}:split_heads", torch.randn(8, 12, 16), 4)
    recipe = recipe_of(one.block, one.op)
    assert recipe.factors["h"].size == 4 and not recipe.factors["d"].split


@pytest.mark.parametrize(
    "fn, notation, inputs, says",
    [
        (softmax_like, "* d -> * d", (X,), "output 0"),
        (lambda x: x.mean(1), "a b+ -> a", (torch.randn(8, 12),), "output 0"),
        (lambda x: x.flip(0), "a b -> a b", (torch.randn(8, 12),), "output 0"),
        (wrong_gradient, "a b -> a b", (torch.randn(8, 12),), "the gradient of x0"),
        (lambda x, w, b: F.linear(x, w, b), "* k+, n k+, n -> * n", (X, W, torch.randn(4)), "output 0"),
    ],
)
def test_wrong_notation_is_found(fn, notation, inputs, says):
    with pytest.raises(VerifyError) as e:
        verify_op(fn, notation, *inputs)
    assert says in str(e.value)


def test_errors():
    with pytest.raises(RuleError, match="needs a notation"):
        register_op(wrong_gradient)
    with pytest.raises(RuleError, match="lacks b"):
        register_op(wrong_gradient, "a b -> a")
    with pytest.raises(ConfigError, match="not a plain function"):
        register_op(3, "a -> a")
    with pytest.raises(ConfigError, match="lambda or local"):
        register_op(lambda x: x, "a -> a")
    with pytest.raises(RuleError, match="has no rule"):
        verify_op(wrong_gradient, None, X)
    with pytest.raises(RuleError, match="nothing to verify"):
        verify_op(softmax_like, "* a^ b^ -> * a^ b^", torch.randn(3, 5, 7))
    with pytest.raises(RuleError, match="does not fit"):
        verify_op(softmax_like, "a b -> b a", torch.randn(8, 12))


def test_a_registered_notation_that_does_not_fit_says_where():
    register_op(softmax_like, "a b -> a b")
    try:
        one = one_op(f"{__name__}:softmax_like", X)
        with pytest.raises(RuleError, match="has 2 dims, the tensor is"):
            recipe_of(one.block, one.op)
    finally:
        unregister_leaf(softmax_like)
