"""build: fold a flat Recording into a Graph of blocks: drop dead ops, find what aliases, choose blocks, number values.
Must not know how the trace was recorded, nor rules or plans. Which regions become blocks is regions.py.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from autopar.ir import graph as ir
from autopar.ir.codec import tensor_digest
from autopar.ir.graph import Argument, Block, Call, Context, Global, Graph, Guard, Op, Param, Ref, Source, Struct, Tensor, Value
from autopar.trace.recording import Enter, Exit, RecordedGuard, RecordedOp, Recording
from autopar.trace.regions import Flow, Item, Region, candidates, input_name, keep_repeated, relative, repeated, tidy

# NB: removing a random call shifts the random stream for all calls after it, so these stay even if nobody uses the result.
RANDOM = re.compile(
    r"(feature_)?(alpha_)?dropout[123]?d?|native_dropout|rrelu|rand(n|int)?(_like)?|randperm|bernoulli|multinomial|poisson|binomial"
    r"|(log_|trunc_)?normal|uniform|random|exponential|geometric|cauchy|gumbel_softmax|fractional_max_pool[23]d"
)
NORMS = frozenset(["batch_norm", "instance_norm"])  # their running statistics are a matter of the op's own rule
TENSORS = ("param", "buffer", "constant")
SET_BUFFER = "autopar:set_buffer"


def build(recording: Recording) -> Graph:
    """The graph of a recording. Raises nothing for a well-formed recording; malformed ones fail an assertion."""
    return _Builder(recording).graph()


def short_name(fn: str) -> str:
    """'torch.nn.functional.linear' -> 'linear', 'torch.Tensor.__getitem__' -> 'getitem', 'apply:pkg.mod:Class' -> 'Class'."""
    parts = [p for p in re.split(r"[.:]", fn) if p]
    if fn.startswith("torch.ops.") and len(parts) > 3:
        return parts[3]
    while len(parts) > 1 and parts[-1] in ("__get__", "__set__", "__call__", "apply"):
        parts.pop()
    name = parts[-1]
    return name[2:-2] if name.startswith("__") and name.endswith("__") and len(name) > 4 else name


def is_random(op: RecordedOp) -> bool:
    name = short_name(op.fn)
    if name == "scaled_dot_product_attention":
        return (op.args[4] if len(op.args) > 4 else op.kwargs.get("dropout_p", 0.0)) != 0.0
    return RANDOM.fullmatch(name.removesuffix("_")) is not None


def class_name(cls: str) -> str:
    """A valid Python class name for a qualified class or function name: 'a.b:Foo' -> 'Foo', 'm.run_block' -> 'RunBlock'."""
    last = re.sub(r"\W", "_", re.split(r"[.:]", cls.replace(".<locals>", ""))[-1]).strip("_") or "Block"
    if last[0].islower() or last[0].isdigit():
        last = "".join(p[:1].upper() + p[1:] for p in last.split("_")) if not last[0].isdigit() else f"Block{last}"
    return last + "_" if keyword.iskeyword(last) else last


class _Interner:
    """Small numbers for hashable keys: equal keys, equal numbers."""

    def __init__(self) -> None:
        self.known: dict[Any, int] = {}

    def __call__(self, key: Any) -> int:
        return self.known.setdefault(key, len(self.known))


def _freeze(tree: Any, found: list[int]) -> Any:
    """A hashable image of a tree without its value ids, which are appended to `found`."""
    if type(tree) is Ref:
        found.append(tree.id)
        return Ref
    if isinstance(tree, (tuple, list)):
        return (type(tree).__name__, *[_freeze(x, found) for x in tree])
    if isinstance(tree, dict):
        return ("dict", *[(repr(k), _freeze(v, found)) for k, v in tree.items()])
    if isinstance(tree, slice):
        return ("slice", *[_freeze(x, found) for x in (tree.start, tree.stop, tree.step)])
    if isinstance(tree, Struct):
        return (tree.cls, tree.names, *[_freeze(x, found) for x in tree.items])
    # NB: repr tells apart what == does not (0.0 and -0.0, 1 and True) and makes nan equal to itself.
    return None if tree is None else tree if isinstance(tree, Global) else (type(tree).__name__, repr(tree))


class _Builder:
    def __init__(self, rec: Recording) -> None:
        self.rec = rec
        self.values = rec.values
        self.outputs = list(dict.fromkeys(r.id for r in ir.refs(rec.output)))
        self.lasting = {v.storage for v in rec.values if v.kind == "tensor" and v.origin in (*TENSORS, "input")}
        self.same = self._one_value_per_tensor()
        self.root, items = self._regions()
        self.live = self._live(items)
        self._mark_whole()
        for region in _walk(self.root):
            region.content = [c for c in region.content if isinstance(c, Region) or id(c) in self.live_ids]
        self.rank = {t.name: i for i, t in enumerate(rec.tensors)}
        self.info = {t.name: t for t in rec.tensors}
        made = {v for item in self.live for v in item.defs}
        self.tensors = {i: v.qualified for i, v in enumerate(self.values) if i not in made and v.origin in TENSORS}
        known = made | self.tensors.keys() | set(rec.inputs)
        for item in self.live:
            for v in item.uses:
                assert v in known, f"value %{v} ({self.values[v].name}) is used at {item.event.src} but nothing makes it"
        self.metas = _Interner()
        self.digests: dict[str, str] = {}

    # ---- the flat program ------------------------------------------------------------------------------------

    def _one_value_per_tensor(self) -> dict[int, int]:
        """Later values of a tensor the recording met twice, mapped to the first."""
        first: dict[str, int] = {}
        out = {}
        for i, v in enumerate(self.values):
            if v.origin in TENSORS and first.setdefault(v.qualified, i) != i:
                out[i] = first[v.qualified]
        return out

    def _regions(self) -> tuple[Region, list[Item]]:
        """The region tree with all ops in it, and the ops in order."""
        root: Region | None = None
        stack: list[Region] = []
        paths: list[str] = []
        items: list[Item] = []
        defined: set[int] = set(self.rec.inputs)
        for e in self.rec.events:
            if isinstance(e, Enter):
                names = {self.same.get(v, v): n for v, n in reversed(e.inputs)}
                r = Region("" if not stack else e.path, e.cls, e.recompute, named=not e.recompute, names=names)
                if stack:
                    stack[-1].content.append(r)
                root = root or r
                stack.append(r)
                paths.append((paths[-1] if paths else "") if e.recompute else r.path)
            elif isinstance(e, Exit):
                stack.pop().results = {v: n for v, n in zip(e.out, e.names, strict=False) if v is not None}
                paths.pop()
            else:
                assert stack, "an op outside of the root module's call"
                item = self._item(e, paths[-1], defined)
                stack[-1].content.append(item)
                items.append(item)
        assert root is not None and not stack, "Enter and Exit do not pair up"
        return root, items

    def _item(self, e: RecordedOp | RecordedGuard, path: str, defined: set[int]) -> Item:
        if isinstance(e, RecordedGuard):
            return Item(e, path, tuple(r.id for r in ir.refs(e.value)), ())
        made = dict.fromkeys(r.id for r in ir.refs(e.out))
        made.update(dict.fromkeys(new for _, new in e.writes))
        # NB: a second definition with the qualified name of a buffer is its new version, not the buffer itself.
        for v in made:
            assert v not in defined, f"value %{v} ({self.values[v].name}) is defined twice, by {e.fn} at {e.src}"
            self.same.pop(v, None)
            defined.add(v)
        return Item(e, path, tuple(r.id for r in ir.refs((e.args, e.kwargs))), tuple(made), e.writes)

    def _live(self, items: list[Item]) -> list[Item]:
        """Items that matter, in order, with the writes that matter."""
        values = self.values
        needed = set(self.outputs) | {v for _, v in self.rec.buffers_set}
        out: list[Item] = []
        for item in reversed(items):
            e = item.event
            if isinstance(e, RecordedOp):
                seen = any(v in needed for v in item.defs) or any(values[old].storage in self.lasting for old, _ in e.writes)
                if not (seen or e.effect or is_random(e)):
                    continue
                read = set(item.uses)
                item.writes = tuple((old, new) for old, new in e.writes if new in needed or old in read)
                item.uses += tuple(old for old, _ in item.writes if old not in read)
                shown = dict.fromkeys(r.id for r in ir.refs(e.out))
                item.defs = tuple(dict.fromkeys([*shown, *(new for _, new in item.writes)]))
            needed.update(item.uses)
            out.append(item)
        out.reverse()
        self.live_ids = {id(i) for i in out}
        return out

    def _mark_whole(self) -> None:
        """Find memory that is written while something else sees it; every op that makes a value there stays whole."""
        values = self.values
        shared: set[int] = set()
        for item in self.live:
            if item.writes and short_name(item.event.fn) not in NORMS:  # type: ignore[union-attr]
                hit = Counter(values[old].storage for old in {old for old, _ in item.writes})
                shared |= {s for s, n in hit.items() if n > 1 or s in self.lasting}
        for item in self.live:
            item.whole = any(values[v].storage in shared and values[v].kind == "tensor" for v in item.defs)

    # ---- blocks ----------------------------------------------------------------------------------------------

    def graph(self) -> Graph:
        rec = self.rec
        if self.same:
            self._rename_duplicates()
        tidy(self.root)
        candidates(self.root)
        for item in self.live:
            self._fix(item)
        names = {n for t in rec.tensors for full in (t.name, *t.aliases) for n in _prefixes(full)}
        names |= {r.path for r in _walk(self.root)}
        flow = Flow(self.root, self.values, names)
        self._settle(flow)
        if tried := repeated(self.root):
            for r in tried:
                r.block = True
            self._settle(flow)
            keep_repeated(tried, flow.order)
            self._settle(flow)
        renamed = self._rename_constants(flow, names)
        return self._emit(flow, renamed)

    def _settle(self, flow: Flow) -> None:
        """Lay blocks out and compare them until no region has to be demoted."""
        while True:
            while not flow.layout():
                pass
            self._set_buffers(flow)
            flow.own(self.tensors)
            flow.cross(self.tensors, [*self.rec.inputs, *self.outputs])
            self.root.ins = dict.fromkeys(self.rec.inputs)
            flow.classify(self._describe, self.tensors, self._traits)
            if not flow.disagree():
                return

    def _rename_duplicates(self) -> None:
        to = lambda r: Ref(self.same.get(r.id, r.id))  # noqa: E731
        pick = lambda ids: tuple(self.same.get(v, v) for v in ids)  # noqa: E731
        for item in self.live:
            e = item.event
            item.uses = pick(item.uses)
            if isinstance(e, RecordedOp):
                item.event = replace(e, args=ir.map_refs(e.args, to), kwargs=ir.map_refs(e.kwargs, to))
                item.writes = tuple((self.same.get(a, a), b) for a, b in item.writes)
            else:
                item.event = replace(e, value=ir.map_refs(e.value, to))
        self.rec = replace(self.rec, output=ir.map_refs(self.rec.output, to))
        self.outputs = list(dict.fromkeys(pick(self.outputs)))

    def _fix(self, item: Item) -> None:
        """Number what an item is apart from its value ids and path."""
        e, found = item.event, []
        if isinstance(e, RecordedGuard):
            key: Any = ("guard", _freeze(e.value, found), e.read, _freeze(e.expected, found))
        else:
            key = (e.fn, _freeze(e.args, found), _freeze(e.kwargs, found), _freeze(e.out, found), e.ctx, e.training, item.whole)
            found += [v for pair in item.writes for v in pair]
        item.refs = tuple(found)
        item.static = self.metas((key, e.src.file, e.src.line, len(item.writes), tuple(map(self._describe, item.defs))))

    def _describe(self, v: int) -> int:
        x = self.values[v]
        return self.metas((x.kind, x.shape, x.dtype, x.grad))

    def _traits(self, v: int) -> tuple[Any, ...]:
        t = self.info[self.tensors[v]]
        content = self._digest(t.name) if t.kind == "constant" else ""
        return (t.kind, t.shape, t.dtype, t.grad, t.persistent, self._describe(v), content)

    def _digest(self, name: str) -> str:
        if name not in self.digests:
            t = self.rec.constants.get(name)
            self.digests[name] = name if t is None else tensor_digest(t)
        return self.digests[name]

    def _set_buffers(self, flow: Flow) -> None:
        """`self.buf = tensor` goes to the end of the innermost block that makes the tensor and has the buffer."""
        if not self.rec.buffers_set:
            return
        makers = {v: item for item in flow.items for v in item.defs}
        for name, v in self.rec.buffers_set:
            v = self.same.get(v, v)
            block = flow.home.get(v, self.root)
            while block is not self.root and not (block.named and name.startswith(block.path + ".")):
                block = block.up or self.root
            maker = makers.get(v)
            src = maker.event.src if maker else Source("", 0, "", "")
            ctx = maker.event.ctx if maker and isinstance(maker.event, RecordedOp) else None
            op = RecordedOp(SET_BUFFER, (relative(block.path, name), Ref(v)), {}, None, src, ctx or Context(), effect=True)
            item = Item(op, name.rpartition(".")[0], (v,), (), block=block)
            self._fix(item)
            block.tail.append(item)

    def _rename_constants(self, flow: Flow, names: set[str]) -> dict[str, str]:
        """Number constants anew in each instance, so that equal instances have equal names."""
        renamed: dict[str, str] = {}
        count: Counter[str] = Counter()
        for block in flow.order:
            for v in block.params:
                name = self.tensors[v]
                if self.info[name].kind != "constant" or name in renamed:
                    continue
                base = ir.join(block.path, "constant")
                while (new := f"{base}{count[base]}") in names and new not in self.rec.constants:
                    count[base] += 1
                renamed[name] = new
                count[base] += 1
        return renamed

    # ---- the graph -------------------------------------------------------------------------------------------

    def _emit(self, flow: Flow, renamed: dict[str, str]) -> Graph:
        rec = self.rec
        first: dict[int, Region] = {}
        addresses: dict[int, dict[str, None]] = {}
        for r in flow.order:
            first.setdefault(r.klass, r)
            addresses.setdefault(r.klass, {})[r.address] = None
        root_name, taken = class_name(rec.module), Counter({class_name(rec.module): 1})
        label: dict[int, str] = {self.root.klass: root_name}
        for k, r in first.items():
            if k not in label:
                base = class_name(r.cls)
                label[k] = base
                while taken[label[k]]:
                    label[k] = f"{base}_{taken[base]}"
                    taken[base] += 1
                taken[label[k]] += 1
        blocks: dict[str, Block] = {}
        local: dict[int, int] = {}
        for k, r in first.items():
            blocks[label[k]], local = self._block(r, label, renamed, tuple(addresses[k]))
        assert next(reversed(blocks)) == root_name
        here = lambda x: Ref(local[x.id])  # noqa: E731
        arguments = tuple(replace(a, tree=ir.map_refs(a.tree, here)) if isinstance(a, Argument) else a for a in rec.arguments)
        used = [t for t in rec.tensors if t.kind != "constant" or t.name in renamed]
        tensors: tuple[Tensor, ...] = tuple(replace(t, name=renamed.get(t.name, t.name)) for t in used)
        constants = {renamed[n]: t for n, t in rec.constants.items() if n in renamed}
        output = ir.map_refs(rec.output, here)
        return Graph(
            root_name, blocks, tensors, arguments, output, rec.folded, rec.training, rec.warnings, rec.module, constants, rec.branch
        )

    def _block(self, r: Region, label: dict[int, str], renamed: dict[str, str], instances: tuple[str, ...]) -> tuple[Block, dict[int, int]]:
        """The block of a class from one of its regions, and the ids of the recording's values in it."""
        params = sorted(r.params, key=lambda v: self.rank[self.tensors[v]])
        made = (v for e in [*r.body, *r.tail] for v in (e.outs if isinstance(e, Region) else e.defs))
        local = {v: i for i, v in enumerate(dict.fromkeys([*r.ins, *params, *made]))}
        here = lambda x: Ref(local[x.id])  # noqa: E731
        pairs = lambda writes: tuple((local[a], local[b]) for a, b in writes)  # noqa: E731
        fresh = _unique()
        ops: list[Op | Call | Guard] = []
        for e in [*r.body, *r.tail]:
            if isinstance(e, Region):
                args, out = (tuple(local[v] for v in vs) for vs in (e.ins, e.outs))
                ops.append(Call(e.id, label[e.klass], args, out, pairs(e.writes)))
                continue
            x, path = e.event, relative(r.path, e.path)
            if isinstance(x, RecordedGuard):
                ops.append(Guard(fresh(f"{path}/guard"), ir.map_refs(x.value, here), x.read, x.expected, path, x.src))
                continue
            op_id = fresh(f"{path}/{short_name(x.fn)}")
            args, kwargs, out = ir.map_refs(x.args, here), ir.map_refs(x.kwargs, here), ir.map_refs(x.out, here)
            ops.append(Op(op_id, x.fn, args, kwargs, out, path, x.src, x.ctx, pairs(e.writes), e.whole, x.training))
        values = []
        called = {v: n for e in r.body if isinstance(e, Region) for v in e.outs if (n := e.results.get(v))}
        for v, i in local.items():
            x = self.values[v]
            values.append(Value(i, called.get(v, x.name), x.kind, tuple(x.shape), x.dtype, x.grad))
        outs = self.outputs if r is self.root else r.outs
        named = []
        for v in params:
            name = self.tensors[v]
            named.append(Param(relative(r.path, renamed.get(name, name)), local[v], self.info[name].kind))
        ids = lambda vs: tuple(local[v] for v in vs)  # noqa: E731
        names = tuple(input_name(r, v) for v in r.ins) if r is not self.root else ()
        names = names if any(names) else ()
        block = Block(label[r.klass], r.cls, ids(r.ins), ids(outs), tuple(named), tuple(values), tuple(ops), r.recompute, instances, names)
        return block, local


def _walk(region: Region) -> Iterator[Region]:
    yield region
    for c in region.content:
        if isinstance(c, Region):
            yield from _walk(c)


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    for i in range(len(parts)):
        yield ".".join(parts[: i + 1])


def _unique() -> Callable[[str], str]:
    """Makes ids unique: 'a/linear', 'a/linear#1', ..."""
    seen: Counter[str] = Counter()

    def fresh(name: str) -> str:
        n = seen[name]
        seen[name] += 1
        return f"{name}#{n}" if n else name

    return fresh
