"""Rules of convolutions: batch, output channels, input channels (a sum), groups. Spatial dims are not split (they need neighbours).
Must not know kernels or padding.
"""

from __future__ import annotations

from math import prod

from autopar.rules.case import Case, NoRule
from autopar.rules.recipe import Emitted, Recipe, Split
from autopar.rules.registry import rule
from autopar.rules.terms import split_by


def _spatial(prefix: str, shape: tuple[int, ...]) -> str:
    return " ".join("1" if n == 1 else f"{prefix}{i}^" for i, n in enumerate(shape))


def convolution(c: Case, transposed: bool) -> Recipe:
    if "functional" not in c.op.fn and not c.op.fn.startswith("torch.conv"):
        raise NoRule("another signature")
    x, w, bias = c.tensor("input"), c.tensor("weight"), c.tensor("bias")
    if not isinstance(c["groups"], int) or x is None or w is None or (bias is None and c["bias"] is not None):
        raise NoRule("groups must be a literal")
    groups, nd = c["groups"], len(w.shape) - 2
    lead = len(x.shape) - nd - 1  # 0: no batch dim
    if lead not in (0, 1):
        raise NoRule("no convolution")
    batch = "" if lead == 0 else "1 " if x.shape[0] == 1 else "n "
    # NB: with groups, channels are (group, channel of the group); a split of the outer factor keeps channels with their group.
    ins, outs = ("i+", "o") if groups == 1 else ("(g i+)", "(g o)")
    first, second = (ins, "o") if transposed else (outs, "i+")
    y = c.outputs[0].shape
    terms = {
        "input": f"{batch}{ins} {_spatial('x', x.shape[lead + 1 :])}",
        "weight": f"{first} {second} {_spatial('k', w.shape[2:])}",
        "bias": outs,
    }
    per_input = w.shape[1] if transposed else w.shape[0] // groups
    return c.make(
        terms,
        f"{batch}{outs} {_spatial('y', y[lead + 1 :])}",
        sizes={"g": groups} if groups > 1 else None,
        linear=[("input", "bias"), ("weight", "bias")],
        partial_bias=["bias"],
        flops=2.0 * prod(x.shape if transposed else y) * prod(w.shape[2:]) * (per_input if transposed else w.shape[1]),
        matmul=True,
    )


def local_groups(c: Case, recipe: Recipe, splits: tuple[Split, ...]) -> Emitted:
    by = split_by(recipe, splits, "g")
    return c.emitted(groups=c["groups"] // by) if by > 1 else c.emitted()


@rule("conv1d", "conv2d", "conv3d", args="input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1")
def conv(c: Case) -> Recipe:
    return convolution(c, False)


@rule(
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    args="input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1",
)  # fmt: skip
def conv_transpose(c: Case) -> Recipe:
    return convolution(c, True)


conv.local(local_groups)
conv_transpose.local(local_groups)


@rule("_weight_norm", args="v, g, dim=0")
def weight_norm(c: Case) -> Recipe:
    """v * g / norm(v), the norm over all dims but one."""
    v, g = c.tensor("v"), c.tensor("g")
    dim = c.dim("dim")
    if len(g.shape) != len(v.shape) or prod(g.shape) != v.shape[dim] or g.shape[dim] != v.shape[dim]:
        raise NoRule("g of an unknown form")
    names = " ".join("1" if n == 1 else f"d{i}" if i == dim else f"d{i}^" for i, n in enumerate(v.shape))
    size = " ".join("1" if i != dim or n == 1 else f"d{i}" for i, n in enumerate(v.shape))
    return c.make({"v": names, "g": size}, names, linear=[("g",)])
