"""rules/training.py: what ops recorded in training mode become in generated code.
Knows only single ops written by hand.
"""

import pytest
import torch

from autopar.ir.graph import Op, Ref, Source
from autopar.rules.recipe import TrainingOnly
from autopar.rules.training import FLAG, at_run_time, settle

F = "torch.nn.functional."
X = Ref(0)


def op(fn, *args, text="", **kwargs):
    return Op("x", fn, args, kwargs, Ref(9), "", Source("model.py", 1, "forward", text))


REWRITTEN = [
    # a module's dropout, as torch passes it on
    (op(F + "dropout", X, p=0.1, training=True, inplace=False, text="x = self.dropout(x)"), {"p": 0.1, "training": FLAG, "inplace": False}),
    (op(F + "dropout", X, p=0.1, training=True, text="x = F.dropout(x, 0.1, self.training)"), {"p": 0.1, "training": FLAG}),
    (op(F + "dropout", X, p=0.1, training=True, text="x = F.dropout(x, p=0.1, training=self.training)"), {"p": 0.1, "training": FLAG}),
    (op(F + "dropout", X, p=0.1, training=True, text="x = F.dropout("), {"p": 0.1, "training": FLAG}),
    (op(F + "dropout", X, p=0.1, training=False, text="x = self.dropout(x)"), {"p": 0.1, "training": False}),
    # always on: the user asks for it
    (op(F + "dropout", X, p=0.1, training=True, text="x = F.dropout(x, 0.1)"), {"p": 0.1, "training": True}),
    (op(F + "dropout", X, p=0.1, training=True, text="x = nn.functional.dropout(x, training=True)"), {"p": 0.1, "training": True}),
    (op(F + "dropout", X, p=0.1, training=True, text="return F.dropout(F.relu(x), 0.1, True)"), {"p": 0.1, "training": True}),
    (op(F + "dropout", X, p=0.1, training=True, text="x = F.dropout(x, **self.options)"), {"p": 0.1, "training": FLAG}),
    # attention
    (op(F + "scaled_dot_product_attention", X, X, X, dropout_p=0.1), {"dropout_p": TrainingOnly(0.1, 0.0)}),
    (op(F + "scaled_dot_product_attention", X, X, X, dropout_p=0.0), {"dropout_p": 0.0}),
    (
        op(F + "scaled_dot_product_attention", X, X, X, dropout_p=0.1, text="y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)"),
        {"dropout_p": 0.1},
    ),
    # statistics: the flag is the module's only where it keeps running ones
    (op(F + "batch_norm", X, Ref(1), Ref(2), training=True), {"training": FLAG}),
    (op(F + "batch_norm", X, None, None, training=True), {"training": True}),
    (op(F + "batch_norm", X, Ref(1), Ref(2), training=False), {"training": False}),
    (op(F + "instance_norm", X, running_mean=Ref(1), running_var=Ref(2), use_input_stats=True), {"use_input_stats": FLAG}),
    (op(F + "instance_norm", X, None, None, use_input_stats=True), {"use_input_stats": True}),
    # not torch's
    (op("pkg.mod:dropout", X, training=True), {"training": True}),
    (op(F + "relu", X, inplace=True), {"inplace": True}),
]


@pytest.mark.parametrize(("op", "kwargs"), REWRITTEN, ids=lambda v: v.src.text or v.fn if isinstance(v, Op) else "")
def test_keyword(op, kwargs):
    got = at_run_time(op)[1]
    assert {k: got[k] for k in kwargs} == kwargs
    assert settle(got, True) == op.kwargs  # in training mode, what was recorded


@pytest.mark.parametrize(
    ("op", "at"),
    [
        (op(F + "dropout", X, 0.1, True, text="self.drop(x)"), 2),
        (op("torch.dropout", X, 0.1, True), 2),
        (op(F + "scaled_dot_product_attention", X, X, X, None, 0.1), 4),
        (op(F + "batch_norm", X, Ref(1), Ref(2), None, None, True), 5),
        (op("torch._VF.lstm", X, (X, X), [X], True, 1, 0.1, True, False, True), 6),
        (op("torch._VF.lstm", X, X, (X, X), [X], True, 1, 0.1, True, False), 7),
    ],
)
def test_positional(op, at):
    args, _ = at_run_time(op)
    assert isinstance(args[at], TrainingOnly)
    assert [a for i, a in enumerate(args) if i != at] == [a for i, a in enumerate(op.args) if i != at]
    assert settle(args, True) == op.args
    assert settle(args, False)[at] in (False, 0.0)


def test_localise_rewrites_unsplit_ops_too():
    from autopar.rules.oneop import one_op
    from autopar.rules.registry import localise, recipe_of

    one = one_op(F + "dropout", torch.randn(4), p=0.5, training=True)
    emitted = localise(one.block, one.op, recipe_of(one.block, one.op), ())
    assert emitted.fn == one.op.fn and emitted.kwargs == {"p": 0.5, "training": FLAG}
