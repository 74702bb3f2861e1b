"""Which module calls of a trace become blocks: the region tree, the choice, data flow across blocks, equality of blocks.
Must not know how the trace was recorded, nor what a finished Block looks like (build.py writes those).

A region becomes a block (a class of the generated code) if it is
  1. a recompute region (torch.utils.checkpoint). One that is the whole of a module call stands for that module; any other
     has no module of its own: it owns no parameters and all module calls in it are inlined;
  2. a call of an element of a ModuleList or Sequential (last path component is a number) with >= 4 ops, unless all it does is
     to call one other block;
  3. a call outside of the above with >= 8 ops that has a structurally equal sibling, torch.nn leaves excepted.
All calls of one module instance must come out equal and in one enclosing block, otherwise they are inlined.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from autopar.ir.graph import join
from autopar.trace.recording import RecordedGuard, RecordedOp

MIN_ELEMENT_OPS = 4
MIN_REPEATED_OPS = 8


@dataclass(eq=False, slots=True)
class Item:
    """A live op or guard with what the passes ask of it."""

    event: RecordedOp | RecordedGuard
    path: str  # module path, absolute
    uses: tuple[int, ...]
    defs: tuple[int, ...]
    writes: tuple[tuple[int, int], ...] = ()
    whole: bool = False
    static: int = -1  # equal numbers: equal up to value ids and paths
    refs: tuple[int, ...] = ()  # value ids in the order `static` has them
    block: Region | None = None


@dataclass(eq=False, slots=True)
class Instance:
    """A module instance whose calls are blocks. Several calls of one module share it."""

    path: str
    parent: Instance | None
    depth: int


@dataclass(eq=False, slots=True)
class Region:
    """A module call or checkpoint call; the fields below `block` are set by `analyse` where block is True."""

    path: str
    cls: str
    recompute: bool
    content: list[Any] = field(default_factory=list)  # Item | Region
    named: bool = True  # stands for a module call
    names: dict[int, str] = field(default_factory=dict)  # value -> what the module's forward calls it
    results: dict[int, str] = field(default_factory=dict)  # value -> what the caller calls it
    size: int = 0  # items inside, at any depth
    outer: str = ""  # path of the enclosing module
    block: bool = False
    barred: bool = False  # must not become a block (again)
    up: Region | None = None
    depth: int = 0
    inst: Instance | None = None
    id: str = ""  # Call.id
    address: str = ""  # absolute instance path
    body: list[Any] = field(default_factory=list)  # Item | Region
    tail: list[Item] = field(default_factory=list)  # buffers set at the end
    ins: dict[int, None] = field(default_factory=dict)
    outs: dict[int, None] = field(default_factory=dict)
    params: dict[int, None] = field(default_factory=dict)
    writes: tuple[tuple[int, int], ...] = ()
    klass: int = -1

    def reset(self, up: Region | None) -> None:
        self.up, self.depth = up, up.depth + 1 if up else 0
        self.body, self.tail, self.ins, self.outs, self.params = [], [], {}, {}, {}

    def demote(self) -> None:
        """Give up standing for a module: a recompute region becomes nameless, any other is inlined."""
        if self.recompute and self.named:
            self.named, self.path = False, self.outer
        else:
            self.block = False
        self.barred = True


def under(path: str, name: str) -> bool:
    """Whether name lies below path."""
    return not path or name.startswith(path + ".")


def relative(path: str, name: str) -> str:
    """name as seen from path; unchanged where it does not lie below."""
    if not path:
        return name
    return "" if name == path else name.removeprefix(path + ".")


def tidy(region: Region) -> None:
    """Measure regions, drop empty ones and let a recompute region that is the whole of a module call be that call."""
    content: list[Any] = []
    size = 0
    for c in region.content:
        if isinstance(c, Region):
            c.outer = region.path if region.named else region.outer
            tidy(c)
            if not c.size:
                continue
            size += c.size
        else:
            size += 1
        content.append(c)
    region.content, region.size = content, size
    while len(region.content) == 1 and isinstance(only := region.content[0], Region):
        if region.recompute and not region.named and only.named:
            region.path, region.cls, region.named, region.names, region.results = only.path, only.cls, True, only.names, only.results
        elif not (only.recompute and not only.named and region.path):
            break
        region.recompute, region.content = True, only.content


def input_name(region: Region, v: int) -> str:
    """What the user's program calls a live-in; for an element of a container, what a module inside calls it. '' if it is no argument."""
    own = region.names.get(v, "")
    if not own or own.isidentifier():
        return own
    todo = [c for c in region.content if isinstance(c, Region)]
    for c in todo:  # NB: grows
        if c.names.get(v, "").isidentifier():
            return c.names[v]
        todo += [x for x in c.content if isinstance(x, Region)]
    return re.sub(r"\W+", "_", own).strip("_")


def candidates(root: Region) -> None:
    """Mark blocks by rules 1 and 2; an element that only wraps another block is not one."""
    inner = [c for c in root.content if isinstance(c, Region)]
    for c in inner:
        candidates(c)
        last = c.path.rpartition(".")[2]
        c.block = c.recompute or (last.isdigit() and c.size >= MIN_ELEMENT_OPS and not wraps(c))
    root.block = True


def wraps(region: Region) -> bool:
    """Whether all that a call does is one call of a block."""
    while len(region.content) == 1 and isinstance(only := region.content[0], Region):
        if only.block:
            return True
        region = only
    return False


class Flow:
    """Blocks of a trace with the values that cross their borders. `values` are those of the recording."""

    def __init__(self, root: Region, values: list[Any], names: set[str]) -> None:
        self.root, self.values, self.names = root, values, names
        self.order: list[Region] = []  # blocks, callees first
        self.items: list[Item] = []
        self.define: dict[int, int] = {}  # value -> rank of its definition
        self.home: dict[int, Region] = {}  # value -> block that defines it
        self.next: dict[int, int] = {}  # value -> its version after the next write
        self.owner: dict[int, Instance] = {}

    def layout(self) -> bool:
        """Fill the bodies of blocks. False if a region had to be demoted."""
        self.order, self.items, self.define, self.home = [], [], {}, {}
        self.instances: dict[str, Instance] = {"": Instance("", None, 0)}
        self.calls: dict[str, list[Region]] = defaultdict(list)
        self.foreign: set[str] = set()  # modules with a call that could not be a block
        self.root.reset(None)
        self.root.inst = self.instances[""]
        self._fill(self.root, self.root, Counter())
        self.order.append(self.root)
        parents = {p: {id(r.up.inst) for r in rs if r.up} for p, rs in self.calls.items()}
        torn = [p for p, ups in parents.items() if len(ups) > 1 or p in self.foreign]
        for path in torn:
            for r in self.calls[path]:
                r.demote()
        return not torn

    def _fill(self, block: Region, region: Region, seen: Counter[str]) -> None:
        for c in region.content:
            if isinstance(c, Item):
                c.block = block
                block.body.append(c)
                self.items.append(c)
                for v in c.defs:
                    self.define[v], self.home[v] = len(self.define), block
                for old, new in c.writes:
                    self.next[old] = new
                continue
            if c.block and c.named and not (block.named and c.path and c.path != block.path and under(block.path, c.path)):
                self.foreign.add(c.path)
                c.demote()
            if not c.block:
                self._fill(block, c, seen)
                continue
            c.reset(block)
            self._identify(c, block, seen)
            block.body.append(c)
            self._fill(c, c, Counter())
            self.order.append(c)

    def _identify(self, c: Region, block: Region, seen: Counter[str]) -> None:
        """Id, address and instance of a call."""
        where = relative(block.path, c.path)
        assert block.inst is not None
        if not c.named:
            word = "checkpoint"
            while join(c.path, word) in self.names:
                word += "_"
            where = join(where, word)
        n = seen[where]
        seen[where] += 1
        if c.named:
            c.id, c.address = f"{where}#{n}" if n else where, join(block.address, where)
            if c.path not in self.instances:
                self.instances[c.path] = Instance(c.path, block.inst, block.inst.depth + 1)
            c.inst = self.instances[c.path]
            self.calls[c.path].append(c)
        else:
            c.id = f"{where}_{n}" if n else where
            c.address, c.inst = join(block.address, c.id), block.inst

    def own(self, tensors: dict[int, str]) -> None:
        """Each parameter, buffer and constant belongs to the innermost module instance that has all of its uses."""
        owner: dict[int, Instance] = {}
        for item in [*self.items, *(t for r in self.order for t in r.tail)]:
            inst = item.block.inst  # type: ignore[union-attr]
            for v in item.uses:
                if v in tensors:
                    a, b = owner.get(v, inst), inst
                    while a is not b:
                        if a.depth >= b.depth:  # type: ignore[union-attr]
                            a = a.parent  # type: ignore[union-attr]
                        else:
                            b = b.parent  # type: ignore[union-attr]
                    owner[v] = a  # type: ignore[assignment]
        for v, inst in owner.items():
            while not under(inst.path, tensors[v]):
                inst = inst.parent  # type: ignore[assignment]
            owner[v] = inst
        self.owner = owner

    def cross(self, tensors: dict[int, str], outputs: list[int]) -> None:
        """Live-ins, live-outs, parameters and in-place effects of every block."""
        for block in self.order:
            block.ins, block.outs, block.params = {}, {}, {}
        for item in self.items:
            for v in item.uses:
                self._use(v, item.block, tensors)  # type: ignore[arg-type]
        for block in self.order:
            for item in block.tail:
                for v in item.uses:
                    self._use(v, block, tensors)
        for v in outputs:
            self._use(v, self.root, tensors)
        for block in self.order:
            block.outs = dict.fromkeys(sorted(block.outs, key=self.define.__getitem__))
            block.writes = tuple(w for v in block.ins if (w := self._written(v, block)))

    def _use(self, v: int, block: Region, tensors: dict[int, str]) -> None:
        if v in tensors:
            owner = self.owner.get(v, self.root.inst)
            while not (block.inst is owner and block.named):
                if v in block.ins:
                    return
                block.ins[v] = None
                block = block.up  # type: ignore[assignment]
            block.params[v] = None
            return
        home = self.home.get(v, self.root)
        while home is not block:
            if home.depth >= block.depth:
                home.outs[v] = None
                home = home.up  # type: ignore[assignment]
            else:
                block.ins[v] = None
                block = block.up  # type: ignore[assignment]

    def _written(self, v: int, block: Region) -> tuple[int, int] | None:
        """The live-in and the version of it that the block leaves behind, where that is used later."""
        last = v
        while last in self.next and self._inside(self.home[self.next[last]], block):
            last = self.next[last]
        return (v, last) if last != v and last in block.outs else None

    @staticmethod
    def _inside(region: Region | None, block: Region) -> bool:
        while region is not None and region.depth > block.depth:
            region = region.up
        return region is block

    def classify(self, describe: Any, tensors: dict[int, str], traits: Any) -> None:
        """Number the classes of structurally equal blocks. describe(v) -> number of a value's shape, dtype, ...;
        traits(v) -> what a parameter must have equal."""
        classes: dict[Any, int] = {}
        for block in self.order:
            num: dict[int, int] = {}
            rel: dict[str, str] = {}
            key: list[Any] = [block.cls, block.recompute, block.named]
            for e in [*block.body, *block.tail]:
                if isinstance(e, Region):
                    refs = (*e.ins, *e.outs, *(x for w in e.writes for x in w))
                    head: tuple[Any, ...] = (-1, e.klass, e.id, len(e.ins))
                else:
                    refs = e.refs
                    if (path := rel.get(e.path)) is None:
                        path = rel[e.path] = relative(block.path, e.path)
                    head = (e.static, path)
                key.append((head, tuple([num.setdefault(v, len(num)) for v in refs])))
            key.append(tuple((num.setdefault(v, len(num)), describe(v)) for v in block.ins))
            for v in block.params:
                known = traits(v)
                # NB: constants are numbered anew in every instance, so their recorded names say nothing.
                key.append((num[v], "" if known[0] == "constant" else relative(block.path, tensors[v]), known))
            key.append(tuple(num[v] for v in block.outs))
            block.klass = classes.setdefault(tuple(key), len(classes))

    def disagree(self) -> bool:
        """Demote module instances whose calls differ in structure."""
        bad = [rs for rs in self.calls.values() if len({r.klass for r in rs}) > 1]
        for rs in bad:
            for r in rs:
                r.demote()
        return bool(bad)


def repeated(root: Region) -> list[Region]:
    """Candidates of rule 3, outermost first: calls outside of all blocks that have a look-alike."""
    found: list[Region] = []
    todo = [c for c in root.content if isinstance(c, Region)]
    while todo:
        level = [c for c in todo if not c.block]
        leaf = lambda c: c.cls.startswith("torch.nn.") and not any(isinstance(x, Region) for x in c.content)  # noqa: E731
        found += [c for c in level if c.size >= MIN_REPEATED_OPS and not (c.barred or not c.path or leaf(c) or wraps(c))]
        todo = [x for c in level for x in c.content if isinstance(x, Region)]
    count = Counter((c.cls, c.size) for c in found)
    return [c for c in found if count[c.cls, c.size] > 1]


def keep_repeated(tried: list[Region], order: list[Region]) -> None:
    """After classification: of the tried candidates keep the outermost that have an equal; the others are inlined."""
    count = Counter(r.klass for r in order)
    kept: set[int] = set()
    for r in tried:
        up, inside = r.up, False
        while up is not None:
            inside |= id(up) in kept
            up = up.up
        if r.block and count[r.klass] > 1 and not inside:
            kept.add(id(r))
    for r in tried:
        r.block = id(r) in kept
