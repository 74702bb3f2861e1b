"""The notation: what parses, how it fits shapes, and what the errors say.
Must not know ops.
"""

import pytest

from autopar.errors import RuleError
from autopar.rules.notation import parse

FITS = [
    ("* k+, n k+ -> * n", [(2, 8, 16), (32, 16)], [(2, 8, 32)], "*0=2 *1=8 k=16+ n=32"),
    ("* d^, d^, d^ -> * d^", [(2, 8, 16), (16,), (16,)], [(2, 8, 16)], "*0=2 *1=8 d=16^"),
    ("b s (h d^) -> b s h d^", [(2, 8, 12)], [(2, 8, 4, 3)], "b=2 s=8 h=4 d=3^"),
    ("b (2 n) -> b n", [(4, 12)], [(4, 6)], "b=4 n=6"),
    ("a 3, ? -> a", [(4, 3), (9, 9)], [(4,)], "a=4"),
    (" -> a^", [], [(4,)], "a=4^"),
    ("k+, k+ -> ", [(4,), (4,)], [()], "k=4+"),
    ("*, * -> *", [(4, 5), (4, 5)], [(4, 5)], "*0=4 *1=5"),
    ("* -> *", [()], [()], ""),
]


@pytest.mark.parametrize("text, inputs, outputs, factors", FITS)
def test_fits(text, inputs, outputs, factors):
    bound = parse(text).bind(inputs, outputs)
    mark = {(True, None): "", (True, "sum"): "+", (False, None): "^"}
    assert " ".join(f"{f.name}={f.size}{mark[f.split, f.reduce]}" for f in bound.factors.values()) == factors


WRONG_TEXT = [
    ("a b", "with one '->'"),
    ("a -> b -> c", "with one '->'"),
    ("a b -> a", "lacks b"),
    ("a -> a b", "b of output 'a b' occurs in no input"),
    ("a a -> a", "a twice in 'a a'"),
    ("a+ b, a^ -> b", "a marked both"),
    ("a * -> a", "'*' may only come first"),
    ("a -> * a", "'*' must stand in inputs"),
    ("* a -> a", "'*' must stand in inputs"),
    ("(a (b c)) -> a b c", "nested"),
    ("(a b -> a b", "not closed"),
    ("a) -> a", "without '('"),
    ("() a -> a", "empty"),
    ("a! -> a", "'!' is not understood"),
    ("a ? -> a", "'?' stands alone"),
]


@pytest.mark.parametrize("text, says", WRONG_TEXT)
def test_wrong_text(text, says):
    with pytest.raises(RuleError) as e:
        parse(text)
    assert says in str(e.value) and repr(text) in str(e.value)


WRONG_SHAPE = [
    ("a b, b -> a b", [(4, 8), (9,)], [(4, 8)], "'b' of size 9 does not fit b=8"),
    ("a b -> a b", [(4, 8, 2)], [(4, 8)], "has 2 dims, the tensor is [4, 8, 2]"),
    ("a b -> a b", [(4, 8), (2,)], [(4, 8)], "names 1 inputs and 1 outputs, the call has 2 and 1"),
    ("* a, * a -> * a", [(4, 8), (8,)], [(4, 8)], "'*' stands for 1 dims and for 0"),
    ("(a b^) -> a", [(12,)], [(5,)], "does not fit"),
    ("(a b) -> (a b)", [(12,)], [(12,)], "cannot be told from the shapes"),
    ("a 3 -> a", [(4, 5)], [(4,)], "'3' of size 5 does not fit 3"),
]


@pytest.mark.parametrize("text, inputs, outputs, says", WRONG_SHAPE)
def test_wrong_shape(text, inputs, outputs, says):
    with pytest.raises(RuleError) as e:
        parse(text).bind(inputs, outputs)
    assert says in str(e.value) and repr(text) in str(e.value)


def test_parsed_once():
    assert parse("a b -> b a") is parse("a b -> b a")
