"""Graph: what the traced program computes, as blocks of ops with SSA values. No devices in it.
Must not know how ops are split (rules) or where they came from (trace); printing is ir/text.py, JSON is ir/codec.py.

A *block* is a region of the trace (one module call) that is emitted as one class. Regions that are the same up to
names are one block, called once per instance, so a graph is as large as the number of *distinct* layers.
Value ids are local to their block: `values[i].id == i`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Ref:
    """A use of a value of the enclosing block."""

    id: int

    def __repr__(self) -> str:
        return f"%{self.id}"


@dataclass(frozen=True)
class Global:
    """An importable object used as an argument: 'package.module:Qual.name'."""

    name: str


@dataclass(frozen=True)
class AxisRef:
    """A mesh axis as an argument of an emitted runtime function (never in a Graph, only in a Program)."""

    name: str


@dataclass(frozen=True)
class Scaled:
    """A local size argument: a run-time scalar divided by the axes that shard its dim (never in a Graph). Prints `n // 2`."""

    ref: Any
    divisor: int


@dataclass(frozen=True)
class Struct:
    """A container that is not tuple, list or dict (dataclass, namedtuple, ModelOutput), by importable class."""

    cls: str  # 'package.module:Name'
    names: tuple[str, ...]
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Source:
    """Where in the user's program a call was made."""

    file: str
    line: int
    function: str
    text: str  # the stripped source line

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Context:
    """The ambient state an op ran under."""

    grad: bool = True
    autocast: tuple[tuple[str, str, bool], ...] = ()  # (device type, dtype 'bfloat16', enabled), only where it is on


@dataclass(frozen=True)
class Value:
    """One SSA value. Shapes and dtypes are those seen while tracing, always global."""

    id: int
    name: str  # the user's local name where one is known; need not be unique
    kind: str  # 'tensor' | 'scalar' (a Python number computed at run time, only with constant_folding=False)
    shape: tuple[int, ...]
    dtype: str  # 'float32', 'int64', ...; for scalars 'int', 'float' or 'bool'
    grad: bool  # may carry a gradient

    @property
    def is_tensor(self) -> bool:
        return self.kind == "tensor"


@dataclass(frozen=True)
class Op:
    """One torch-level call. args, kwargs and out are trees (tuple, list, dict, slice) of Ref and literals.

    Literals: None, bool, int, float, complex, str, Ellipsis, torch.dtype, torch.device, torch.layout,
    torch.memory_format, slice, Global. A device that is the model's own is recorded as Global('autopar:device').
    """

    id: str  # unique in the block: 'self_attn.q_proj/linear', '...#1' where the region repeats the call
    fn: str  # qualified name: 'torch.nn.functional.linear', 'torch.Tensor.view', 'apply:pkg.mod:Class', 'pkg.mod:func'
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any  # tree of Ref; None where nothing is returned or used
    path: str  # module path relative to the block
    src: Source
    ctx: Context = Context()
    writes: tuple[tuple[int, int], ...] = ()  # in-place: (old value id, id of its new version), same storage
    whole: bool = False  # must stay unsplit: a mutation is seen through an alias
    training: bool = False  # runs only while module.training (counters of batch norm)


@dataclass(frozen=True)
class Guard:
    """A value the traced program read: at run time `read(value)` must give `expected` again."""

    id: str
    value: Any  # Ref of the value that was read
    read: str  # 'bool' | 'item' | 'tolist' | 'int' | 'float' | 'equal:<repr>' ...
    expected: Any
    path: str
    src: Source


@dataclass(frozen=True)
class Call:
    """An instance of a block. args line up with the block's inputs, out with its outputs (ids of this block)."""

    id: str  # the instance's path relative to the calling block: 'model.layers.3'
    block: str
    args: tuple[int, ...]
    out: tuple[int, ...]
    writes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Param:
    """A parameter, buffer or constant used in a block, by its name relative to the block's module."""

    name: str
    value: int  # id
    kind: str  # 'param' | 'buffer' | 'constant'


@dataclass(frozen=True)
class Block:
    """A region of the trace that is emitted as one class."""

    name: str  # unique, a valid class name: 'LlamaDecoderLayer'
    cls: str  # qualified name of the module class, or of the function for recompute regions
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: tuple[Param, ...]
    values: tuple[Value, ...]
    ops: tuple[Op | Call | Guard, ...]
    recompute: bool = False  # run under torch.utils.checkpoint
    instances: tuple[str, ...] = ()  # absolute paths of all instances; '' for the root
    input_names: tuple[str, ...] = ()  # what the user's forward calls each input; '' where it is no argument of it

    @property
    def address(self) -> str:
        """The pattern all instances share: 'model.layers.*'."""
        return generalise(self.instances)


@dataclass(frozen=True)
class Tensor:
    """A parameter, buffer or constant of the whole model."""

    name: str  # original qualified name
    kind: str  # 'param' | 'buffer' | 'constant'
    shape: tuple[int, ...]
    dtype: str
    grad: bool
    persistent: bool = True
    aliases: tuple[str, ...] = ()  # other names of the same tensor (tied weights)


@dataclass(frozen=True)
class Argument:
    """One parameter of the module's forward."""

    name: str
    kind: str  # 'positional' | 'keyword' | 'var_positional' | 'var_keyword'
    tree: Any  # Ref of root inputs at tensor leaves, literals elsewhere
    given: bool  # False where the default was used while tracing
    default: Any = None
    has_default: bool = False


@dataclass(frozen=True)
class Graph:
    """A traced module. `constants` holds the tensors of Tensor(kind='constant'); they are not part of equality."""

    root: str
    blocks: dict[str, Block]
    tensors: tuple[Tensor, ...]
    arguments: tuple[Argument, ...]
    output: Any  # tree of Ref of root values, literals and Struct
    folded: bool  # constant_folding
    training: bool  # mode while tracing
    warnings: tuple[str, ...] = ()  # reads that depend on parameters, frozen NumPy or random values
    module: str = ""  # qualified name of the module class
    constants: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    branch: Source | None = None  # the line at which the other mode takes a path that is not here; generated code refuses that mode

    def __str__(self) -> str:
        from autopar.ir.text import format_graph

        return format_graph(self)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides what is computed; the same for the same trace on any machine."""
        from autopar.ir.codec import graph_fingerprint

        return graph_fingerprint(self)

    @property
    def body(self) -> Block:
        return self.blocks[self.root]

    def tensor(self, name: str) -> Tensor:
        """The tensor of an original name or alias. Raises KeyError."""
        for t in self.tensors:
            if t.name == name or name in t.aliases:
                return t
        raise KeyError(name)


def refs(tree: Any) -> Iterator[Ref]:
    """Every Ref in a tree, in order."""
    if isinstance(tree, Ref):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for x in tree:
            yield from refs(x)
    elif isinstance(tree, dict):
        for x in tree.values():
            yield from refs(x)
    elif isinstance(tree, slice):
        yield from refs((tree.start, tree.stop, tree.step))
    elif isinstance(tree, Struct):
        yield from refs(tree.items)
    elif isinstance(tree, Scaled):
        yield from refs(tree.ref)


def map_refs(tree: Any, f: Any) -> Any:
    """The tree with f applied to every Ref; containers keep their kind."""
    if isinstance(tree, Ref):
        return f(tree)
    if isinstance(tree, tuple):
        return tuple(map_refs(x, f) for x in tree)
    if isinstance(tree, list):
        return [map_refs(x, f) for x in tree]
    if isinstance(tree, dict):
        return {k: map_refs(v, f) for k, v in tree.items()}
    if isinstance(tree, slice):
        return slice(map_refs(tree.start, f), map_refs(tree.stop, f), map_refs(tree.step, f))
    if isinstance(tree, Struct):
        return Struct(tree.cls, tree.names, tuple(map_refs(x, f) for x in tree.items))
    if isinstance(tree, Scaled):
        return Scaled(map_refs(tree.ref, f), tree.divisor)
    return tree


def op_inputs(block: Block, op: Op) -> tuple[Value, ...]:
    """The tensor values an op reads, in the order of args then kwargs, one entry per use."""
    found = (block.values[r.id] for r in refs((op.args, op.kwargs)))
    return tuple(v for v in found if v.is_tensor)


def op_outputs(block: Block, op: Op) -> tuple[Value, ...]:
    """The tensor values an op makes: those of `out`, then new versions from `writes` not already among them."""
    ids = [r.id for r in refs(op.out)]
    ids += [new for _, new in op.writes if new not in ids]
    return tuple(block.values[i] for i in ids if block.values[i].is_tensor)


def join(*parts: str) -> str:
    """Join module paths, skipping empty parts."""
    return ".".join(filter(None, parts))


def generalise(paths: tuple[str, ...]) -> str:
    """The common pattern of paths of equal length, '*' where they differ; the first path if they do not line up."""
    split = [p.split(".") for p in paths] or [[""]]
    if len({len(s) for s in split}) != 1:
        return paths[0]
    return ".".join(c[0] if len(set(c)) == 1 else "*" for c in zip(*split, strict=True))
