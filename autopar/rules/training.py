"""What an op recorded in training mode does in eval mode: literals that become `x if self.training else y`.
Must not know how an op is split: registry.localise calls `at_run_time` for every op, split or not.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

from autopar.ir.graph import Op
from autopar.rules.recipe import TrainingOnly

FLAG = TrainingOnly(True, False)

# name -> position of the training flag among the positional arguments
FLAGS = {
    "dropout": 2,
    "dropout1d": 2,
    "dropout2d": 2,
    "dropout3d": 2,
    "alpha_dropout": 2,
    "feature_alpha_dropout": 2,
    "feature_dropout": 2,
    "dropout_": 2,
    "rrelu": 3,
    "multi_head_attention_forward": 13,
}
# the flag counts as the module's only where running statistics are given (argument 1, running_mean)
STATISTICS = {"batch_norm": (5, "training"), "instance_norm": (5, "use_input_stats")}
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def name_of(fn: str) -> str:
    return fn.rpartition(".")[2]


def at_run_time(op: Op) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The op's arguments with the module's training flag in place of the value recorded."""
    name = name_of(op.fn)
    if not op.fn.startswith("torch."):
        return op.args, op.kwargs
    if name in STATISTICS and op.fn.startswith("torch.nn.functional."):
        at, key = STATISTICS[name]
        mean = op.args[1] if len(op.args) > 1 else op.kwargs.get("running_mean")
        return (op.args, op.kwargs) if mean is None else _rewrite(op, at, key)
    if name in FLAGS:
        key = "train" if not op.fn.startswith("torch.nn.functional.") else "training"
        return (op.args, op.kwargs) if _always(op, name, FLAGS[name], key) else _rewrite(op, FLAGS[name], key)
    if name in RECURRENT:
        padded = len(op.args) > 6 and isinstance(op.args[6], bool)  # a packed sequence has one argument more in front
        return _rewrite(op, 6 if padded else 7, "train")
    if name == "scaled_dot_product_attention":
        return _attention(op)
    return op.args, op.kwargs


def settle(tree: Any, training: bool) -> Any:
    """The tree with every TrainingOnly replaced by its value in a mode (for running an op, or a graph traced in eval mode)."""
    if isinstance(tree, TrainingOnly):
        return tree.value if training else tree.otherwise
    if isinstance(tree, tuple):
        return tuple(settle(x, training) for x in tree)
    if isinstance(tree, list):
        return [settle(x, training) for x in tree]
    if isinstance(tree, dict):
        return {k: settle(v, training) for k, v in tree.items()}
    return tree


def _rewrite(op: Op, at: int, key: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(op.args) > at and op.args[at] is True:
        return (*op.args[:at], FLAG, *op.args[at + 1 :]), op.kwargs
    if op.kwargs.get(key) is True:
        return op.args, {**op.kwargs, key: FLAG}
    return op.args, op.kwargs


def _attention(op: Op) -> tuple[tuple[Any, ...], dict[str, Any]]:
    p = op.args[4] if len(op.args) > 4 else op.kwargs.get("dropout_p", 0.0)
    if not isinstance(p, float) or p == 0.0:
        return op.args, op.kwargs
    call = _call(op, "scaled_dot_product_attention")
    if call is not None:
        given = {k.arg: k.value for k in call.keywords}.get("dropout_p", call.args[4] if len(call.args) > 4 else None)
        if isinstance(given, ast.Constant):
            return op.args, op.kwargs  # the user wrote a number: the same in both modes
    only = TrainingOnly(p, 0.0)
    if len(op.args) > 4:
        return (*op.args[:4], only, *op.args[5:]), op.kwargs
    return op.args, {**op.kwargs, "dropout_p": only}


def _always(op: Op, name: str, at: int, key: str) -> bool:
    """Whether the user's source shows a call that drops in eval mode too: `F.dropout(x, 0.1)`, `F.dropout(x, training=True)`.

    NB: torch passes `training=True` on in both cases, so only the source line can tell.
    """
    call = _call(op, name)
    if call is None or not isinstance(call.func, ast.Attribute):
        return False
    root = call.func
    while isinstance(root, ast.Attribute):
        root = root.value
    if not (isinstance(root, ast.Name) and root.id in ("F", "nn", "torch", "functional")):
        return False  # a module's call: self.dropout(x)
    if any(k.arg is None for k in call.keywords) or any(isinstance(a, ast.Starred) for a in call.args):
        return False
    given = {k.arg: k.value for k in call.keywords}.get(key, call.args[at] if len(call.args) > at else None)
    if given is None:
        return op.fn.startswith("torch.nn.functional.") and "alpha" not in name
    return isinstance(given, ast.Constant) and given.value is True


def _call(op: Op, name: str) -> ast.Call | None:
    """The one call of the name in the op's source line, where the line holds all of it."""
    try:
        tree = ast.parse(op.src.text.strip().removesuffix(":"))
    except (SyntaxError, ValueError):
        return None
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func).rpartition(".")[2] == name]
    return calls[0] if len(calls) == 1 else None


def without_training(op: Op) -> Op:
    """The op with arguments settled for training mode, as it was recorded."""
    args, kwargs = at_run_time(op)
    return replace(op, args=settle(args, True), kwargs=settle(kwargs, True))
