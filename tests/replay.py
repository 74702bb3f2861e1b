"""A small interpreter of recordings, the oracle of the tracer's tests: run the events and compare with eager.
Must not know how a recording was made.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch

from autopar.ir.graph import Global, Ref, Struct
from autopar.trace.names import resolve_fn
from autopar.trace.recording import RecordedGuard, RecordedOp, Recording


class Mismatch(AssertionError):
    """A guard failed."""


def decode(tree: Any, env: dict[int, Any]) -> Any:
    if isinstance(tree, Ref):
        return env[tree.id]
    if isinstance(tree, Global):
        return torch.device("cpu") if tree.name == "autopar:device" else resolve_fn(tree.name)
    if isinstance(tree, tuple):
        return tuple(decode(x, env) for x in tree)
    if isinstance(tree, list):
        return [decode(x, env) for x in tree]
    if isinstance(tree, dict):
        return {k: decode(v, env) for k, v in tree.items()}
    if isinstance(tree, slice):
        return slice(decode(tree.start, env), decode(tree.stop, env), decode(tree.step, env))
    if isinstance(tree, Struct):
        module, name = tree.cls.split(":")
        cls = importlib.import_module(module)
        for part in name.split("."):
            cls = getattr(cls, part)
        return cls(**dict(zip(tree.names, decode(tree.items, env), strict=True)))
    return tree


def store(tree: Any, value: Any, env: dict[int, Any]) -> None:
    if isinstance(tree, Ref):
        env[tree.id] = value
    elif isinstance(tree, (tuple, list)):
        assert len(tree) == len(value)
        for t, v in zip(tree, value, strict=True):
            store(t, v, env)
    elif isinstance(tree, dict):
        for k, t in tree.items():
            store(t, value[k], env)
    elif isinstance(tree, Struct):
        for n, t in zip(tree.names, tree.items, strict=True):
            store(t, getattr(value, n), env)


def leaves(tree: Any, value: Any, out: list[Any]) -> None:
    if isinstance(tree, Ref):
        out.append((tree.id, value))
    elif isinstance(tree, (tuple, list)):
        for t, v in zip(tree, value, strict=True):
            leaves(t, v, out)
    elif isinstance(tree, dict):
        for k, t in tree.items():
            leaves(t, value[k], out)
    elif isinstance(tree, Struct):
        for n, t in zip(tree.names, tree.items, strict=True):
            leaves(t, value[n] if isinstance(value, dict) else getattr(value, n), out)


def replay(rec: Recording, module: torch.nn.Module, given: dict[str, Any]) -> Any:
    """Run a recording on the module's own parameters and buffers; guards are checked."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    env: dict[int, Any] = {}
    for i, v in enumerate(rec.values):
        if v.origin in ("param", "buffer"):
            env[i] = tensors[v.qualified]
        elif v.origin == "constant":
            env[i] = rec.constants[v.qualified].clone()
    names = [a.name for a in rec.arguments]
    found: list[Any] = []
    for a in rec.arguments:
        if a.kind == "var_keyword" and a.given:
            value = {k: v for k, v in given.items() if k not in names} | dict(given.get(a.name, {}))
            leaves(a.tree, value, found)
        elif a.given:
            leaves(a.tree, given[a.name], found)
    env.update(found)
    assert [i for i, _ in found] == list(rec.inputs)
    for e in rec.events:
        if isinstance(e, RecordedOp) and e.fn == "autopar:select_training":
            env[e.out.id] = env[e.args[not module.training].id]
        elif isinstance(e, RecordedOp):
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.set_grad_enabled(e.ctx.grad))
                for dev, dtype, on in e.ctx.autocast:
                    stack.enter_context(torch.autocast(dev, getattr(torch, dtype), enabled=on))
                out = resolve_fn(e.fn)(*decode(e.args, env), **decode(e.kwargs, env))
            for old, new in e.writes:
                env[new] = env[old]
            store(e.out, out, env)
        elif isinstance(e, RecordedGuard):
            value = decode(e.value, env)
            got = value.tolist() if isinstance(value, torch.Tensor) else value
            if e.read == "bool":
                got = bool(got)
            if got != e.expected:
                raise Mismatch(f"{e.src}: `{e.src.text}` read {got!r}, traced with {e.expected!r}")
    for name, vid in rec.buffers_set:
        owner, _, key = name.rpartition(".")
        setattr(module.get_submodule(owner), key, env[vid])
    return decode(rec.output, env)
