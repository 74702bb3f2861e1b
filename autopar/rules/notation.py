"""The einsum-like language of rules: "* k+, n k+ -> * n" to an immutable Notation, and its match against shapes.
Must not know op names, graphs or tensors: only text and shapes.

    identifier   a factor: the same name has the same size everywhere; plain: may be split, outputs carry it
    name+        may be split, outputs that lack it become partial sums
    name^        may not be split
    (a b)        a dim made of factors, outermost first; only the outermost splittable one may be split
    *            any number of leading dims, the same ones wherever it stands; its factors are called *0, *1, ...
    ?            an argument that is not partitioned
    12           a dim of that size, not split
Tensors are separated by commas; nothing between commas is a tensor without dims.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from autopar.errors import RuleError
from autopar.rules.recipe import Dims, Factor

TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_]\w*)(?P<mark>[+^]?)|(?P<number>\d+)|(?P<sign>[()*?])|(?P<bad>\S))")
Item = str | int


@dataclass(frozen=True)
class Term:
    """One tensor of a notation: `dims` after the leading '*' if star."""

    text: str
    dims: tuple[tuple[Item, ...], ...]
    star: bool
    marks: tuple[tuple[str, str], ...]  # (factor, '' | '+' | '^') per occurrence

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(n for n, _ in self.marks)


@dataclass(frozen=True)
class Bound:
    """A notation matched with shapes: what a Recipe holds."""

    inputs: tuple[Dims | None, ...]
    outputs: tuple[Dims | None, ...]
    factors: dict[str, Factor]


@lru_cache(maxsize=16384)
def parse_term(text: str) -> Term | None:
    """One tensor's part of a notation; None for '?'."""
    dims: list[tuple[Item, ...]] = []
    marks: list[tuple[str, str]] = []
    group: list[Item] | None = None
    star, at = False, 0
    while text[at:].strip():
        m = TOKEN.match(text, at)
        assert m is not None
        at = m.end()
        sign = m["sign"]
        if m["bad"]:
            raise RuleError(f"notation {text!r}: {m['bad']!r} is not understood; write names, numbers, ( ), *, ?, + and ^")
        if sign == "?":
            if text.strip() != "?":
                raise RuleError(f"notation {text!r}: '?' stands alone, for a whole argument")
            return None
        if sign == "*":
            if star or dims or group is not None:
                raise RuleError(f"notation {text!r}: '*' may only come first, once")
            star = True
        elif sign == "(":
            if group is not None:
                raise RuleError(f"notation {text!r}: parentheses cannot be nested")
            group = []
        elif sign == ")":
            if not group:
                raise RuleError(f"notation {text!r}: " + ("')' without '('" if group is None else "'()' is empty; write 1"))
            dims.append(tuple(group))
            group = None
        else:
            item: Item = int(m["number"]) if m["number"] else m["name"]
            if isinstance(item, str):
                marks.append((item, m["mark"]))
            if group is None:
                dims.append((item,))
            else:
                group.append(item)
    if group is not None:
        raise RuleError(f"notation {text!r}: '(' is not closed")
    return Term(text.strip(), tuple(dims), star, tuple(marks))


@dataclass(frozen=True)
class Notation:
    """A parsed notation. `split` and `reduce` hold the names that are not '^' and those that are '+'."""

    text: str
    inputs: tuple[Term | None, ...]
    outputs: tuple[Term | None, ...]
    kept: frozenset[str]  # '^'
    summed: frozenset[str]  # '+'

    def bind(
        self,
        inputs: Sequence[tuple[int, ...]],
        outputs: Sequence[tuple[int, ...]],
        sizes: dict[str, int] | None = None,
        inner: Iterable[str] = (),
    ) -> Bound:
        """Match shapes. Factors named in `inner` reduce by themselves (Factor.reduce). Raises RuleError with the pattern."""
        terms, shapes = (*self.inputs, *self.outputs), (*inputs, *outputs)
        if (len(inputs), len(outputs)) != (len(self.inputs), len(self.outputs)):
            raise RuleError(
                f"notation {self.text!r} names {len(self.inputs)} inputs and {len(self.outputs)} outputs, "
                f"the call has {len(inputs)} and {len(outputs)} tensors"
            )
        known = dict(sizes or {})
        rows = [None if t is None else self._expand(t, tuple(s), known) for t, s in zip(terms, shapes, strict=True)]
        self._solve([(d, s) for row in rows if row is not None for d, s in row], known)
        dims = [None if row is None else tuple(tuple(n for n in d if isinstance(n, str)) for d, _ in row) for row in rows]
        inner = frozenset(inner)
        factors = {}
        for name in dict.fromkeys(n for row in dims if row is not None for d in row for n in d):
            reduce = "inner" if name in inner else "sum" if name in self.summed else None
            factors[name] = Factor(name, known[name], name not in self.kept, reduce)
        return Bound(tuple(dims[: len(inputs)]), tuple(dims[len(inputs) :]), factors)

    def _expand(self, term: Term, shape: tuple[int, ...], known: dict[str, int]) -> list[tuple[tuple[Item, ...], int]]:
        stars = len(shape) - len(term.dims)
        if stars < 0 or (stars and not term.star):
            raise RuleError(f"notation {self.text!r}: {term.text!r} has {len(term.dims)} dims, the tensor is {list(shape)}")
        if term.star and known.setdefault("*", stars) != stars:
            raise RuleError(f"notation {self.text!r}: '*' stands for {known['*']} dims and for {stars} in {term.text!r} {list(shape)}")
        return list(zip((*((f"*{i}",) for i in range(stars)), *term.dims), shape, strict=True))

    def _solve(self, dims: list[tuple[tuple[Item, ...], int]], known: dict[str, int]) -> None:
        """Find every factor's size: a dim with one unknown factor gives it, until nothing is left."""
        while dims:
            rest = []
            for items, size in dims:
                unknown = [n for n in items if isinstance(n, str) and n not in known]
                have = prod(n if isinstance(n, int) else known[n] for n in items if n not in unknown)
                if len(unknown) == 1 and have and size % have == 0:
                    known[unknown[0]] = size // have
                elif len(unknown) > 1:
                    rest.append((items, size))
                elif unknown or have != size:
                    names = ", ".join(f"{n}={known[n]}" for n in items if isinstance(n, str) and n in known) or f"{have}"
                    raise RuleError(f"notation {self.text!r}: a dim {' '.join(map(str, items))!r} of size {size} does not fit {names}")
            if len(rest) == len(dims):
                raise RuleError(f"notation {self.text!r}: the sizes of {', '.join(map(str, rest[0][0]))} cannot be told from the shapes")
            dims = rest


@lru_cache(maxsize=16384)
def combine(inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Notation:
    """A notation from the parts of its tensors. Not checked for factors that outputs lack: those cannot be split."""
    text = f"{', '.join(inputs)} -> {', '.join(outputs)}"
    ins, outs = tuple(parse_term(t) for t in inputs), tuple(parse_term(t) for t in outputs)
    marks: dict[str, set[str]] = {}
    for term in ins + outs:
        for name, mark in term.marks if term else ():
            marks.setdefault(name, set()).add(mark)
    both = sorted(n for n, m in marks.items() if {"+", "^"} <= m)
    if both:
        raise RuleError(f"notation {text!r}: {', '.join(both)} marked both '+' and '^'")
    twice = {n for t in ins + outs if t for n in t.names if t.names.count(n) > 1}
    kept = frozenset(n for n, m in marks.items() if "^" in m) | twice
    summed = frozenset(n for n, m in marks.items() if "+" in m)
    return Notation(text, ins, outs, kept, summed)


@lru_cache(maxsize=4096)
def parse(text: str) -> Notation:
    """A whole notation as a user writes it. Raises RuleError quoting it and the offending names."""
    if text.count("->") != 1:
        raise RuleError(f"notation {text!r}: write inputs -> outputs, with one '->'")
    left, right = text.split("->")
    ins = tuple(t.strip() for t in left.split(",")) if left.strip() else ()
    outs = tuple(t.strip() for t in right.split(","))
    try:
        n = combine(ins, outs)
    except RuleError as e:
        raise RuleError(f"notation {text.strip()!r}: {str(e).partition(': ')[2]}") from None
    n = Notation(text.strip(), n.inputs, n.outputs, n.kept, n.summed)
    for term in n.inputs + n.outputs:
        twice = sorted({x for x in term.names if term.names.count(x) > 1 and (x, "^") not in term.marks}) if term else ()
        if twice:
            raise RuleError(f"notation {n.text!r}: {', '.join(twice)} twice in {term.text!r}; it cannot be split, mark it '^'")
    free = [{x for x in t.names if x not in n.kept} if t else set() for t in n.inputs]
    for term in n.outputs:
        if term is None:
            continue
        lost = sorted(set().union(*free) - set(term.names) - n.summed)
        if lost:
            raise RuleError(f"notation {n.text!r}: output {term.text!r} lacks {', '.join(lost)}; mark it '+' (a sum) or '^' (not split)")
        new = sorted(set(term.names) - n.kept - set().union(*free))
        if new:
            raise RuleError(f"notation {n.text!r}: {', '.join(new)} of output {term.text!r} occurs in no input; mark it '^'")
        stars = [t for t in n.inputs if t is not None and t.star]
        if bool(stars) != term.star:
            raise RuleError(f"notation {n.text!r}: '*' must stand in inputs and in every output, {term.text!r} differs")
    return n
