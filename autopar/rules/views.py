"""Rules of ops that rearrange: view, reshape, permute, expand, cat, split, pad, roll, tril and their kin.
Must not know values: the notation of each follows from the traced shapes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod
from typing import Any

from autopar.rules.case import Case, NoRule, divisor
from autopar.rules.recipe import Emitted, Recipe, Split
from autopar.rules.registry import rule

LINEAR = [("input",)]


def names(n: int) -> list[str]:
    return [f"d{i}" for i in range(n)]


def term(dims: Sequence[str]) -> str:
    return " ".join(dims)


class Regrouping:
    """Named factors of two shapes over the same elements: dims are merged and split at their common boundaries."""

    def __init__(self, src: tuple[int, ...], dst: tuple[int, ...]) -> None:
        self.sizes: dict[str, int] = {}
        self.src: list[list[str]] = [[] for _ in src]
        self.dst: list[list[str]] = [[] for _ in dst]
        if prod(src) != prod(dst) or not prod(src):
            raise NoRule(f"no common factors of {src} and {dst}")
        a, b = ([(i, s) for i, s in enumerate(shape) if s > 1] for shape in (src, dst))
        i = j = 0
        x, y = (a[0][1], b[0][1]) if a else (1, 1)
        while i < len(a):
            g = gcd(x, y)
            if g > 1:
                self._name(g, True, self.src[a[i][0]], self.dst[b[j][0]])
            x, y = x // g, y // g
            if x > 1 and y > 1:  # no common boundary until the products meet again
                self._name(x, False, self.src[a[i][0]])
                self._name(y, False, self.dst[b[j][0]])
                while x != y:
                    if x < y:
                        i += 1
                        x *= a[i][1]
                        self._name(a[i][1], False, self.src[a[i][0]])
                    else:
                        j += 1
                        y *= b[j][1]
                        self._name(b[j][1], False, self.dst[b[j][0]])
                x = y = 1
            if x == 1:
                i += 1
                x = a[i][1] if i < len(a) else 1
            if y == 1:
                j += 1
                y = b[j][1] if j < len(b) else 1

    def _name(self, size: int, split: bool, *dims: list[str]) -> None:
        name = f"v{len(self.sizes)}"
        self.sizes[name] = size
        for d in dims:
            d.append(name if split else f"{name}^")

    @staticmethod
    def term(dims: list[list[str]]) -> str:
        return " ".join(f"({' '.join(d)})" if len(d) > 1 else d[0] if d else "1" for d in dims)

    def nested(self, literal: list[bool]) -> set[str]:
        """Factors inside others of a source dim, all of which are whole output dims of a literal size."""
        fixed = {d[0] for d, known in zip(self.dst, literal, strict=True) if known and len(d) == 1}
        return {n for d in self.src for k, n in enumerate(d) if k and n[-1] != "^" and set(d[:k]) <= fixed}


def regroup(c: Case, literal: list[bool] | None = None) -> Recipe:
    r = Regrouping(c.inputs[0].shape, c.outputs[0].shape)
    nested = r.nested(literal) if literal else ()
    return c.make({"input": r.term(r.src)}, r.term(r.dst), sizes=r.sizes, linear=LINEAR, nested=nested)


def is_literal(x: Any) -> bool:
    return isinstance(x, int) and x > 0


@rule("view", "reshape", args="input|self, *shape|size")
def view(c: Case) -> Recipe:
    shape = c["shape"]
    if len(shape) != len(c.outputs[0].shape):
        raise NoRule("not a shape")  # x.view(dtype)
    return regroup(c, [is_literal(s) for s in shape])


@view.local
def _(c: Case, recipe: Recipe, splits: tuple[Split, ...]) -> Emitted:
    return c.emitted(shape=c.local_sizes(recipe, splits, c["shape"]))


@rule("flatten", args="input|self, start_dim=0, end_dim=-1")
def flatten(c: Case) -> Recipe:
    return regroup(c)


@rule("unflatten", args="input|self, dim, *sizes|unflattened_size")
def unflatten(c: Case) -> Recipe:
    first, n, ndim = c.dim("dim"), len(c["sizes"]), len(c.outputs[0].shape)
    literal = [first <= i < first + n and is_literal(c["sizes"][i - first]) for i in range(ndim)]
    return regroup(c, literal)


@unflatten.local
def _(c: Case, recipe: Recipe, splits: tuple[Split, ...]) -> Emitted:
    return c.emitted(sizes=c.local_sizes(recipe, splits, c["sizes"], first=c.dim("dim")))


@rule("view_as", "reshape_as", args="input|self, other")
def view_as(c: Case) -> Recipe:
    r = Regrouping(c.inputs[0].shape, c.outputs[0].shape)
    return c.make({"input": r.term(r.src), "other": r.term(r.dst)}, r.term(r.dst), sizes=r.sizes, linear=LINEAR)


# -- permutations


def permuted(c: Case, order: Sequence[int]) -> Recipe:
    d = names(len(order))
    return c.make({"input": term(d)}, term([d[i] for i in order]), linear=LINEAR)


@rule("permute", args="input|self, *dims")
def permute(c: Case) -> Recipe:
    return permuted(c, c.dims("dims") or ())


@rule("transpose", args="input|self, dim0|axis0, dim1|axis1")
def transpose(c: Case) -> Recipe:
    order = list(range(len(c.inputs[0].shape)))
    i, j = c.dim("dim0"), c.dim("dim1")
    if order:
        order[i], order[j] = order[j], order[i]
    return permuted(c, order)


@rule("t", "T", args="input|self")
def reverse(c: Case) -> Recipe:
    return permuted(c, range(len(c.inputs[0].shape))[::-1])


@rule("mT", "H", "mH", "adjoint", args="input|self")
def matrix_transpose(c: Case) -> Recipe:
    n = len(c.inputs[0].shape)
    return permuted(c, [*range(n - 2), n - 1, n - 2])


@rule("movedim", args="input|self, source, destination")
def movedim(c: Case) -> Recipe:
    src, dst, n = c.dims("source"), c.dims("destination"), len(c.inputs[0].shape)
    rest = iter(i for i in range(n) if i not in src)
    return permuted(c, [src[dst.index(i)] if i in dst else next(rest) for i in range(n)])


@rule("squeeze", args="input|self, dim|axis=None")
def squeeze(c: Case) -> Recipe:
    return same_but_ones(c)


@rule("unsqueeze", args="input|self, dim|axis")
def unsqueeze(c: Case) -> Recipe:
    return same_but_ones(c)


def same_but_ones(c: Case) -> Recipe:
    """Only dims of size 1 come or go."""
    rows = []
    # NB: squeeze looks at the sizes, so that a dim sharded down to one entry would vanish.
    asked = None if c.name == "unsqueeze" else range(len(c.inputs[0].shape)) if c["dim"] is None else c.dims("dim")
    kept = "" if asked is None or all(c.inputs[0].shape[d] == 1 for d in asked) else "^"
    for shape in (c.inputs[0].shape, c.outputs[0].shape):
        live = iter(range(len(shape)))
        rows.append(term([f"d{next(live)}{kept}" if s != 1 else "1" for s in shape]))
    return c.make({"input": rows[0]}, rows[1], linear=LINEAR)


# -- copies along dims


@rule("expand", args="input|self, *size, implicit=False")
def expand(c: Case) -> Recipe:
    return expanded(c, "input")


@expand.local
def _(c: Case, recipe: Recipe, splits: tuple[Split, ...]) -> Emitted:
    return c.emitted(size=c.local_sizes(recipe, splits, c["size"]))


@rule("broadcast_to", args="input|self, *size|shape")
def broadcast_to(c: Case) -> Recipe:
    return expanded(c, "input")


broadcast_to.local(expand.local_form)


@rule("expand_as", args="input|self, other")
def expand_as(c: Case) -> Recipe:
    return expanded(c, "input", other=term(names(len(c.outputs[0].shape))))


def expanded(c: Case, name: str, **others: str) -> Recipe:
    src, dst = c.inputs[0].shape, c.outputs[0].shape
    first = len(dst) - len(src)
    row = ["1" if s == 1 else f"d{first + i}" for i, s in enumerate(src)]
    return c.make({name: term(row), **others}, term(names(len(dst))), linear=LINEAR)


@rule("repeat", args="input|self, *repeats")
def repeat(c: Case) -> Recipe:
    return tiled(c, c["repeats"])


@rule("tile", args="input|self, *repeats|dims")
def tile(c: Case) -> Recipe:
    n = len(c.inputs[0].shape)
    return tiled(c, (1,) * (n - len(c["repeats"])) + tuple(c["repeats"]))


def tiled(c: Case, repeats: Sequence[Any]) -> Recipe:
    """Copies lie outside the dim they repeat: (r d)."""
    src, dst = c.inputs[0].shape, c.outputs[0].shape
    first, sizes, row, out = len(dst) - len(src), {}, [], []
    for i, s in enumerate(dst):
        n = src[i - first] if i >= first else 1
        count = s // n if n else 1
        if n != 1:
            row.append(f"d{i}")
        elif i >= first:
            row.append("1")
        if count > 1:
            sizes[f"r{i}"] = count
        out.append(f"(r{i} d{i})" if count > 1 and n != 1 else f"r{i}" if count > 1 else f"d{i}" if n != 1 else "1")
    return c.make({"input": term(row)}, term(out), sizes=sizes, linear=LINEAR)


@repeat.local
def local_counts(c: Case, recipe: Recipe, splits: tuple[Split, ...]) -> Emitted:
    counts, ndim = list(c["repeats"]), len(c.outputs[0].shape)
    for i in range(ndim):
        by = divisor(recipe, [s for s in splits if recipe.parse(s.factor)[0] == f"r{i}"], recipe.outputs[0], i)
        at = i - (ndim - len(counts))
        if by > 1:
            counts[at] = c.scaled(counts[at], by)
    return c.emitted(repeats=counts if isinstance(c["repeats"], list) else tuple(counts))


tile.local(local_counts)


@rule("repeat_interleave", args="input|self, repeats, dim=None, output_size=None")
def repeat_interleave(c: Case) -> Recipe:
    src, dst = c.inputs[0].shape, c.outputs[0].shape
    if c["dim"] is None and len(src) != 1:
        return c.unsplit()
    d = 0 if c["dim"] is None else c.dim("dim")
    row, out = names(len(src)), names(len(src))
    if isinstance(c["repeats"], int) and c["output_size"] is None and src[d]:
        out[d] = f"(d{d} {dst[d] // src[d]})"
    else:
        row[d], out[d] = str(src[d]), str(dst[d])
    return c.make({"input": term(row), "repeats": "?"}, term(out), linear=LINEAR)


# -- pieces


SECTIONS = "split_size_or_sections|indices_or_sections|split_sizes|split_size"


@rule("split", "tensor_split", "split_with_sizes", args=f"tensor|input|self, {SECTIONS}, dim=0")
def split(c: Case) -> Recipe:
    if c.name == "tensor_split" and not isinstance(c["split_size_or_sections"], int):
        raise NoRule("indices")
    return pieces(c, "tensor", splitable=c.name != "tensor_split" and _literal_tree(c["split_size_or_sections"]))


@split.local
def _(c: Case, recipe: Recipe, splits: tuple[Split, ...]) -> Emitted:
    d = c.dim("dim")
    by = divisor(recipe, splits, recipe.outputs[0], d)
    sizes = c["split_size_or_sections"]
    many = isinstance(sizes, (tuple, list))
    local = type(sizes)(c.scaled(s, by) for s in sizes) if many else c.scaled(sizes, by)
    return c.emitted(split_size_or_sections=local)


@rule("chunk", args="input|self, chunks, dim=0")
def chunk(c: Case) -> Recipe:
    return pieces(c, "input", splitable=isinstance(c["chunks"], int))


def _literal_tree(x: Any) -> bool:
    return all(map(_literal_tree, x)) if isinstance(x, (tuple, list)) else isinstance(x, int)


def pieces(c: Case, name: str, splitable: bool) -> Recipe:
    """Slices along a dim. Equal ones may be split inside each piece, as q, k and v of a fused projection."""
    src, d = c.inputs[0].shape, c.dim("dim")
    row, n = names(len(src)), len(c.outputs)
    equal = len({o.shape for o in c.outputs}) == 1 and c.outputs[0].shape[d] * n == src[d] and splitable
    if equal and n > 1:
        row[d] = f"(c^ d{d})"
        return c.make({name: term(row)}, term(names(len(src))), linear=[(0,)], nested=[f"d{d}"])
    outs = [term([*row[:d], str(o.shape[d]), *row[d + 1 :]]) for o in c.outputs]
    row[d] = str(src[d])
    return c.make({name: term(row)}, outs, linear=[(0,)])


@rule("unbind", args="input|self, dim=0")
def unbind(c: Case) -> Recipe:
    return without(c, c.dim("dim"))


@rule("select", args="input|self, dim, index")
def select(c: Case) -> Recipe:
    return without(c, c.dim("dim"))


def without(c: Case, d: int) -> Recipe:
    row = names(len(c.inputs[0].shape))
    out = term([*row[:d], *row[d + 1 :]])
    row[d] += "^"
    return c.make({"input": term(row)}, out, linear=LINEAR)


@rule("narrow", args="input|self, dim, start, length")
def narrow(c: Case) -> Recipe:
    return cut(c, (c.dim("dim"),))


@rule("roll", args="input|self, shifts, dims=None")
def roll(c: Case) -> Recipe:
    return cut(c, c.dims("dims"))


@rule("flip", args="input|self, *dims")
def flip(c: Case) -> Recipe:
    return cut(c, c.dims("dims"))


@rule("tril", "triu", args="input|self, diagonal=0")
def tril(c: Case) -> Recipe:
    n = len(c.inputs[0].shape)
    return cut(c, (n - 2, n - 1))


def cut(c: Case, kept: Sequence[int] | None, linear: bool = True) -> Recipe:
    """Dims in `kept` (all if None) are not split and may change their size; the others stay as they are."""
    src, dst = c.inputs[0].shape, c.outputs[0].shape
    kept = range(len(src)) if kept is None else kept
    rows = [term([str(s) if i in kept else f"d{i}" for i, s in enumerate(shape)]) for shape in (src, dst)]
    return c.make({"input": rows[0]}, rows[1], linear=LINEAR if linear else ())


@rule("pad", args="input, pad, mode=None, value=None")
def pad(c: Case) -> Recipe:
    amounts, n = c["pad"], len(c.inputs[0].shape)
    if not isinstance(amounts, (tuple, list)):
        raise NoRule("pad")
    kept = [n - 1 - i // 2 for i, a in enumerate(amounts) if not (isinstance(a, int) and a == 0)]
    zero = c["value"] is None or (isinstance(c["value"], (int, float)) and c["value"] == 0)
    return cut(c, kept, linear=zero or c["mode"] not in (None, "constant"))


# -- joining


@rule("cat", args="tensors, dim|axis=0")
def cat(c: Case) -> Recipe:
    ins, out = c.inputs, c.outputs[0]
    if any(len(v.shape) != len(out.shape) for v in ins):
        raise NoRule("cat with the empty tensor")
    d, row = c.dim("dim"), names(len(out.shape))
    # NB: pieces of the same traced size need not be so at run time, so the joined dim is never split.
    terms = [term([*row[:d], str(v.shape[d]), *row[d + 1 :]]) for v in (*ins, out)]
    return c.make({"tensors": terms[:-1]}, terms[-1], linear=[("tensors",)])


@rule("stack", args="tensors, dim=0")
def stack(c: Case) -> Recipe:
    n = len(c.outputs[0].shape)
    d, row = c.dim("dim", n), names(n - 1)
    out = term([*row[:d], str(len(c.inputs)), *row[d:]])
    return c.make({"tensors": [term(row)] * len(c.inputs)}, out, linear=[("tensors",)])


@rule("meshgrid", args="*tensors, indexing=None")
def meshgrid(c: Case) -> Recipe:
    return c.unsplit()
