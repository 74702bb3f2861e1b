"""Modes: a recording made right in the other mode too (train and eval), by comparing it with a recording made there.
Must not know how recordings are made, nor why a second one was (flags.py).

Both recordings get value numbers: equal numbers mean equal values, whatever the ops are called or in which order they ran.
The first is numbered as its generated code would run in the other mode: literals that rules/training.py makes depend on the
mode have their other value. Where a module call returns another value than in the second recording, and that value exists
in the first (DropPath returns its input), an op chooses between the two at run time. If everything the caller can see is
then equal, the code is right in both modes; otherwise the recording is marked with the line of the branch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from autopar.ir.codec import tensor_digest
from autopar.ir.graph import Context, Ref, Source, Struct, map_refs, refs
from autopar.rules.training import FLAGS, STATISTICS, at_run_time, settle
from autopar.trace.build import NORMS, is_random, short_name
from autopar.trace.flags import Read, refuse
from autopar.trace.recording import Enter, Exit, RecordedGuard, RecordedOp, RecordedValue, Recording
from autopar.trace.trees import OPAQUE

SELECT = "autopar:select_training"
DROPOUTS = frozenset(n for n in FLAGS if "dropout" in n)
# Arguments of batch_norm and instance_norm that only matter in training: position and name
MOMENTUM = {"batch_norm": (6, "momentum"), "instance_norm": (6, "momentum")}


def merge(rec: Recording, other: Recording, reads: list[Read]) -> Recording:
    """`rec` with an op that chooses wherever `other`, made in the other mode, returns another value.

    Where that does not make it right in both modes, `rec` with the line of the first branch as its `branch`.
    reads: where the training flag was read, at least one.
    """
    numbers: dict[Any, int] = {}
    wanted = _Numbered(other, numbers)
    wanted.run()
    return _Merged(rec, numbers, wanted, reads).result()


class _Numbered:
    """Value numbers of one recording."""

    def __init__(self, rec: Recording, numbers: dict[Any, int]) -> None:
        self.rec, self.numbers = rec, numbers
        self.of: dict[int, int] = {}  # value -> its number
        self.effects: list[int] = []
        self.guards: set[Any] = set()
        self.exits: dict[tuple[str, int], tuple[int | None, ...]] = {}  # (module path, nth call) -> numbers of what it returned
        self.enters: dict[tuple[str, int], dict[str, int]] = {}  # and of what it was given, by name
        self.lines: dict[Any, list[int]] = {}  # call, line, function and how manieth there -> numbers of what the op was given
        self.seen: Counter[Any] = Counter()
        self.path: list[tuple[str, int]] = []
        self.calls: Counter[str] = Counter()
        self.draws: Counter[Any] = Counter()
        position = {v: i for i, v in enumerate(rec.inputs)}
        for i, v in enumerate(rec.values):
            if i in position:
                self.of[i] = self.number(("input", position[i]))
            elif v.origin in ("param", "buffer"):
                self.of[i] = self.number((v.origin, v.qualified))
            elif v.origin == "constant":
                self.of[i] = self.number(("constant", tensor_digest(rec.constants[v.qualified])))

    def number(self, key: Any) -> int:
        return self.numbers.setdefault(key, len(self.numbers))

    def run(self) -> None:
        for e in self.rec.events:
            if isinstance(e, RecordedOp):
                self.lines[self.place(e)] = [self.of[r.id] for r in refs((e.args, e.kwargs))]
                self.op(e)
            elif isinstance(e, RecordedGuard):
                self.guards.add((self.freeze(e.value), e.read, repr(e.expected)))
            elif isinstance(e, Enter):
                self.enter(e)
                self.enters[self.path[-1]] = {n: self.of[v] for v, n in e.inputs if v in self.of}
            else:
                self.exits[self.path.pop()] = tuple(None if v is None else self.of.get(v) for v in e.out)

    def enter(self, e: Enter) -> None:
        path = e.path if not e.recompute else f"{e.path} "  # no module: its exit returns nothing
        self.path.append((path, self.calls[path]))
        self.calls[path] += 1

    def place(self, e: RecordedOp) -> Any:
        """What the same line of the program has in common in both modes."""
        key = (self.path[-1], e.src.file, e.src.line, e.fn)
        self.seen[key] += 1
        return (*key, self.seen[key])

    def freeze(self, tree: Any) -> Any:
        """A hashable image of a tree with numbers for its values."""
        if isinstance(tree, Ref):
            return ("value", self.of[tree.id])
        if isinstance(tree, (tuple, list)):
            return (type(tree).__name__, *map(self.freeze, tree))
        if isinstance(tree, dict):
            return ("dict", *((repr(k), self.freeze(v)) for k, v in sorted(tree.items(), key=lambda kv: repr(kv[0]))))
        if isinstance(tree, slice):
            return ("slice", *map(self.freeze, (tree.start, tree.stop, tree.step)))
        if isinstance(tree, Struct):
            return (tree.cls, tree.names, *map(self.freeze, tree.items))
        return (type(tree).__name__, repr(tree))

    def op(self, e: RecordedOp, args: Any = None, kwargs: Any = None) -> None:
        args, kwargs = e.args if args is None else args, e.kwargs if kwargs is None else kwargs
        name = short_name(e.fn)
        if (same := self._unchanged(name, args, kwargs)) is not None:
            for r in refs(e.out):
                self.of[r.id] = same
            for old, new in e.writes:
                self.of[new] = self.of[old]
            return
        norm = name in NORMS
        counts = norm and _flag(name, args, kwargs) is True
        if norm and not counts:
            args, kwargs = _without(name, args, kwargs)
        key: Any = (e.fn, self.freeze(args), self.freeze(kwargs), e.ctx)
        # NB: equal draws are other numbers each time; by module, so that an extra draw elsewhere does not shift them.
        if is_random(replace(e, args=args, kwargs=kwargs)):
            key = (key, self.path[-1])
            self.draws[key] += 1
            key = (*key, self.draws[key])
        elif counts or (e.effect and not norm):
            self.effects.append(self.number(key))
        made = self.number(key)
        for i, r in enumerate(refs(e.out)):
            self.of[r.id] = self.number((made, i))
        for old, new in e.writes:
            self.of[new] = self.number((made, "write", self.of[old])) if counts or not norm else self.of[old]

    def _unchanged(self, name: str, args: Any, kwargs: Any) -> int | None:
        """The number of the input that a call returns as it is: dropout that is off, a cat of one tensor with empty ones."""
        if name in DROPOUTS and args and isinstance(args[0], Ref):
            p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
            return self.of[args[0].id] if training is False or p == 0 else None
        if name == "cat" and args and isinstance(args[0], (tuple, list)) and all(isinstance(x, Ref) for x in args[0]):
            full = [x.id for x in args[0] if self.rec.values[x.id].shape != (0,)]
            return self.of[full[0]] if len(full) == 1 < len(args[0]) else None
        return None


def _flag(name: str, args: Any, kwargs: Any) -> Any:
    at, key = STATISTICS[name]
    return args[at] if len(args) > at else kwargs.get(key, name == "instance_norm")


def _without(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The call without the momentum, which has no meaning where no statistics are updated."""
    at, key = MOMENTUM[name]
    return tuple(None if i == at else a for i, a in enumerate(args)), {k: v for k, v in kwargs.items() if k != key}


class _Merged(_Numbered):
    """Numbers of the recording as its code runs in the other mode, with the choices that make it so."""

    def __init__(self, rec: Recording, numbers: dict[Any, int], wanted: _Numbered, reads: list[Read]) -> None:
        super().__init__(rec, numbers)
        self.wanted, self.reads = wanted, reads
        self.values = list(rec.values)
        self.events: list[Any] = []
        self.chosen: dict[int, int] = {}  # value -> the value chosen between it and another
        self.held: dict[int, int] = {n: v for v, n in self.of.items()}  # number -> a value that has it and can be read
        self.memories: set[int] = set()  # of values that were chosen: nothing may be written there
        self.last = Context()
        self.torn: str | None = None  # path of the first module whose difference no choice could mend
        self.memory = max((v.storage for v in rec.values), default=0)

    def result(self) -> Recording:
        rec, wanted = self.rec, self.wanted
        for e in rec.events:
            if isinstance(e, RecordedOp):
                e = self.given(replace(e, args=self.now(e.args), kwargs=self.now(e.kwargs)) if self.chosen else e)
                if any(rec.values[old].storage in self.memories for old, _ in e.writes):
                    return refuse(rec, self.source(""))  # the choice would have to be an alias of both
                self.last = e.ctx
                self.settled(e)
            elif isinstance(e, RecordedGuard):
                e = replace(e, value=self.now(e.value)) if self.chosen else e
                self.guards.add((self.freeze(e.value), e.read, repr(e.expected)))
            elif isinstance(e, Enter):
                e = self.called(e)
            else:
                e = self.exit(e)
            self.events.append(e)
        output = self.now(rec.output)
        buffers = tuple((n, self.chosen.get(v, v)) for n, v in rec.buffers_set)
        same = (
            self.equal(output, wanted.rec.output)
            and {n: self.of[v] for n, v in buffers} == {n: wanted.of[v] for n, v in wanted.rec.buffers_set}
            and self.effects == wanted.effects
            and wanted.guards <= self.guards
        )
        if not same:
            return refuse(rec, self.source(self.torn or ""))
        if not self.chosen:
            return rec
        return replace(rec, values=self.values, events=self.events, output=output, buffers_set=buffers)

    def now(self, tree: Any) -> Any:
        return map_refs(tree, lambda r: Ref(self.chosen.get(r.id, r.id)))

    def settled(self, e: RecordedOp) -> None:
        """Number an op as it runs in the other mode."""
        if e.training and self.rec.training:
            for old, new in e.writes:
                self.of[new] = self.of[old]
        elif self.rec.training:
            self.op(e, *settle(at_run_time(e), False))  # type: ignore[arg-type]
        else:
            self.op(e)
        if e.writes:  # NB: values that died before the write are not among its pairs, so all of the memory counts
            memory = {self.values[old].storage for old, _ in e.writes}
            self.held = {n: v for n, v in self.held.items() if self.values[v].storage not in memory}
        for v in (*(r.id for r in refs(e.out)), *(new for _, new in e.writes)):
            if self.values[v].kind == "tensor":
                self.held[self.of[v]] = v

    def called(self, e: Enter) -> Enter:
        """Choose where the module is given something else in the other mode."""
        above = self.path[-1][0] if self.path else ""
        self.enter(e)
        wanted = self.wanted.enters.get(self.path[-1], {})
        inputs = [(self.chosen.get(v, v), n) for v, n in e.inputs]
        return replace(e, inputs=tuple((self.choose(v, wanted[n], above) if n in wanted else v, n) for v, n in inputs))

    def given(self, e: RecordedOp) -> RecordedOp:
        """Choose where an op is given something else in the other mode."""
        ids = [r.id for r in refs((e.args, e.kwargs))]
        wanted = self.wanted.lines.get(self.place(e), ())
        if len(ids) != len(wanted) or all(self.of[v] == n for v, n in zip(ids, wanted, strict=True)):
            return e
        for v, n in zip(ids, wanted, strict=True):
            self.choose(v, n, self.path[-1][0])
        return replace(e, args=self.now(e.args), kwargs=self.now(e.kwargs))

    def exit(self, e: Exit) -> Exit:
        """Choose where the module returns something else in the other mode."""
        here = self.path.pop()
        wanted = self.wanted.exits.get(here, ())
        out = tuple(v if v is None else self.chosen.get(v, v) for v in e.out)
        if len(wanted) == len(out):
            out = tuple(v if v is None or n is None else self.choose(v, n, here[0]) for v, n in zip(out, wanted, strict=True))
        return replace(e, out=out)

    def choose(self, v: int, number: int, path: str) -> int:
        """The value to use for v: itself if it has the number, else a choice between it and a value that has it, if there is one."""
        old = self.held.get(number)
        if self.of.get(v) == number:
            return v
        a, b = self.values[v], self.values[v if old is None else old]
        if old is None or (a.kind, a.shape, a.dtype) != (b.kind, b.shape, b.dtype) or a.kind != "tensor" or a.storage in self.memories:
            self.torn = path if self.torn is None else self.torn
            return v
        self.memory += 1
        from_params = a.from_params or b.from_params
        self.values.append(RecordedValue(a.name, a.kind, a.shape, a.dtype, a.grad or b.grad, self.memory, "op", "", from_params))
        new = len(self.values) - 1
        self.of[new] = number
        self.held[number] = new
        self.chosen = {k: new if c == v else c for k, c in self.chosen.items()} | {v: new}
        self.memories |= {a.storage, b.storage, self.memory}
        pair = (Ref(v), Ref(old)) if self.rec.training else (Ref(old), Ref(v))
        self.events.append(RecordedOp(SELECT, pair, {}, Ref(new), self.source(path), self.last))
        return new

    def source(self, path: str) -> Source:
        """The read to name for a difference in a module: its own, or one below it."""
        own = [r for r in self.reads if r.path == path]
        below = [r for r in self.reads if r.path.startswith(path + ".") or not path]
        return (own or below or self.reads)[0].source

    def equal(self, mine: Any, theirs: Any) -> bool:
        """Whether two outputs are the same; None stands for an object that generated code cannot make (a cache)."""
        if theirs == OPAQUE:
            return mine is None
        if isinstance(mine, Struct) and isinstance(theirs, Struct):
            pairs = dict(zip(mine.names, mine.items, strict=True)), dict(zip(theirs.names, theirs.items, strict=True))
            names = {n for p in pairs for n in p}
            return mine.cls == theirs.cls and all(self.equal(pairs[0].get(n), pairs[1].get(n)) for n in names)
        if isinstance(mine, (tuple, list)) and type(mine) is type(theirs):
            return len(mine) == len(theirs) and all(self.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        if isinstance(mine, dict) and isinstance(theirs, dict):
            return mine.keys() == theirs.keys() and all(self.equal(mine[k], theirs[k]) for k in mine)
        return bool(self.freeze(mine) == self.wanted.freeze(theirs))
