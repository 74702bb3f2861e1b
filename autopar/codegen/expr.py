"""expr: a call of a Program as the Python a person would write: operators, subscripts, methods, literals, imports.
Must not know about blocks or statements order: names of values come from the caller.
"""

from __future__ import annotations

import inspect
import keyword
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from autopar.ir.graph import AxisRef, Global, Ref, Struct
from autopar.rules.recipe import Scaled, TrainingOnly

# Precedence of Python expressions, loosest first.
IF, COMPARE, OR, XOR, AND, SHIFT, ADD, MUL, UNARY, POW, ATOM = range(11)

BINARY = {
    "add": ("+", ADD), "sub": ("-", ADD), "subtract": ("-", ADD), "mul": ("*", MUL), "multiply": ("*", MUL),
    "div": ("/", MUL), "truediv": ("/", MUL), "true_divide": ("/", MUL), "divide": ("/", MUL), "floordiv": ("//", MUL),
    "remainder": ("%", MUL), "mod": ("%", MUL), "matmul": ("@", MUL), "pow": ("**", POW),
    "and": ("&", AND), "or": ("|", OR), "xor": ("^", XOR), "lshift": ("<<", SHIFT), "rshift": (">>", SHIFT),
    "le": ("<=", COMPARE), "lt": ("<", COMPARE), "ge": (">=", COMPARE), "gt": (">", COMPARE), "eq": ("==", COMPARE), "ne": ("!=", COMPARE),
}  # fmt: skip
REFLECTED = {
    f"__r{n}__": BINARY[n] for n in ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "matmul", "pow", "and", "or", "xor")
}
INPLACE = {f"__i{n}__": op for n, (op, _) in BINARY.items()}
UNARIES = {"neg": "-", "negative": "-", "__neg__": "-", "__invert__": "~", "__pos__": "+", "pos": "+"}
# Methods that are the same call as the operator. NB: `x.logical_and(y)` is not `x & y`, and `x.floor_divide(y)` takes other arguments.
PLAIN = {
    "add", "sub", "subtract", "mul", "multiply", "div", "true_divide", "divide", "remainder", "matmul", "pow",
    "le", "lt", "ge", "gt", "eq", "ne",
}  # fmt: skip
BUILTIN_CALLS = {"__len__": "len", "__bool__": "bool", "__int__": "int", "__float__": "float", "__abs__": "abs", "__index__": "int"}
# Names that a local variable of generated code must not take.
RESERVED = (
    "torch", "F", "ap", "math", "self", "_", "abs", "bool", "complex", "dict", "float", "int", "len", "range", "slice", "str", "super",
)  # fmt: skip


@dataclass(frozen=True)
class Code:
    """Python text and how tightly it binds; a statement is no expression at all."""

    text: str
    level: int = ATOM
    statement: bool = False

    def at(self, level: int) -> str:
        """The text as an operand that must bind at least this tightly."""
        return self.text if self.level >= level else f"({self.text})"


@dataclass
class Imports:
    """The modules a generated file needs. User objects are bound by `object`, under an alias where the name is taken."""

    taken: set[str] = field(default_factory=lambda: set(RESERVED))
    used: set[str] = field(default_factory=set)  # of torch, F, ap, math
    objects: dict[tuple[str, str], str] = field(default_factory=dict)

    def object(self, name: str) -> str:
        """The expression for an importable 'package.module:Qual.name'."""
        module, _, qualified = name.partition(":")
        first, *rest = qualified.split(".")
        key = (module, first)
        if key not in self.objects:
            alias, n = first, 1
            while alias in self.taken:
                alias = f"{first}_{module.split('.')[-1]}" if n == 1 else f"{first}_{n}"
                n += 1
            self.taken.add(alias)
            self.objects[key] = alias
        return ".".join([self.objects[key], *rest])

    def lines(self) -> list[str]:
        out = ["import math", ""] if "math" in self.used else []
        out += ["import torch"] if "torch" in self.used else []
        out += ["import torch.nn.functional as F"] if "F" in self.used else []
        for (module, first), alias in sorted(self.objects.items()):
            out.append(f"from {module} import {first}" + (f" as {alias}" if alias != first else ""))
        return [*out, "", "from autopar import runtime as ap"]


def imports_of(fn: str) -> str | None:
    """The user object a function name needs: 'pkg.mod:func', 'apply:pkg.mod:Class' -> 'pkg.mod:Class'; None for the rest."""
    name = fn.removeprefix("apply:")
    return name if ":" in name and not name.startswith("autopar:") else None


def tree_refs(tree: Any) -> Iterator[int]:
    """Ids of every value used in a tree of a Program, in order."""
    if isinstance(tree, Ref):
        yield tree.id
    elif isinstance(tree, (tuple, list)):
        for x in tree:
            yield from tree_refs(x)
    elif isinstance(tree, dict):
        for x in tree.values():
            yield from tree_refs(x)
    elif isinstance(tree, slice):
        yield from tree_refs((tree.start, tree.stop, tree.step))
    elif isinstance(tree, Struct):
        yield from tree_refs(tree.items)
    elif isinstance(tree, Scaled):
        yield from tree_refs(tree.ref)
    elif isinstance(tree, TrainingOnly):
        yield from tree_refs((tree.value, tree.otherwise))


def tree_globals(tree: Any) -> Iterator[str]:
    """Names of every importable object used in a tree, in order."""
    if isinstance(tree, Global) and not tree.name.startswith(("autopar:", "torch:", "torch.")):
        yield tree.name
    elif isinstance(tree, Struct):
        yield from tree_globals(tree.items)
    elif isinstance(tree, (tuple, list)):
        for x in tree:
            yield from tree_globals(x)
    elif isinstance(tree, dict):
        for x in tree.values():
            yield from tree_globals(x)
    elif isinstance(tree, TrainingOnly):
        yield from tree_globals((tree.value, tree.otherwise))


def string(text: str) -> str:
    """A string literal with double quotes where that needs no escapes."""
    plain = repr(text)
    body = plain[1:-1]
    if plain[0] == "'" and '"' not in body:
        return '"' + body.replace("\\'", "'") + '"'
    return plain


def attribute(base: str, path: str) -> str:
    """`base` followed by a dotted module path: self.layers[3].mlp.weight."""
    for part in filter(None, path.split(".")):
        if part.isdecimal() and (part == "0" or part[0] != "0"):
            base += f"[{part}]"
        elif part.isidentifier() and (not part.startswith("__") or part.endswith("__")) and not keyword.iskeyword(part):
            base += f".{part}"
        else:
            base += f"[{string(part)}]"
    return base


# Functions without a signature that Python could read.
BUILT_IN: dict[str, dict[str, Any]] = {
    "torch.nn.functional.linear": {"bias": None},
    "torch.nn.functional.scaled_dot_product_attention": {
        "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False,
    },
}  # fmt: skip


@cache
def _defaults(fn: str) -> dict[str, Any]:
    """Defaults of a function of torch.nn.functional, by name."""
    if fn in BUILT_IN:
        return BUILT_IN[fn]
    try:
        parameters = inspect.signature(getattr(torch.nn.functional, fn.rpartition(".")[2])).parameters
    except (AttributeError, TypeError, ValueError):
        return {}
    return {n: p.default for n, p in parameters.items() if p.default is None or type(p.default) in (bool, int, float, str)}


def without_defaults(fn: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Modules pass every argument of F.embedding or F.cross_entropy; a person writes those that are not the default."""
    if not fn.startswith("torch.nn.functional."):
        return args, kwargs
    defaults = _defaults(fn)
    if fn.endswith(".linear") and len(args) == 3 and args[2] is None:
        args = args[:2]
    same = lambda k, v: k in defaults and type(v) is type(defaults[k]) and v == defaults[k]  # noqa: E731
    return args, {k: v for k, v in kwargs.items() if not same(k, v)}


@dataclass
class Printer:
    """Prints trees and calls of one block. `name` gives the expression of a value id, `axis` the attribute of a mesh axis."""

    imports: Imports
    name: Callable[[int], str]
    axis: Callable[[str], str]
    training: bool = True  # the graph was traced in training mode; in eval mode TrainingOnly is the value recorded

    # -- literals

    def code(self, x: Any) -> Code:
        """Any argument: a value, a literal, or a container of them."""
        if isinstance(x, Ref):
            return Code(self.name(x.id))
        if isinstance(x, AxisRef):
            return Code(self.axis(x.name))
        if isinstance(x, Global):
            return self._global(x.name)
        if isinstance(x, Scaled):
            return Code(f"{self.code(x.ref).at(MUL)} // {x.divisor}", MUL)
        if isinstance(x, TrainingOnly):
            if not self.training:
                return self.code(x.value)
            if x.value is True and x.otherwise is False:
                return Code("self.training")
            return Code(f"{self.code(x.value).at(OR)} if self.training else {self.code(x.otherwise).at(IF)}", IF)
        if x is None or x is True or x is False:
            return Code(repr(x))
        if x is Ellipsis:
            return Code("...")
        if isinstance(x, float):
            return self._float(x)
        if isinstance(x, int):
            return Code(int.__repr__(x), UNARY if x < 0 else ATOM)
        if isinstance(x, complex):
            return Code(f"complex({self._float(x.real).text}, {self._float(x.imag).text})")
        if isinstance(x, str):
            return Code(string(str.__str__(x)))  # NB: also of an enum that is a str
        if isinstance(x, (torch.dtype, torch.layout, torch.memory_format)):
            self.imports.used.add("torch")
            return Code(repr(x) if repr(x).startswith("torch.") else f"torch.{x}")
        if isinstance(x, torch.device):
            self.imports.used.add("torch")
            return Code(f"torch.device({string(str(x))})")
        if isinstance(x, slice):
            parts = [x.start, x.stop] + ([x.step] if x.step is not None else [])
            return Code(f"slice({', '.join(self.code(p).text for p in parts)})")
        if isinstance(x, Struct):
            return self._struct(x)
        if isinstance(x, tuple):
            items = ", ".join(self.code(y).text for y in x)
            return Code(f"({items},)" if len(x) == 1 else f"({items})")
        if isinstance(x, list):
            return Code(f"[{', '.join(self.code(y).text for y in x)}]")
        if isinstance(x, dict):
            return Code("{" + ", ".join(f"{self.code(k).text}: {self.code(v).text}" for k, v in x.items()) + "}")
        if isinstance(x, (set, frozenset)):
            return Code(f"{type(x).__name__}(({', '.join(sorted(self.code(y).text for y in x))},))") if x else Code(f"{type(x).__name__}()")
        if isinstance(x, range):
            return Code(repr(x))
        raise AssertionError(f"{type(x).__name__} {x!r} cannot be written as a literal")

    def _float(self, x: float) -> Code:
        if math.isnan(x) or math.isinf(x):
            return Code(f'float("{x}")')
        return Code(float.__repr__(x), UNARY if math.copysign(1.0, x) < 0 else ATOM)

    def _global(self, name: str) -> Code:
        special = {"autopar:training": "self.training", "autopar:device": "self.device"}
        if name in special:
            return Code(special[name])
        assert not name.startswith("autopar:"), name
        if name.startswith("torch:") or name.startswith("torch."):
            self.imports.used.add("torch")
            return Code(name.replace(":", "."))
        return Code(self.imports.object(name))

    def _struct(self, x: Struct) -> Code:
        self.imports.used.add("ap")
        fields = [f"{n}={self.code(v).text}" for n, v in zip(x.names, x.items, strict=True)]
        return Code(f"ap.struct({', '.join([string(x.cls), *fields])})")

    def index(self, x: Any) -> str:
        """What stands between the brackets of a subscript."""
        if isinstance(x, tuple) and x:
            return ", ".join(self._index_item(y) for y in x) + ("," if len(x) == 1 else "")
        return self._index_item(x)

    def _index_item(self, x: Any) -> str:
        if isinstance(x, slice):
            text = ":".join("" if p is None else self.code(p).at(OR) for p in (x.start, x.stop))
            return text + (f":{self.code(x.step).at(OR)}" if x.step is not None else "")
        return self.code(x).text

    # -- calls

    def call(self, fn: str, args: Iterable[Any], kwargs: dict[str, Any]) -> Code:
        """The call as an expression, or as a statement for assignments to items and attributes."""
        args = tuple(args)
        if fn.startswith("torch.Tensor."):
            return self._method(fn.removeprefix("torch.Tensor."), args, kwargs)
        if fn.startswith(("operator.", "_operator.")):
            return self._operator(fn.partition(".")[2], args, kwargs)
        if fn.startswith("autopar:"):
            return self._special(fn, args, kwargs)
        return Code(f"{self._function(fn)}({self.arguments(*without_defaults(fn, args, kwargs))})")

    def arguments(self, args: Iterable[Any], kwargs: dict[str, Any]) -> str:
        named = [f"{k}={self.code(v).text}" for k, v in kwargs.items() if k.isidentifier() and not keyword.iskeyword(k)]
        other = {k: v for k, v in kwargs.items() if not k.isidentifier() or keyword.iskeyword(k)}
        if other:
            named.append(f"**{self.code(other).text}")
        return ", ".join([*(self.code(a).text for a in args), *named])

    def _function(self, fn: str) -> str:
        """The expression of a function by its qualified name."""
        if fn.startswith("torch.nn.functional."):
            self.imports.used.add("F")
            return "F." + fn.removeprefix("torch.nn.functional.")
        if fn.startswith("ap."):
            self.imports.used.add("ap")
            return fn
        if fn.startswith("apply:"):
            return f"{self.imports.object(fn.removeprefix('apply:'))}.apply"
        if ":" in fn:
            return self.imports.object(fn)
        if fn.startswith("builtins."):
            return fn.removeprefix("builtins.")
        if fn.startswith("math."):
            self.imports.used.add("math")
            return fn
        if fn.startswith("torch."):
            self.imports.used.add("torch")
            return fn
        # A plain dotted name of a user's function: 'pkg.mod.func'.
        module, _, name = fn.rpartition(".")
        return self.imports.object(f"{module}:{name}") if module else fn

    def _operator(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Code:
        name = name.strip("_")
        if name == "getitem":
            return self._method("__getitem__", args, kwargs)
        if name in ("neg", "pos", "invert", "inv"):
            return Code(f"{'-' if name == 'neg' else '+' if name == 'pos' else '~'}{self.code(args[0]).at(UNARY)}", UNARY)
        if name == "not":
            return Code(f"not {self.code(args[0]).at(COMPARE)}", IF)
        return self._binary(*BINARY[name], *args)

    def _binary(self, op: str, level: int, left: Any, right: Any) -> Code:
        # NB: ** binds its left side tighter than a unary minus, and groups to the right; comparisons must not chain.
        lo, hi = (ATOM, UNARY) if op == "**" else (OR, OR) if level == COMPARE else (level, level + 1)
        return Code(f"{self.code(left).at(lo)} {op} {self.code(right).at(hi)}", level)

    def _method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Code:
        if name.endswith(".__get__"):
            return Code(f"{self.code(args[0]).at(ATOM)}.{name.removesuffix('.__get__')}")
        if name.endswith(".__set__"):
            return Code(f"{self.code(args[0]).at(ATOM)}.{name.removesuffix('.__set__')} = {self.code(args[1]).text}", statement=True)
        if not args:
            self.imports.used.add("torch")
            return Code(f"torch.Tensor.{name}({self.arguments(args, kwargs)})")
        if not kwargs and len(args) == 3 and name == "__setitem__":
            return Code(f"{self.code(args[0]).at(ATOM)}[{self.index(args[1])}] = {self.code(args[2]).text}", statement=True)
        if not kwargs and len(args) == 2:
            if name == "__getitem__":
                return Code(f"{self.code(args[0]).at(ATOM)}[{self.index(args[1])}]")
            bare = name[2:-2] if name.startswith("__") and name.endswith("__") else name if name in PLAIN else ""
            if bare in BINARY:
                return self._binary(*BINARY[bare], *args)
            if name in REFLECTED:
                return self._binary(*REFLECTED[name], args[1], args[0])
            if name in INPLACE:
                return Code(f"{self.code(args[0]).text} {INPLACE[name]}= {self.code(args[1]).text}", statement=True)
        if not kwargs and len(args) == 1:
            if name in UNARIES:
                return Code(f"{UNARIES[name]}{self.code(args[0]).at(UNARY)}", UNARY)
            if name in BUILTIN_CALLS:
                return Code(f"{BUILTIN_CALLS[name]}({self.code(args[0]).text})")
        receiver = self.code(args[0])
        if not isinstance(args[0], Ref):  # a number or tuple as receiver: the unbound method
            self.imports.used.add("torch")
            return Code(f"torch.Tensor.{name}({self.arguments(args, kwargs)})")
        return Code(f"{receiver.at(ATOM)}.{name}({self.arguments(args[1:], kwargs)})")

    def _special(self, fn: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Code:
        if fn == "autopar:set_buffer":
            return Code(f"{attribute('self', args[0])} = {self.code(args[1]).text}", statement=True)
        if fn == "autopar:select_training":
            return Code(f"{self.code(args[0]).at(OR)} if self.training else {self.code(args[1]).at(IF)}", IF)
        assert not kwargs and len(args) <= 1, fn
        return self._global(fn) if not args else self.code(args[0])

    def read(self, read: str, value: Any) -> str:
        """A guard's reading of a value: 'bool' -> bool(x), 'item' -> x.item(), 'equal:3' -> x == 3."""
        code = self.code(value)
        if read in ("bool", "int", "float", "len", "complex", "str"):
            return f"{read}({code.text})"
        kind, colon, expected = read.partition(":")
        if kind == "equal" and colon:
            return f"{code.at(OR)} == {expected}"
        if re.fullmatch(r"[A-Za-z_]\w*", read):
            return f"{code.at(ATOM)}.{read}()"
        if m := re.fullmatch(r"(==|!=|<=|>=|<|>) ?(.+)", read):
            return f"{code.at(OR)} {m[1]} {m[2]}"
        raise AssertionError(f"unknown guard read {read!r}")
