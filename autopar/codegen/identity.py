"""identity: what a compile was made from, as named fields, so that a folder is found again and a difference can be explained.
Must not know folders or files of generated code (savedir.py), nor how source is found (origins.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, partial
from types import FunctionType
from typing import Any

import torch

from autopar.codegen.origins import HASHED, LITERALS, Walk, digest, fields_of, tensor_type, text
from autopar.config import ComputeConfig
from autopar.rules.registry import user_rules

TRACE_FIELDS = ("constant_folding", "trace_strategy", "user_config")  # of ComputeConfig: what decides the graph
SHOWN = 6  # differing fields of one kind that a message lists
_NONE = object()
_PLAIN = frozenset(vars(torch.nn.Module())) | {"training"}


@dataclass(frozen=True)
class Identity:
    """Two flat tables of plain values: what decides the graph, and what else decides the code."""

    graph: dict[str, Any]
    code: dict[str, Any]

    def differences(self, other: Mapping[str, Any], part: str) -> list[str]:
        """One line per field of a part ('graph' or 'code') that differs from a stored manifest; long lists are cut."""
        mine, theirs = getattr(self, part), other.get(part, {})
        keys = [k for k in [*mine, *(k for k in theirs if k not in mine)] if mine.get(k) != theirs.get(k)]
        if mine.get("weights") == "none":  # a module on the meta device may well use weights that were saved before
            keys = [k for k in keys if k != "weights"]
        kinds: dict[str, list[str]] = {}
        for k in keys:
            a, b = _shown(theirs.get(k, _NONE), mine.get(k, _NONE))
            kinds.setdefault(k.partition(".")[0], []).append(f"{k}: saved {a}, now {b}")
        out = []
        for kind, lines in kinds.items():
            out += lines[:SHOWN] + [f"{kind}: {len(lines) - SHOWN} more"] * (len(lines) > SHOWN)
        return out


def _shown(a: Any, b: Any) -> tuple[str, str]:
    """Two values of a field as text; of long descriptions only the words that differ."""
    if isinstance(a, str) and isinstance(b, str) and len(a) + len(b) > 120:
        x, y = a.split(), b.split()
        common = set(x) & set(y)
        a, b = (" ".join(w for w in words if w not in common)[:300] or words[0] for words in (x, y))
    return tuple("nothing" if v is _NONE else repr(v) for v in (a, b))  # type: ignore[return-value]


def identify(module: torch.nn.Module, dummy_args: Any, policy: Any, config: ComputeConfig, version: str) -> Identity:
    """The identity of a compile: module source and structure, inputs, trace settings; then policy, configuration and version."""
    settings = config.to_dict()
    walk = Walk()
    for cls in {type(m): None for m in module.modules()}:
        walk.visit(cls)
    weights = [*module.parameters(), *module.buffers()]
    graph: dict[str, Any] = {
        "module": f"{type(module).__module__}.{type(module).__qualname__}",
        **{f"source.{k}": v for k, v in sorted(walk.found.items())},
        **structure(module),
        "weights": "none" if any(t.is_meta for t in weights) else "saved",
        "training": module.training,
        "ambient": _ambient(),
        **{f"inputs.{k}": v for k, v in _schema(dummy_args)},
        **_flat({k: settings.pop(k) for k in TRACE_FIELDS}),
        "torch": torch.__version__.partition("+")[0],  # NB: without the build, so that a laptop compiles for a cluster
    }
    ops = {n: text(r.recipe) for n, r in user_rules().items() if walk.knows(n)}
    code = {"policy": policy_name(policy), "autopar": version, **{f"registered.{k}": digest(v) for k, v in ops.items()}, **_flat(settings)}
    return Identity(json.loads(json.dumps(graph)), json.loads(json.dumps(code)))


def policy_name(policy: Any) -> str:
    """A policy's identity: its name, or the digest of its source and of all it reaches; a Plan's digest."""
    if isinstance(policy, str):
        return policy
    if hasattr(policy, "to_json"):
        return "plan:" + digest(policy.to_json())
    inner = policy
    while isinstance(inner, partial):
        inner = inner.func
    name = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    walk = Walk()
    held = text(policy, walk)
    return f"{name}:{digest(held + json.dumps(walk.found, sort_keys=True))}"


# ---- structure ----------------------------------------------------------------------------------------------


def structure(module: torch.nn.Module) -> dict[str, Any]:
    """Every submodule with its settings and every tensor, numbers in names as '*', and the fields of objects they hold.

    'structure.layers.*.up.weight' -> 'float32[16, 8] (x4)', 'settings.LlamaConfig.hidden_size' -> 64.
    """
    rows: dict[str, list[str]] = {}
    objects = _Objects()
    for name, m in module.named_modules():
        settings = {k: v for k, v in vars(m).items() if k not in _PLAIN and not isinstance(getattr(type(m), k, None), cached_property)}
        settings |= {"training": m.training} if m.training != module.training else {}
        settings |= {k: list(v.values()) for k in ("_forward_hooks", "_forward_pre_hooks") if (v := getattr(m, k))}
        shown = [type(m).__qualname__, *(f"{k}={objects.name(v)}" for k, v in settings.items())]
        rows.setdefault(_pattern(name) or "root", []).append(" ".join(shown))
    tied: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        rows.setdefault(_pattern(name), []).append(tensor_type(p) + ("" if p.requires_grad else " frozen"))
        tied.setdefault(id(p), []).append(name)
    for name, b in module.named_buffers(remove_duplicate=False):
        rows.setdefault(_pattern(name), []).append(tensor_type(b) + " buffer")
        tied.setdefault(id(b), []).append(name)
    for names in tied.values():
        if len(names) > 1:
            rows.setdefault(_pattern(names[0]), []).append(f"tied to {', '.join(names[1:])}")
    return {f"structure.{k}": _counted(v) for k, v in rows.items()} | {f"settings.{k}": v for k, v in objects.fields.items()}


class _Objects:
    """Names for what modules hold; an object shared by many modules (a config) is read once, field by field."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self._known: dict[int, tuple[Any, str]] = {}
        self._count: Counter[str] = Counter()

    def name(self, x: Any) -> str:
        if isinstance(x, LITERALS):
            return repr(x)
        if id(x) not in self._known:
            self._known[id(x)] = (x, self._read(x))
        return self._known[id(x)][1]

    def _read(self, x: Any) -> str:
        if getattr(x, "__dict__", None) and not isinstance(x, (torch.Tensor, torch.nn.Module, Mapping, type, FunctionType, partial, Enum)):
            kind = type(x).__qualname__
            self._count[kind] += 1
            kind += f"#{self._count[kind]}" if self._count[kind] > 1 else ""
            self.fields |= {f"{kind}.{k}": _value(v) for k, v in fields_of(x).items()}
            return kind
        return _short(x)


def _value(x: Any) -> Any:
    """What JSON can hold as it is, anything else as text."""
    plain = isinstance(x, (bool, int, str, type(None))) or (isinstance(x, float) and x - x == 0)
    return x if plain else _short(x)


def _short(x: Any) -> str:
    full = text(x)
    return full if len(full) <= 60 else f"{type(x).__qualname__}:{digest(full)}"


def _pattern(name: str) -> str:
    return ".".join("*" if p.isdigit() else p for p in name.split("."))


def _counted(rows: list[str]) -> str:
    """Equal rows once, with their number; where there are several kinds, a digest stands for their order."""
    kinds = Counter(rows)
    shown = "; ".join(f"{r} (x{n})" if n > 1 else r for r, n in list(kinds.items())[:4])
    more = f"; {len(kinds) - 4} more kinds" if len(kinds) > 4 else ""
    return shown if len(kinds) < 2 else f"{shown}{more} [{digest(repr(rows))[:6]}]"


# ---- values -------------------------------------------------------------------------------------------------


def _schema(x: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Shapes and dtypes of a nested input by path; literals by value.

    NB: a mask that is all ones takes another path through a model than one that is not, so that much of the numbers counts.
    """
    if isinstance(x, torch.Tensor):
        countable = not x.is_meta and not x.is_floating_point() and not x.is_complex() and 1 < x.numel() <= HASHED
        yield path, tensor_type(x) + (f" all {x.reshape(-1)[0].item()}" if countable and bool((x == x.reshape(-1)[0]).all()) else "")
    elif isinstance(x, Mapping):
        for k, v in x.items():
            yield from _schema(v, f"{path}.{k}".lstrip("."))
    elif isinstance(x, (list, tuple)):
        yield path, f"{type(x).__name__} of {len(x)}"
        for i, v in enumerate(x):
            yield from _schema(v, f"{path}.{i}".lstrip("."))
    elif hasattr(x, "__dataclass_fields__") and not isinstance(x, type):
        yield path, type(x).__qualname__
        for k in x.__dataclass_fields__:
            yield from _schema(getattr(x, k), f"{path}.{k}".lstrip("."))
    else:
        yield path, _value(x)


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """{'pas_config': {'seed': 1}} -> {'pas_config.seed': 1}; other values than numbers and texts as text."""
    out: dict[str, Any] = {}
    for k, v in table.items():
        if isinstance(v, Mapping):
            out |= {f"{k}.{n}": inner for n, inner in _flat({str(n): i for n, i in v.items()}).items()}
        else:
            out[k] = _value(v)
    return out


def _ambient() -> str:
    """The modes the caller has switched on, which a trace records."""
    on = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    cast = "".join(f", autocast {d} {torch.get_autocast_dtype(d)}" for d in on)
    return ("grad" if torch.is_grad_enabled() else "no_grad") + cast
