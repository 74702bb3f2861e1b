"""Rules of x[index] and x[index] = value: ints, slices, None, Ellipsis, index tensors and masks.
Must not know the values of index tensors: an indexed dim is never split.
"""

from __future__ import annotations

from typing import Any

from autopar.ir.graph import Ref
from autopar.rules.case import Case, NoRule
from autopar.rules.recipe import Recipe
from autopar.rules.registry import rule

FOREVER = 2**31 - 1  # what people write for the end of a dim


def is_full(s: slice) -> bool:
    """Whether a slice takes the whole dim whatever its size is at run time."""
    start, stop, step = s.start, s.stop, s.step
    if any(isinstance(x, Ref) for x in (start, stop, step)):
        return False
    # NB: a literal stop that is the traced size would cut a longer dim; a shard of that would come out whole.
    return start in (None, 0) and step in (None, 1) and (stop is None or stop >= FOREVER)


class Index:
    """An index matched with a tensor: terms of the tensor, of the index tensors and of the result."""

    def __init__(self, c: Case, x_shape: tuple[int, ...], index: Any) -> None:
        items = list(index) if isinstance(index, tuple) else [index]
        used = sum(len(v.shape) if (v := c.value(i)) and v.dtype == "bool" else i is not None and i is not Ellipsis for i in items)
        if sum(i is Ellipsis for i in items) > 1:
            raise NoRule("two Ellipsis")
        rest = [slice(None)] * (len(x_shape) - used)
        at = next((k for k, i in enumerate(items) if i is Ellipsis), len(items))
        items[at : at + 1] = rest
        self.x: list[str] = []
        out: list[list[str] | None] = []  # None: where the dims of the index tensors would go
        advanced: list[tuple[int, Any]] = []  # (place in out, item)
        self.tensors: dict[int, list[str]] = {}  # op input id -> term dims
        for item in items:
            d = len(self.x)
            if item is None:
                out.append(["1"])
                continue
            v = c.value(item)
            if v is not None and v.dtype == "bool":
                if not v.shape:
                    raise NoRule("0-dim mask")
                self.x += [str(s) for s in x_shape[d : d + len(v.shape)]]
                advanced.append((len(out), v))
                out.append(None)
                continue
            if d >= len(x_shape):
                raise NoRule("too many indices")
            if isinstance(item, slice):
                full = is_full(item)
                self.x.append(f"d{d}" if full else str(x_shape[d]))
                out.append([f"d{d}"] if full else ["="])  # '=': whatever size the traced result has there
            elif v is not None and not v.shape:  # a 0-dim index selects, as an int does
                self.x.append(str(x_shape[d]))
                self.tensors[v.id] = []
            elif v is not None or isinstance(item, list):
                self.x.append(str(x_shape[d]))
                advanced.append((len(out), v if v is not None else item))
                out.append(None)
            elif isinstance(item, (int, Ref)) and not isinstance(item, bool):
                self.x.append(str(x_shape[d]))
            else:
                raise NoRule(f"index {item!r}")
        self.out = [n for part in out if part is not None for n in part]
        if advanced:
            self._place(out, advanced)

    def _place(self, out: list[list[str] | None], advanced: list[tuple[int, Any]]) -> None:
        """Dims of index tensors stand where the tensors stand if those are neighbours, else in front."""
        places = [p for p, _ in advanced]
        together = places == list(range(places[0], places[0] + len(places)))
        shapes = [(len(a),) if isinstance(a, list) else (0,) if a.dtype == "bool" else a.shape for _, a in advanced]
        if any(isinstance(a, list) and not all(isinstance(i, int) and not isinstance(i, bool) for i in a) for _, a in advanced):
            raise NoRule("a list that is no list of ints")
        pure = not any(isinstance(a, list) or a.dtype == "bool" for _, a in advanced)
        rank = max(len(s) for s in shapes)
        full = [max(s[len(s) - rank + i] if len(s) - rank + i >= 0 else 1 for s in shapes) for i in range(rank)]
        new = [f"i{i}" if pure and full[i] != 1 else "=" for i in range(rank)]
        for _, a in advanced:
            if not isinstance(a, list):
                if pure:
                    lead = rank - len(a.shape)
                    self.tensors[a.id] = ["1" if s == 1 else new[lead + i] for i, s in enumerate(a.shape)]
                else:
                    self.tensors[a.id] = [str(s) for s in a.shape]
        at = places[0] if together else 0
        before = [n for part in out[:at] if part is not None for n in part]
        self.out = [*before, *new, *(n for part in out[at:] if part is not None for n in part)]

    def result(self, shape: tuple[int, ...]) -> str:
        if len(shape) != len(self.out):
            raise NoRule("the result has other dims than expected")
        return " ".join(str(s) if n == "=" else n for n, s in zip(self.out, shape, strict=True))


@rule("getitem", args="input|self, index")
def getitem(c: Case) -> Recipe:
    x = c.tensor("input")
    if x is None:
        raise NoRule("not an index of a tensor")
    ix = Index(c, x.shape, c["index"])
    return c.make({"input": " ".join(ix.x), "index": _index_terms(c, ix)}, ix.result(c.outputs[0].shape), linear=[("input",)])


def _index_terms(c: Case, ix: Index, mark: str = "") -> list[str]:
    values = [c.inputs[i] for i in c.positions("index")]
    rows = [ix.tensors.get(v.id) for v in values]
    return ["?" if r is None else " ".join(n + mark if n.startswith("i") else n for n in r) for r in rows]


@rule("setitem", args="input|self, index, value")
def setitem(c: Case) -> Recipe:
    x, v = c.tensor("input"), c.tensor("value")
    ix = Index(c, x.shape, c["index"])
    terms = {"input": " ".join(ix.x), "index": _index_terms(c, ix, "^")}
    zero = isinstance(c["value"], (int, float)) and c["value"] == 0
    linear: list[tuple[str, ...]] = [("input",)] if zero else []
    if v is not None:
        extra = len(v.shape) - len(ix.out)
        if any(s != 1 for s in v.shape[: max(extra, 0)]):
            raise NoRule("the value has too many dims")
        lined = ["1"] * extra + ix.out[max(-extra, 0) :]
        terms["value"] = " ".join(
            "1" if s == 1 else n + "^" if n[0] == "i" else str(s) if n == "=" else n for n, s in zip(lined, v.shape, strict=True)
        )
        linear = [("input", "value")]
    return c.make(terms, " ".join(ix.x), linear=linear)
