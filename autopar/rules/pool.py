"""Rules of ops on channels and space: pooling, interpolation, patches, pixel shuffles, batch and instance norm.
Must not know the formulas: batch and channel dims go through, spatial dims stay whole.
"""

from __future__ import annotations

from math import prod

from autopar.ir.graph import Value
from autopar.rules.case import Case, NoRule
from autopar.rules.recipe import Recipe
from autopar.rules.registry import rule

POOLS = {
    f"{kind}_pool{n}d": n
    for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "lp")
    for n in (1, 2, 3)
}  # fmt: skip
POOLS.update({f"{kind}_pool{n}d_with_indices": n for kind in ("max", "adaptive_max") for n in (1, 2, 3)})


def _names(prefix: str, shape: tuple[int, ...], lead: int) -> str:
    """The first `lead` dims may be split, the others not."""
    return " ".join("1" if s == 1 else f"l{i}" if i < lead else f"{prefix}{i}^" for i, s in enumerate(shape))


def through(c: Case, lead: int, linear: bool = False) -> Recipe:
    """The leading dims go through from the first input to every output."""
    x = c.inputs[0]
    if len(c.inputs) != 1 or any(o.shape[:lead] != x.shape[:lead] for o in c.outputs):
        raise NoRule("leading dims do not go through")
    return c.make({"input": _names("x", x.shape, lead)}, [_names("y", o.shape, lead) for o in c.outputs], linear=[("input",)] * linear)


@rule(*POOLS, args="input, ...")
def pool(c: Case) -> Recipe:
    return through(c, len(c.inputs[0].shape) - POOLS[c.name], linear="avg" in c.name)


@rule("interpolate", "upsample", "upsample_nearest", "upsample_bilinear", args="input, ...")
def interpolate(c: Case) -> Recipe:
    return through(c, 2)


@rule("max_unpool1d", "max_unpool2d", "max_unpool3d", args="input, indices, ...")
def unpool(c: Case) -> Recipe:
    n = int(c.name[-2])
    lead = len(c.inputs[0].shape) - n
    x = _names("x", c.inputs[0].shape, lead)
    return c.make({"input": x, "indices": x}, _names("y", c.outputs[0].shape, lead))


@rule("grid_sample", args="input, grid, ...")
def grid_sample(c: Case) -> Recipe:
    x, g, y = c.tensor("input").shape, c.tensor("grid").shape, c.outputs[0].shape
    grid = " ".join("1" if s == 1 else "l0" if i == 0 else f"g{i}^" for i, s in enumerate(g))
    return c.make({"input": _names("x", x, 2), "grid": grid}, _names("y", y, 2), linear=[("input",)])


@rule("affine_grid", args="theta, size, ...")
def affine_grid(c: Case) -> Recipe:
    return c.unsplit()


@rule("pixel_shuffle", args="input, upscale_factor")
def pixel_shuffle(c: Case) -> Recipe:
    return _shuffle(c, c.inputs[0].shape, c.outputs[0].shape, c.number("upscale_factor"), False)


@rule("pixel_unshuffle", args="input, downscale_factor")
def pixel_unshuffle(c: Case) -> Recipe:
    return _shuffle(c, c.outputs[0].shape, c.inputs[0].shape, c.number("downscale_factor"), True)


def _shuffle(c: Case, many: tuple[int, ...], few: tuple[int, ...], by: int, back: bool) -> Recipe:
    """`many` has the channels (c, by, by), `few` has c; both h and w last."""
    lead = " ".join("1" if n == 1 else f"l{i}" for i, n in enumerate(many[:-3]))
    a, b = f"{lead} (c {by * by}) h^ w^", f"{lead} c y^ x^"
    return c.make({"input": b if back else a}, a if back else b, linear=[("input",)])


@rule("channel_shuffle", args="input, groups")
def channel_shuffle(c: Case) -> Recipe:
    return through(c, 1)


@rule("unfold", args="input|self, ...")
def unfold(c: Case) -> Recipe:
    if "functional" not in c.op.fn:
        return tensor_unfold(c)
    x, y = c.inputs[0].shape, c.outputs[0].shape
    batch, at = ("n ", 1) if len(x) == 4 else ("", 0)
    return c.make({"input": f"{batch}c h^ w^"}, f"{batch}(c {y[at] // x[at]}) l^", linear=[("input",)])


def tensor_unfold(c: Case) -> Recipe:
    """x.unfold(dim, size, step): windows of one dim, a new last dim."""
    dim = c.op.args[1] if len(c.op.args) > 1 else c.op.kwargs.get("dimension")
    x = c.inputs[0].shape
    at = c.as_dim(dim, len(x))
    names = ["1" if n == 1 else f"d{i}^" if i == at else f"d{i}" for i, n in enumerate(x)]
    windows = [*names]
    windows[at] = "windows^"
    return c.make({"input": " ".join(names)}, " ".join([*windows, "size^"]), linear=[("input",)])


@rule("fold", args="input, ...")
def fold(c: Case) -> Recipe:
    x, y = c.inputs[0].shape, c.outputs[0].shape
    batch, at = ("n ", 1) if len(x) == 3 else ("", 0)
    return c.make({"input": f"{batch}(c {x[at] // y[at]}) l^"}, f"{batch}c h^ w^", linear=[("input",)])


def normed(c: Case, split: tuple[int, ...]) -> Recipe:
    """Per-channel arguments and written running statistics; only the dims of the input in `split` may be split."""
    x = c.tensor("input").shape
    full = " ".join("1" if n == 1 else ("c" if i == 1 else f"d{i}") + ("" if i in split else "^") for i, n in enumerate(x))
    channel = "1" if x[1] == 1 else "c"

    def out(v: Value) -> str:
        if v.shape == x:
            return full
        if v.shape != (x[1],):
            raise NoRule("an output of an unknown form")
        return channel

    args = {n: channel for n in ("running_mean", "running_var", "weight", "bias") if c.tensor(n) is not None}
    return c.make({"input": full, **args}, [out(v) for v in c.outputs])


STATISTICS = "input, running_mean=None, running_var=None, weight=None, bias=None"


@rule("batch_norm", args=f"{STATISTICS}, training=False, momentum=0.1, eps=1e-5")
def batch_norm(c: Case) -> Recipe:
    if c.op.fn != "torch.nn.functional.batch_norm" or not isinstance(c["training"], bool) or len(c.tensor("input").shape) < 2:
        raise NoRule("batch_norm of another form")
    training = c["training"] or c["running_mean"] is None
    return normed(c, (1,) if training else tuple(range(len(c.tensor("input").shape))))


@rule("instance_norm", args=f"{STATISTICS}, use_input_stats=True, momentum=0.1, eps=1e-5")
def instance_norm(c: Case) -> Recipe:
    if c.op.fn != "torch.nn.functional.instance_norm" or not isinstance(c["use_input_stats"], bool):
        raise NoRule("instance_norm of another form")
    dims = tuple(range(len(c.tensor("input").shape)))
    if not c["use_input_stats"]:
        return normed(c, dims)
    return normed(c, (0, 1) if c["running_mean"] is None else (1,))  # running statistics average over the batch


@rule("local_response_norm", args="input, ...")
def local_response_norm(c: Case) -> Recipe:
    x = c.inputs[0].shape
    names = " ".join("1" if n == 1 else f"d{i}^" if i == 1 else f"d{i}" for i, n in enumerate(x))
    return c.make({"input": names}, names) if len(x) > 2 and prod(x) else c.unsplit()
