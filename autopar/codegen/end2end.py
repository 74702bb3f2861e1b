"""end2end: whether a traced module can be trained by train_step: one sample in, a scalar loss out first.
Must not know how steps are run (runtime/step.py).
"""

from __future__ import annotations

from typing import Any

from autopar.errors import ConfigError
from autopar.ir.graph import Argument, Block, Call, Graph, Ref, Source, Struct, refs

WAY_OUT = "; or compile with use_end2end=False and call the module yourself"


def check_end2end(graph: Graph, *, inference_only: bool = False) -> None:
    """Raise ConfigError unless the first argument is the sample, the others keep their defaults, and the loss comes first."""
    name = graph.module or graph.root
    _check_arguments(graph.arguments, name)
    first = _first(graph.output)
    if not isinstance(first, Ref):
        what = "nothing" if first is None else "a container" if isinstance(first, (tuple, list, dict, Struct)) else f"{first!r:.40}"
        raise ConfigError(f"use_end2end: what the forward of {name} returns first is {what}; return the scalar loss first{WAY_OUT}")
    value = graph.body.values[first.id]
    src = _source(graph.body, first.id)
    where = f" ({src}: {src.text})" if src else ""
    wrong = ""
    if not value.is_tensor:
        wrong = f"a Python {value.dtype}"
    elif value.shape != ():
        wrong = f"a tensor of shape {value.shape}"
    elif not value.dtype.startswith(("float", "bfloat")):
        wrong = f"a tensor of {value.dtype}"
    if wrong:
        raise ConfigError(
            f"use_end2end: the first value that the forward of {name} returns is {wrong}{where}; the loss must come first, "
            f"a floating-point tensor of one number without dims{WAY_OUT}"
        )
    if not value.grad and not inference_only:
        raise ConfigError(
            f"use_end2end: the loss that the forward of {name} returns{where} carries no gradient, so there is nothing to train; "
            f"do not detach it, or set inference_only=True"
        )


def _check_arguments(arguments: tuple[Argument, ...], name: str) -> None:
    rule = "train_step passes one sample, as the first argument of forward"
    if not arguments or arguments[0].kind in ("keyword", "var_keyword", "var_positional"):
        has = f"begins with {arguments[0].name!r}, which is not positional" if arguments else "has no arguments"
        raise ConfigError(f"use_end2end: the forward of {name} {has}; {rule}{WAY_OUT}")
    for a in arguments[1:]:
        if a.kind.startswith("var_") and not any(True for _ in refs(a.tree)):
            continue
        if not a.has_default:
            raise ConfigError(
                f"use_end2end: argument {a.name!r} of the forward of {name} has no default; {rule}, and the others keep their defaults. "
                f"Make the sample a dict or tuple of all inputs{WAY_OUT}"
            )
        if a.given and (any(True for _ in refs(a.tree)) or not _same(a.tree, a.default)):
            raise ConfigError(
                f"use_end2end: dummy_forward_args gives {a.name!r}, but {rule}, and the others keep their defaults. "
                f"Leave it out, or make the sample a dict or tuple of all inputs{WAY_OUT}"
            )


def _same(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except (TypeError, ValueError, RuntimeError):
        return False


def _first(tree: Any) -> Any:
    """The first value of an output: of a tuple, a list, a dict or a dataclass its first entry."""
    if isinstance(tree, Struct):
        return tree.items[0] if tree.items else None
    if isinstance(tree, dict):
        return next(iter(tree.values()), None)
    if isinstance(tree, (tuple, list)):
        return tree[0] if tree else None
    return tree


def _source(block: Block, value: int) -> Source | None:
    for op in block.ops:
        if not isinstance(op, Call) and hasattr(op, "out") and any(r.id == value for r in refs(op.out)):
            return op.src
    return None
