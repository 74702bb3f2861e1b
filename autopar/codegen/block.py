"""block: the forward of one lowered block, statement by statement.
Must not know the classes around it (classes.py) nor the signature of the root (signature.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from autopar.codegen.expr import MUL, Code, Imports, Printer, attribute, string, tree_refs
from autopar.codegen.layout import Stmt, long_where
from autopar.codegen.loops import Loop, base_path, find_loops
from autopar.codegen.names import Names, defines, uses
from autopar.codegen.reading import AROUND, AROUND_GRAD, join_scopes, operand_names, sections, shard_arguments, type_note
from autopar.ir.graph import Context, Guard, Ref, Source
from autopar.ir.mesh import Mesh
from autopar.ir.types import TABLE
from autopar.lower.program import Convert, Invoke, Local, LoweredBlock

FREE_BYTES = 1 << 20  # a dead tensor of this size is worth a `del`
ACTIONS = {"all_reduce": "all-reduce", "reduce_scatter": "reduce-scatter", "all_gather": "all-gather", "all_to_all": "all-to-all",
           "slice": "slice", "place": "place into zeros", "keep_first": "keep on the first rank"}  # fmt: skip


@dataclass(frozen=True)
class Surroundings:
    """What a forward needs to know of the file around it."""

    mesh: Mesh
    imports: Imports
    recompute: frozenset[str]  # names of blocks to be called under ap.checkpoint
    axis: Callable[[str], str]
    list_length: Callable[[str], int]  # children of a module list, by path relative to this block; 0 if they are not 0..n-1
    set_buffers: frozenset[str]  # parameters of this block that are buffers replaced by any block
    guards: bool
    hints: dict[int, str]
    free_bytes: int = FREE_BYTES
    training: bool = True  # mode while tracing


class Forward:
    """Makes the statements of one block. Call `bind` for the inputs first, then `statements`."""

    def __init__(self, block: LoweredBlock, around: Surroundings) -> None:
        self.block, self.around, self.mesh = block, around, around.mesh
        if not around.guards:
            block = replace(block, body=tuple(_without_guards(block)))
        self.items = find_loops(block)
        self.names = Names(block, self.items, around.imports.taken, around.hints)
        self.printer = Printer(around.imports, self.names, around.axis, around.training)
        self.sections = sections(self.items)
        self.stmts: list[Stmt] = []
        self.inlined: dict[int, str] = {}  # guard -> the comparison it reads
        self.uses = Counter(v for item in self.items for v in uses(item)) + Counter(block.outputs)
        self._scope_end = self._frame_ends()
        self._made: dict[str, tuple[int, int]] = {}  # variable -> (number of statements after it was last assigned, item that did)
        self._frames: dict[str, tuple[Any, ...]] = {}  # variable -> frame of the user's program it was assigned in
        for p in block.params:
            if p.name not in around.set_buffers:
                self.names.bind(p.value, attribute("self", p.name))

    def statements(self) -> list[Stmt]:
        """All statements but the return."""
        for p in self.block.params:
            if p.name in self.around.set_buffers:
                self.add(f"{self.names.assign(p.value, -1)} = {attribute('self', p.name)}", self.note((p.value,)))
        for i, item in enumerate(self.items):
            self._free(i)
            if isinstance(item, Local):
                self._local(i, item)
            elif isinstance(item, Convert):
                self._convert(i, item)
            elif isinstance(item, Invoke):
                self._invoke(i, item)
            elif isinstance(item, Loop):
                self._loop(i, item)
            else:
                self._guard(i, item)
        return join_scopes(self.stmts)

    def returned(self) -> str:
        """The return statement of a block that is not the root."""
        outs = [self.names(v) for v in self.block.outputs]
        return f"return {', '.join(outs)}" if outs else ""

    def add(self, text: str, note: str = "", **kwargs: Any) -> None:
        self.stmts.append(Stmt(text, note, **kwargs))

    # -- ops

    def _local(self, i: int, op: Local) -> None:
        code = self.printer.call(op.fn, op.args, op.kwargs)
        if self._only_guarded(i, op):
            self.inlined[i + 1] = code.text
            return
        src, where = op.src, {"section": self.sections[i], "scopes": self._scopes(op)}
        written = {new for _, new in op.writes}
        outs = list(dict.fromkeys(tree_refs(op.out)))
        fresh = [v for v in outs if v not in written and self.names.used(v)]
        tensors = [v for v in fresh if self.value(v).kind == "tensor"]
        if code.statement or not fresh:
            self.add(code.text, src=src, **where)
            return
        # NB: `code` keeps the old name, which holds the value until this statement assigns it.
        self._make_way(i, fresh, section=where["section"])
        if isinstance(op.out, Ref):
            for factor, sign, wanted in ((op.divide, "/", bool(tensors)), (op.times, "*", not tensors)):
                if factor != 1 and wanted:
                    code = Code(f"{code.at(MUL)} {sign} {factor}", MUL)
            target = self.names.assign(op.out.id, i)
            if target != code.text:
                self.add(f"{target} = {code.text}", self.note(tensors), src=src, **where)
        else:
            target, later = self._target(op.out, i, written)
            target = f"({target})" if len(target) > 80 else target
            self.add(f"{target} = {code.text}", self.note(tensors), src=src, **where)
            for text in later:
                self.add(text, src=src, **where)
            for v in fresh:
                factor, sign = (op.divide, "/") if v in tensors else (op.times, "*")
                if factor != 1:
                    self.add(f"{self.names(v)} = {self.names(v)} {sign} {factor}", src=src, **where)
        self._remember(i, fresh)

    def _only_guarded(self, i: int, op: Local) -> bool:
        """Whether the op is a comparison of numbers that only the guard after it reads."""
        guard = self.items[i + 1] if i + 1 < len(self.items) else None
        if not (isinstance(guard, Guard) and isinstance(op.out, Ref) and guard.value == op.out and guard.read in ("bool", "item")):
            return False
        value = self.value(op.out.id)
        return value.kind == "scalar" and value.dtype == "bool" and self.uses[op.out.id] == 1 and op.times == 1

    def _target(self, tree: Any, i: int, written: set[int], top: bool = True) -> tuple[str, list[str]]:
        """The left side of an assignment that unpacks a tree, and further assignments for what cannot be unpacked."""
        if isinstance(tree, Ref):
            keep = tree.id not in written and self.names.used(tree.id)
            return (self.names.assign(tree.id, i) if keep else "_"), []
        if isinstance(tree, (tuple, list)) and tree and any(True for _ in tree_refs(tree)):
            parts = [self._target(x, i, written, False) for x in tree]
            text = ", ".join(p for p, _ in parts) + ("," if len(parts) == 1 else "")
            return (text if top and len(parts) > 1 else f"({text})"), [line for _, more in parts for line in more]
        if isinstance(tree, dict) and any(self.names.used(v) for v in tree_refs(tree)):
            name = self.names.scratch("out", i)
            lines = []
            for key, x in tree.items():
                target, more = self._target(x, i, written)
                if target != "_":
                    lines += [f"{target} = {name}[{self.printer.code(key).text}]", *more]
            return name, lines
        return "_", []

    def _scopes(self, op: Local) -> tuple[str, ...]:
        scopes = ["if self.training:"] if op.training else []
        scopes += self._context(op.ctx)
        if op.rng:
            self.around.imports.used.add("ap")
            scopes.append(f"with ap.random_streams({', '.join(self.around.axis(a) for a in op.rng)}):")
        return tuple(scopes)

    def _context(self, ctx: Context) -> list[str]:
        if not ctx.grad or ctx.autocast:
            self.around.imports.used.add("torch")
        lines = [] if ctx.grad else ["with torch.no_grad():"]
        for device, dtype, enabled in ctx.autocast:
            # NB: a model traced on one kind of device runs on another: autocast follows the module's own device.
            where = "self.device.type" if len(ctx.autocast) == 1 else string(device)
            lines.append(f"with torch.autocast({where}, {f'dtype=torch.{dtype}' if enabled else 'enabled=False'}):")
        return lines

    # -- conversions, calls, guards

    def _convert(self, i: int, c: Convert) -> None:
        self.around.imports.used.add("ap")
        src, section = self._next_place(i)
        dims = "".join(shard_arguments(a) for a in (c.src, c.dst))
        fn = f"{c.src.kind}_to_{c.dst.kind}".lower()
        text = f"ap.{fn}({self.names(c.value)}, {self.around.axis(c.axis)}{dims}){'.clone()' if c.copy else ''}"
        forward, backward = TABLE[c.src.kind, c.dst.kind]
        notes = [self.note((c.out,)), ACTIONS.get(forward, "")]
        if self.value(c.out).grad and backward in ACTIONS:
            notes.append(f"backward {ACTIONS[backward]}")
        note = "; ".join(filter(None, notes))
        scopes = AROUND if not self.value(c.out).grad else AROUND_GRAD
        if not self.names.used(c.out):
            self.add(text, note, src=src, section=section, scopes=scopes)
            return
        suffix = f"{c.dst.kind}{c.dst.dim if c.dst.kind == 'S' else ''}".lower()
        self.add(f"{self.names.assign(c.out, i, suffix)} = {text}", note, src=src, section=section, scopes=scopes)
        self._remember(i, (c.out,))

    def _invoke(self, i: int, call: Invoke) -> None:
        text = self._call(attribute("self", base_path(call.id)), call.block, [self.names(a) for a in call.args])
        written = {new for _, new in call.writes}
        used = [v for v in call.out if v not in written and self.names.used(v)]
        targets = [self.names.assign(v, i) if v in used else "_" for v in call.out]
        self.add(f"{', '.join(targets)} = {text}" if used else text, self.note(used))
        self._remember(i, used)

    def _call(self, callee: str, block: str, args: list[str]) -> str:
        if block in self.around.recompute:
            self.around.imports.used.add("ap")
            return f"ap.checkpoint({', '.join([callee, *args])})"
        return f"{callee}({', '.join(args)})"

    def _loop(self, i: int, loop: Loop) -> None:
        carried = loop.carried()
        starts = [self.names(values[0]) for values in carried]
        for values, start in zip(carried, starts, strict=True):
            if self.names.cell(values[0]) != self.names.cell(values[1]):
                self.add(f"{self.names.assign(values[1], i - 1)} = {start}")
        inside = {p: self.names(values[1]) for (p, _), values in zip(loop.carry, carried, strict=True)}
        first = loop.calls[0]
        args = [inside.get(p) or self.names(a) for p, a in enumerate(first.args)]
        outs = {q: self.names(values[1]) for (_, q), values in zip(loop.carry, carried, strict=True)}
        targets = [outs.get(q, "_") for q in range(len(first.out))]
        path = base_path(first.id)
        parent, _, leaf = path.rpartition(".")
        if path == base_path(loop.calls[1].id):
            head, callee = f"for _ in range({len(loop.calls)}):", attribute("self", path)
        else:
            callee = self.names.scratch(_singular(parent), i)
            whole = int(leaf) == 0 and self.around.list_length(parent) == len(loop.calls)
            items = attribute("self", parent) + ("" if whole else f"[{leaf}:{int(leaf) + len(loop.calls)}]")
            head = f"for {callee} in {items}:"
        note = self.note([values[-1] for values in carried])
        line = f"{', '.join(targets)} = {self._call(callee, first.block, args)}" + (f"  # {note}" if note else "")
        self.add(head, body=(line,))
        self._remember(i, [values[-1] for values in carried])

    def _guard(self, i: int, g: Guard) -> None:
        self.around.imports.used.add("ap")
        actual = self.inlined.get(i) or self.printer.read(g.read, g.value)
        expected = self.printer.code(g.expected).text
        text = " ".join(g.src.text.split())
        self.add(
            f"ap.guard({actual}, {expected}, {string(long_where(g.src))}, {string(text)}, self.guards)",
            src=g.src,
            section=self.sections[i],
        )

    # -- the user's other names

    def _make_way(self, i: int, values: Iterable[int], **where: Any) -> None:
        """Where the user kept an old value under another name (`residual = hidden_states`), so does the generated code."""
        for v in values:
            if self.names.known(v):
                continue
            held = self.names.holder(self.names.hint(v), i)
            other = self._other_name(i, held) if held is not None else None
            if held is not None and other is not None and not self.names.busy(other, i - 1) and self.names.loose(held):
                self._alias(held, other, **where)

    def _alias(self, held: int, other: str, **where: Any) -> None:
        """`other = name`, right after the value was made where the other name is unused since then."""
        name = self.names(held)
        at, item = self._made.get(name, (0, -1))
        if self._made.get(other, (-1, -1))[0] < at and not self.names.busy(other, item):
            self.stmts.insert(at, Stmt(f"{other} = {name}", section=self.stmts[at - 1].section if at else None, scopes=AROUND))
            self._made = {n: (k + (k > at), j) for n, (k, j) in self._made.items()}
        else:
            self.add(f"{other} = {name}", scopes=AROUND, **where)
        self.names.rebind(held, other)
        self._made[other] = (at, item)

    def _other_name(self, i: int, held: int) -> str | None:
        """What a later line of the user's program calls the value: the operand in its place of `residual + hidden_states`."""
        name = self.names(held)
        for item in self.items[i + 1 :]:
            if not isinstance(item, Local) or len(item.args) < 2:
                continue
            for operand, arg in zip(operand_names(item.src.text), item.args, strict=False):
                if isinstance(arg, Ref) and self.names.cell(arg.id) == held and operand not in ("", name):
                    return operand
        return None

    # -- notes

    def value(self, v: int) -> Any:
        return self.block.values[v]

    def note(self, values: Iterable[int]) -> str:
        """The types of values as a comment; empty where all are I on every axis."""
        texts = [type_note(self.value(v).type, self.mesh) for v in values if self.value(v).kind == "tensor"]
        if not any(texts):
            return ""
        return texts[0] if len(set(texts)) == 1 else ", ".join(t or "I" for t in texts)

    def _next_place(self, i: int) -> tuple[Source | None, str | None]:
        """A conversion is shown with the op it is made for: the next one."""
        for j in range(i + 1, len(self.items)):
            item = self.items[j]
            if isinstance(item, (Local, Guard)):
                return item.src, self.sections[j]
            if not isinstance(item, Convert):
                break
        return None, None

    # -- memory

    def _frame_ends(self) -> dict[tuple[Any, ...], int]:
        """Last statement of every frame (module, function) of the user's program; its locals end there."""
        return {frame: i for i in range(len(self.items)) if (frame := self._frame(i))}

    def _frame(self, i: int) -> tuple[Any, ...] | None:
        item = self.items[i]
        return (self.sections[i], item.src.file, item.src.function) if isinstance(item, Local) else None

    def _remember(self, i: int, values: Iterable[int]) -> None:
        frame = self._frame(i)
        self._made.update((self.names(v), (len(self.stmts), i)) for v in values if self.names.known(v))
        for v in values:
            if frame and self.names.known(v):
                self._frames[self.names(v)] = frame
            else:
                self._frames.pop(self.names(v), None)

    def _free(self, i: int) -> None:
        """`del` for large dead tensors whose frame has ended, unless the name is about to be assigned anyway."""
        if i > len(self.items) - 3:
            return
        soon = {self.names.hint(v) for item in self.items[i : i + 4] for v in defines(item)}
        dead = []
        for name, value in list(self.names.held()):
            frame = self._frames.get(name)
            size = math.prod(value.shape) * _item_size(value.dtype) if value.kind == "tensor" else 0
            over = frame is not None and self._scope_end[frame] < i and self.names.dies(value.id) < i
            if over and size >= self.around.free_bytes and name not in soon:
                dead.append(name)
        for name in dead:
            self.names.forget(name)
        for k in range(0, len(dead), 6):
            self.add(f"del {', '.join(dead[k : k + 6])}", scopes=AROUND)


def _singular(path: str) -> str:
    word = path.rpartition(".")[2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else "block"


def _item_size(dtype: str) -> int:
    return getattr(torch, dtype).itemsize if dtype not in ("int", "float", "bool") else 1


def _without_guards(block: LoweredBlock) -> list[Any]:
    """The body without guards, and without what only they needed."""
    feeds: set[int] = {v for g in block.body if isinstance(g, Guard) for v in tree_refs(g.value)}
    kept: list[Any] = []
    needed = set(block.outputs)
    for item in reversed(block.body):
        if isinstance(item, Guard):
            continue
        outs, ins = set(defines(item)), set(uses(item))
        pure = isinstance(item, Convert) or (isinstance(item, Local) and not item.writes and not item.rng)
        if pure and outs and not outs & needed and outs & feeds:
            feeds |= ins
            continue
        needed |= ins | {old for old, _ in getattr(item, "writes", ())}
        kept.append(item)
    return kept[::-1]
