"""An interpreter of Graphs: the independent oracle for build and the tracer.
Must not be imported by the package; it uses the original module's tensors and plain PyTorch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch

from autopar.ir import graph as ir
from autopar.ir.graph import Block, Call, Global, Graph, Guard, Struct


def resolve(fn: str) -> Any:
    """The callable of an op's fn."""
    if fn.startswith("apply:"):
        return resolve(fn[6:]).apply
    if ":" in fn:
        module, name = fn.split(":")
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    parts = fn.split(".")
    return functools.reduce(getattr, parts[1:], importlib.import_module(parts[0]))


def tensors_of(module: torch.nn.Module, graph: Graph) -> dict[str, torch.Tensor]:
    found = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return {**{t.name: found[t.name] for t in graph.tensors if t.kind != "constant"}, **graph.constants}


class Interpreter:
    """Calls of `run` execute the graph on the module's own tensors. Guards are checked."""

    def __init__(self, graph: Graph, module: torch.nn.Module, checkpoint: bool = True) -> None:
        self.graph, self.module, self.checkpoint = graph, module, checkpoint
        self.tensors = tensors_of(module, graph)
        self.calls = 0

    def run(self, **inputs: Any) -> Any:
        """inputs: every forward argument by name. Returns the output tree."""
        body, env = self.graph.body, {}
        for a in self.graph.arguments:
            if a.given:
                _bind(a.tree, inputs[a.name], env)
        out = self.block(body, "", [env[i] for i in body.inputs], True)
        return self.tree(self.graph.output, dict(zip(body.outputs, out, strict=True)))

    def block(self, b: Block, path: str, args: list[Any], enter: bool = False) -> tuple[Any, ...]:
        if b.recompute and self.checkpoint and not enter:
            # NB: no arguments: checkpoint would refuse buffers among them that are written before the backward pass.
            return torch.utils.checkpoint.checkpoint(functools.partial(self.block, b, path, args, True), use_reentrant=False)
        env: dict[int, Any] = dict(zip(b.inputs, args, strict=True))
        for p in b.params:
            env[p.value] = self.tensors[ir.join(path, p.name)]
        for x in b.ops:
            if isinstance(x, Guard):
                self.guard(x, env)
            elif isinstance(x, Call):
                self.calls += 1
                callee = self.graph.blocks[x.block]
                where = ir.join(path, x.id.partition("#")[0])
                assert where in callee.instances, (where, callee.instances)
                out = self.block(callee, where, [env[i] for i in x.args])
                env.update(zip(x.out, out, strict=True))
                for old, new in x.writes:
                    assert env[old] is env[new]
            elif x.fn == "autopar:set_buffer":
                owner, _, name = ir.join(path, x.args[0]).rpartition(".")
                setattr(self.module.get_submodule(owner), name, env[x.args[1].id])
            elif x.fn == "autopar:select_training":
                env[x.out.id] = env[x.args[not self.module.training].id]
            elif not x.training or self.module.training:
                with torch.set_grad_enabled(x.ctx.grad and torch.is_grad_enabled()), contextlib.ExitStack() as stack:
                    for device, dtype, on in x.ctx.autocast:
                        stack.enter_context(torch.autocast(device, getattr(torch, dtype), on))
                    result = resolve(x.fn)(*self.tree(x.args, env), **self.tree(x.kwargs, env))
                _bind(x.out, result, env)
                for old, new in x.writes:
                    env[new] = env[old]
        for i, v in env.items():
            seen = b.values[i]
            if seen.is_tensor and isinstance(v, torch.Tensor):
                assert (tuple(v.shape), str(v.dtype)) == (seen.shape, f"torch.{seen.dtype}"), (b.name, seen, v.shape, v.dtype)
        return tuple(env[i] for i in b.outputs)

    def guard(self, g: Guard, env: dict[int, Any]) -> None:
        v = env[g.value.id] if isinstance(g.value, ir.Ref) else g.value
        if g.read in ("bool", "int", "float", "item", "tolist") and isinstance(v, torch.Tensor):
            got = v.tolist() if g.read == "tolist" else {"bool": bool, "int": int, "float": float, "item": lambda t: t.item()}[g.read](v)
            assert got == g.expected or got != got, (g, got)

    def tree(self, t: Any, env: dict[int, Any]) -> Any:
        if isinstance(t, Struct):
            cls = resolve(t.cls)
            items = {n: self.tree(x, env) for n, x in zip(t.names, t.items, strict=True)}
            return cls(**items)
        if isinstance(t, Global):
            return torch.device("cpu") if t.name == "autopar:device" else resolve(t.name)
        if isinstance(t, ir.Ref):
            return env[t.id]
        if isinstance(t, (tuple, list)):
            return type(t)([self.tree(x, env) for x in t])
        if isinstance(t, dict):
            return {k: self.tree(x, env) for k, x in t.items()}
        if isinstance(t, slice):
            return slice(*(self.tree(x, env) for x in (t.start, t.stop, t.step)))
        return t


def _bind(tree: Any, value: Any, env: dict[int, Any]) -> None:
    """Match a result with its tree of Refs."""
    if isinstance(tree, ir.Ref):
        env[tree.id] = value
    elif isinstance(tree, (tuple, list)):
        for t, v in zip(tree, value, strict=True):
            _bind(t, v, env)
    elif isinstance(tree, dict):
        for k, t in tree.items():
            _bind(t, value[k], env)
    elif isinstance(tree, Struct):
        for n, t in zip(tree.names, tree.items, strict=True):
            _bind(t, getattr(value, n) if hasattr(value, n) else value[n], env)
