"""classes: the text of each class: its tensors and blocks in __init__, its forward.
Must not know files or headers (emit.py).
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from autopar.codegen.block import Forward, Surroundings
from autopar.codegen.expr import Imports, string
from autopar.codegen.layout import WIDTH, Stmt, print_body
from autopar.codegen.loops import base_path, sibling
from autopar.codegen.reading import type_note
from autopar.codegen.signature import Signature
from autopar.ir.graph import AxisRef, Graph, Tensor, generalise, join
from autopar.ir.mesh import Mesh
from autopar.lower.program import Convert, Invoke, Local, LoweredBlock, Program


@dataclass
class Classes:
    """What every class of a file needs to know of the whole program."""

    graph: Graph
    program: Program
    imports: Imports
    guards: str
    free_bytes: int
    end2end: bool = False
    tensors: dict[str, Tensor] = field(init=False)  # by every name
    order: dict[str, int] = field(init=False)  # of every name, as the original module lists them

    def __post_init__(self) -> None:
        self.tensors, self.order = {}, {}
        for i, t in enumerate(self.graph.tensors):
            for name in (t.name, *t.aliases):
                self.tensors[name], self.order[name] = t, i
        types = {p.name: p.type for p in self.program.placements}
        whole = ("I",) * len(self.mesh.axes)
        self.types = {t.name: tuple(map(repr, types[t.name])) if t.name in types else whole for t in self.graph.tensors}

    @property
    def mesh(self) -> Mesh:
        return self.program.mesh

    @cached_property
    def owner(self) -> dict[str, tuple[str, str]]:
        """Tensor name -> (block that declares it, name relative to it): the block that uses it, for unused ones the root."""
        out: dict[str, tuple[str, str]] = {}
        for b in self.program.blocks.values():
            for path in b.instances:
                for p in b.params:
                    out.setdefault(join(base_path(path), p.name), (b.name, p.name))
        for t in self.graph.tensors:
            if not any(n in out for n in (t.name, *t.aliases)):
                out[t.name] = (self.program.root, t.name)
        return out

    @cached_property
    def set_buffers(self) -> frozenset[str]:
        """Absolute names of the buffers that some block replaces."""
        return frozenset(
            join(base_path(path), item.args[0])
            for b in self.program.blocks.values()
            for item in b.body
            if isinstance(item, Local) and item.fn == "autopar:set_buffer"
            for path in b.instances
        )

    @cached_property
    def list_sizes(self) -> dict[str, int]:
        """Absolute path of a module -> number of its children where they are 0..n-1, else 0."""
        children: dict[str, set[str]] = {"": {""}}  # the generated module itself is no list
        modules = [n.rpartition(".")[0] for t in self.graph.tensors for n in (t.name, *t.aliases)]
        modules += [base_path(p) for b in self.program.blocks.values() for p in b.instances]
        seen = {""}
        for path in modules:
            while path not in seen:  # NB: what is above a module that was seen was seen too
                seen.add(path)
                above, _, leaf = path.rpartition(".")
                children.setdefault(above, set()).add(leaf)
                path = above
        return {p: len(c) if c == {str(i) for i in range(len(c))} else 0 for p, c in children.items()}

    @cached_property
    def input_hints(self) -> dict[str, dict[int, str]]:
        """Block -> input value -> the name most of its callers have for it."""
        counts: dict[str, dict[int, Counter[str]]] = {}
        for b in self.program.blocks.values():
            for item in b.body:
                if isinstance(item, Invoke):
                    for inner, arg in zip(self.program.blocks[item.block].inputs, item.args, strict=True):
                        counts.setdefault(item.block, {}).setdefault(inner, Counter())[b.values[arg].name] += 1
        return {b: {v: c.most_common(1)[0][0] for v, c in names.items()} for b, names in counts.items()}

    def _input_names(self, block: LoweredBlock) -> dict[int, str]:
        """Input value -> what the user's forward calls it."""
        names = self.graph.blocks[block.source].input_names
        return {v: n for v, n in zip(block.inputs, names, strict=False) if n}

    def write(self, block: LoweredBlock) -> list[str]:
        """The lines of the class of a block."""
        root = block.name == self.program.root
        axes = self._axes(block)
        first = base_path(block.instances[0]) if block.instances else ""
        around = Surroundings(
            mesh=self.mesh,
            imports=self.imports,
            recompute=frozenset(b.name for b in self.program.blocks.values() if b.recompute),
            axis=lambda name: f"self.{axes[name]}",
            list_length=lambda path: self.list_sizes.get(join(first, path), 0),
            set_buffers=frozenset(p.name for p in block.params if join(first, p.name) in self.set_buffers),
            guards=self.guards != "off",
            hints={} if root else self.input_hints.get(block.name, {}) | self._input_names(block),
            free_bytes=self.free_bytes,
            training=self.graph.training,
        )
        self.imports.used.add("ap")
        lines = [f"class {block.name}(ap.{'ParallelModule' if root else 'Block'}):", f'    """{self._doc(block, root)}"""', ""]
        lines += ["    end2end = True", ""] if root and self.end2end else []
        lines += self._init(block, root, axes)
        lines += self._forward(block, root, around)
        return lines

    def _doc(self, block: LoweredBlock, root: bool) -> str:
        cls = self.graph.blocks[block.source].cls
        paths = tuple(dict.fromkeys(base_path(p) for p in block.instances))
        if root:
            return f"{cls or self.graph.module}, on {self.mesh if self.mesh.axes else 'one device'}."
        extra = ", run again in the backward" if block.recompute else ""
        text = f"{generalise(paths)} ({cls}), {len(paths)} instance{'s' if len(paths) > 1 else ''}{extra}."
        return text if len(text) < WIDTH - 10 else text.replace(" (", "\n\n    ", 1).replace(f"{cls})", cls, 1) + "\n    "

    # -- __init__

    def _axes(self, block: LoweredBlock) -> dict[str, str]:
        """Mesh axis -> attribute that holds it, for the axes this block uses."""
        used: set[str] = set()
        for item in block.body:
            if isinstance(item, Convert):
                used.add(item.axis)
            elif isinstance(item, Local):
                used.update(item.rng)
                used.update(_axis_refs((item.args, item.kwargs)))
        heads = {n.partition(".")[0] for n in self._declared(block)} | {n.partition(".")[0] for n in self._added(block)}
        taken = heads | {"device", "guards", "mesh", "training"}
        return {n: f"{n}_axis" if n in taken else n for n in self.mesh.names if n in used}

    def _declared(self, block: LoweredBlock) -> dict[str, Tensor]:
        """Tensors that the class declares, by relative name, in the original order."""
        first = base_path(block.instances[0]) if block.instances else ""
        names = [rel for name, (owner, rel) in self.owner.items() if owner == block.name]
        found = {rel: self.tensors[join(first, rel)] for rel in dict.fromkeys(names)}
        return dict(sorted(found.items(), key=lambda kv: (self.order[join(first, kv[0])], kv[0])))

    def _added(self, block: LoweredBlock) -> dict[str, str]:
        """Blocks called from this one: relative path -> class."""
        out: dict[str, str] = {}
        for item in block.body:
            if isinstance(item, Invoke):
                path = base_path(item.id)
                assert out.setdefault(path, item.block) == item.block, f"{path} is called as {out[path]} and as {item.block}"
        return out

    def _init(self, block: LoweredBlock, root: bool, axes: dict[str, str]) -> list[str]:
        lines = ["    def __init__(self, mesh):", f"        super().__init__({'mesh' if root else ''})"]
        if self.guards == "warn":
            lines.append('        self.guards = "warn"')
        lines += [f'        self.{attr} = mesh["{name}"]' for name, attr in axes.items()]
        first = base_path(block.instances[0]) if block.instances else ""
        rows = [(self.order[join(first, rel)], Stmt(self._declare(rel, t))) for rel, t in self._declared(block).items()]
        rows += self._adds(block, first)
        body = [stmt for _, stmt in sorted(rows, key=lambda r: r[0])]
        if root:
            for t in self.graph.tensors:
                # NB: a block may have declared the tensor under one of its other names; the first name in use is the original.
                body += [Stmt(f"self.alias({string(alias)}, {string(t.name)})") for alias in t.aliases]
                if t.aliases and t.name not in self.owner:
                    named = next(n for n in t.aliases if n in self.owner)
                    body.append(Stmt(f"self.alias({string(t.name)}, {string(named)})"))
        if root and not self.graph.training:
            body.append(Stmt("self.eval()", "as the module was when it was traced"))
        return [*lines, *print_body(body, 8), ""]

    def _declare(self, name: str, t: Tensor) -> str:
        self.imports.used.add("torch")
        parts = [string(name), repr(t.shape), f"torch.{t.dtype}", *(string(x) for x in self.types[t.name])]
        parts += [f"kind={string(t.kind)}"] if t.kind != "param" else []
        parts += ["grad=False"] if t.kind == "param" and not t.grad else []
        parts += ["persistent=False"] if t.kind == "buffer" and not t.persistent else []
        return f"self.declare({', '.join(parts)})"

    def _adds(self, block: LoweredBlock, first: str) -> Iterator[tuple[float, Stmt]]:
        """Lines that add blocks, runs of siblings as a loop, each placed where the original module lists its first tensor."""
        added = list(self._added(block).items())
        i = 0
        while i < len(added):
            path, cls = added[i]
            n = 1
            while i + n < len(added) and added[i + n] == (sibling(path, n), cls):
                n += 1
            prefix = join(first, path) + "."
            where = min((k for name, k in self.order.items() if name.startswith(prefix)), default=len(self.order))
            if n > 1:
                parent, dot, leaf = path.rpartition(".")
                start = f"{leaf}, {int(leaf) + n}" if leaf != "0" else str(n)
                name = f'f"{parent}{dot}{{i}}"'
                yield where, Stmt(f"for i in range({start}):", body=(f"self.add({name}, {cls}(mesh))",))
            else:
                yield where, Stmt(f"self.add({string(path)}, {cls}(mesh))")
            i += n

    # -- forward

    def _forward(self, block: LoweredBlock, root: bool, around: Surroundings) -> list[str]:
        forward = Forward(block, around)
        if root:
            signature = Signature(self.graph, forward)
            head, checks = signature.head(), signature.stmts
        else:
            for v in block.inputs:
                if forward.names.known(v):
                    continue
                forward.names.assign(v, -1, avoid=[forward.names(u) for u in block.inputs if forward.names.known(u)])
            head, checks = ", ".join(["self", *(forward.names(v) for v in block.inputs)]), []
        notes = {v: type_note(block.values[v].type, self.mesh) for v in block.inputs}
        typed = [f"{forward.names(v)}: {note}" for v, note in notes.items() if note]
        out = print_body([Stmt(f"def forward({head}):")], 4)
        out += textwrap.wrap(", ".join(typed), WIDTH, initial_indent="        # ", subsequent_indent="        # ", break_long_words=False)
        out += print_body([Stmt(text) for text in checks], 8)
        statements = forward.statements()
        out += ([""] if checks and statements else []) + print_body(statements, 8)
        last = signature.returned(self.program.output) if root else forward.returned()
        out += print_body([Stmt(last)], 8) if last else [] if statements else ["        pass"]
        return out


def _axis_refs(tree: object) -> Iterator[str]:
    if isinstance(tree, AxisRef):
        yield tree.name
    elif isinstance(tree, (tuple, list)):
        for x in tree:
            yield from _axis_refs(x)
    elif isinstance(tree, dict):
        for x in tree.values():
            yield from _axis_refs(x)
