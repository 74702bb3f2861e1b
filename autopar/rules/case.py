"""Case: one application of an op, its arguments bound by name, and the making of its Recipe and local form.
Must not know any op: the tables (elementwise.py, matmul.py, ...) are written with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from autopar.errors import RuleError
from autopar.ir.graph import Block, Op, Ref, Value, op_inputs, op_outputs, refs
from autopar.rules.notation import combine
from autopar.rules.recipe import Emitted, Recipe, Scaled, Split

# Keywords that say nothing about how an op may be split; any other unknown keyword means: no rule for this form.
BENIGN = {"dtype", "device", "layout", "requires_grad", "pin_memory", "memory_format", "non_blocking", "copy", "inplace", "generator"}
FLOATS = ("float", "bfloat", "complex")
Terms = str | Sequence[str | None] | None


class NoRule(Exception):
    """This form of the op is not known to the rule: the op stays unsplit."""


@dataclass(frozen=True)
class Parameter:
    names: tuple[str, ...]
    star: bool = False
    required: bool = True
    default: Any = None


@lru_cache(maxsize=1024)
def parse_signature(text: str) -> tuple[tuple[Parameter, ...], bool]:
    """'input|self, *size, dim|axis=None, ...' -> parameters, and whether other arguments are allowed ('...')."""
    out, loose = [], False
    for part in (p.strip() for p in text.split(",")):
        if part == "...":
            loose = True
            continue
        name, _, default = part.partition("=")
        values = {"None": None, "True": True, "False": False}
        value = values[default] if default in values else int(default) if default.lstrip("-").isdigit() else float(default or 0)
        out.append(Parameter(tuple(name.strip().lstrip("*").split("|")), name.startswith("*"), not default and name[0] != "*", value))
    return tuple(out), loose


class Case:
    """`case["dim"]` is the bound argument (a tree of Ref and literals); `inputs`/`outputs` are the tensor Values."""

    def __init__(self, block: Block, op: Op, name: str, signature: str | None) -> None:
        self.block, self.op, self.name = block, op, name
        self.inputs: tuple[Value, ...] = op_inputs(block, op)
        self.outputs: tuple[Value, ...] = op_outputs(block, op)
        self.args: dict[str, Any] = {}
        self._where: dict[str, tuple[str, Any] | None] = {}
        if op.kwargs.get("out") is not None:
            raise NoRule("out=")
        if signature is not None:
            self._bind(*parse_signature(signature))

    def _bind(self, params: tuple[Parameter, ...], loose: bool) -> None:
        args, kwargs, at = self.op.args, dict(self.op.kwargs), 0
        for p in params:
            name = p.names[0]
            value, where = p.default, None
            if p.star and at < len(args):
                one = len(args) == at + 1 and isinstance(args[at], (tuple, list))
                value, where = (args[at], ("arg", at)) if one else (tuple(args[at:]), ("rest", at))
                at = len(args)
            elif at < len(args) and not p.star:
                value, where = args[at], ("arg", at)
                at += 1
            else:
                for n in p.names:
                    if n in kwargs:
                        value, where = kwargs.pop(n), ("key", n)
                if where is None and p.required:
                    raise NoRule(f"argument {name!r} is missing")
            self.args[name], self._where[name] = value, where
        if not loose and (at < len(args) or set(kwargs) - BENIGN):
            raise NoRule("arguments of an unknown form")

    # -- reading arguments

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def given(self, name: str) -> bool:
        return self._where[name] is not None

    def tensor(self, name: str) -> Value | None:
        """The Value of an argument that is one tensor, else None."""
        return self.value(self.args[name])

    def value(self, x: Any) -> Value | None:
        v = self.block.values[x.id] if isinstance(x, Ref) else None
        return v if v is not None and v.is_tensor else None

    def number(self, name: str) -> int | float | bool:
        """A literal number; run-time scalars have no rule."""
        x = self.args[name]
        if not isinstance(x, (int, float, bool)):
            raise NoRule(f"{name} is not a literal")
        return x

    def dim(self, name: str, ndim: int | None = None) -> int:
        """A literal dim of the first input (or of a tensor of ndim dims), made non-negative."""
        return self.as_dim(self.args[name], len(self.inputs[0].shape) if ndim is None else ndim)

    def as_dim(self, x: Any, ndim: int) -> int:
        n = max(ndim, 1)
        if not isinstance(x, int) or isinstance(x, bool) or not -n <= x < n:
            raise NoRule(f"{x!r} is not a literal dim")
        return x % n

    def dims(self, name: str, ndim: int | None = None) -> tuple[int, ...] | None:
        """Literal dims (an int, a tuple or a list), None if not given."""
        x = self.args[name]
        n = len(self.inputs[0].shape) if ndim is None else ndim
        return None if x is None else tuple(self.as_dim(d, n) for d in (x if isinstance(x, (tuple, list)) else (x,)))

    @cached_property
    def _starts(self) -> dict[tuple[str, Any], int]:
        """Index into `inputs` of the first tensor of each argument."""
        out, n = {}, 0
        for kind, items in (("arg", enumerate(self.op.args)), ("key", self.op.kwargs.items())):
            for key, tree in items:
                out[kind, key] = n
                n += sum(self.block.values[r.id].is_tensor for r in refs(tree))
        return out

    def positions(self, name: str) -> tuple[int, ...]:
        """Indices into `inputs` of the tensors of an argument."""
        where = self._where.get(name)
        if where is None:
            return ()
        start = self._starts["arg" if where[0] == "rest" else where[0], where[1]]
        count = sum(self.block.values[r.id].is_tensor for r in refs(self.args[name]))
        return tuple(range(start, start + count))

    @staticmethod
    def is_float(*values: Value) -> bool:
        return all(v.dtype.startswith(FLOATS) and not v.dtype.startswith("float8") for v in values)

    # -- making a recipe

    def make(
        self,
        inputs: dict[str, Terms],
        outputs: Terms,
        *,
        sizes: dict[str, int] | None = None,
        linear: Iterable[Iterable[str | int]] = (),
        partial_bias: Iterable[str] = (),
        inner: Iterable[str] = (),
        positional: Iterable[str] = (),
        nested: Iterable[str] = (),
        random: bool = False,
        flops: float = 0.0,
        matmul: bool = False,
    ) -> Recipe:
        """A recipe from one notation term per tensor argument, by argument name (a list for a list of tensors; None
        or '?' if not partitioned; arguments that are no tensor are passed over) and per output (one string serves
        all outputs of one shape). Groups of `linear` hold argument names or input positions; those not floating are dropped.
        `inner` and `positional` set Factor.reduce='inner' and Factor.positional; `nested` is Recipe.inner.
        """
        terms: list[str] = ["?"] * len(self.inputs)
        for name, term in inputs.items():
            where = self.positions(name)
            several = [term] * len(where) if isinstance(term, str) or term is None else list(term)
            if len(several) != len(where) and where:
                raise NoRule(f"{name}: {len(where)} tensors, {len(several)} terms")
            for i, t in zip(where, several, strict=False):
                terms[i] = "?" if t is None else t
        if isinstance(outputs, str) or outputs is None:
            outputs = [outputs] * len(self.outputs)
        outs = ["?" if t is None else t for t in outputs]
        bound = combine(tuple(terms), tuple(outs)).bind([v.shape for v in self.inputs], [v.shape for v in self.outputs], sizes, inner)
        for name in positional:
            bound.factors[name] = replace(bound.factors[name], positional=True)
        bias = tuple(i for n in partial_bias for i in self.positions(n))
        return Recipe(bound.inputs, bound.outputs, bound.factors, self.groups(linear), bias, frozenset(nested), random, flops, matmul)

    def groups(self, linear: Iterable[Iterable[str | int]]) -> tuple[tuple[int, ...], ...]:
        """Positions of linear groups, without those that hold integers or nothing at all."""
        out = []
        if self.outputs and self.is_float(*self.outputs):
            for group in linear:
                at = tuple(i for g in group for i in ((g,) if isinstance(g, int) else self.positions(g)))
                if at and self.is_float(*(self.inputs[i] for i in at)) and at not in out:
                    out.append(at)
        return tuple(out)

    def unsplit(self) -> Recipe:
        """The recipe of an op that is known and never split."""
        return Recipe((None,) * len(self.inputs), (None,) * len(self.outputs), {})

    # -- making the local form

    def emitted(self, *, fn: str | None = None, divide: int = 1, **changed: Any) -> Emitted:
        """The call with some arguments changed, each written in the form the user wrote it."""
        args, kwargs = list(self.op.args), dict(self.op.kwargs)
        for name, value in changed.items():
            kind, at = self._where.get(name) or ("key", name)
            if kind == "rest":
                args[at:] = value
            elif kind == "arg":
                args[at] = value
            else:
                kwargs[at] = value
        return Emitted(fn or self.op.fn, tuple(args), kwargs, divide)

    def local_sizes(self, recipe: Recipe, splits: Iterable[Split], sizes: Sequence[Any], first: int = 0, out: int = 0) -> Any:
        """Shape arguments for dims first, first+1, ... of an output, divided where the splits shard them."""
        dims = recipe.outputs[out]
        done = [self.scaled(s, divisor(recipe, splits, dims, first + i)) for i, s in enumerate(sizes)]
        return done if isinstance(sizes, list) else tuple(done)

    def scaled(self, size: Any, by: int) -> Any:
        """A size argument divided by a number: literals at once, run-time scalars as Scaled, -1 stays."""
        if by == 1 or (isinstance(size, int) and size == -1):
            return size
        if isinstance(size, Ref):
            return Scaled(size, by)
        if not isinstance(size, int) or size % by:
            raise RuleError(f"{self.op.id} ({self.op.src}): size {size!r} cannot be divided by {by}")
        return size // by


def divisor(recipe: Recipe, splits: Iterable[Split], dims: Any, dim: int) -> int:
    """By how much the splits shorten a dim."""
    n = 1
    for s in splits:
        name, _ = recipe.parse(s.factor)
        if name in recipe.factors and recipe.dim_of(dims, name) == dim:
            n *= s.size
    return n
