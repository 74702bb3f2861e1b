"""check: proves a lowered program equal to its graph by deriving every type anew, or says op by op what is wrong.
Must not know how lowering works: it shares only the type algebra (ir/types.py) and the rules (recipe_of, localise).

What is proven, and how an ambiguous contract is read here (check_block.py: one block, check_aliases.py: in-place writes):

- A lowered block is its source block plus conversions: Locals, Invokes and Guards are the source's ops, calls and guards, each
  once and in the source's order. Reordering independent ops would be harmless but is not accepted.
- Every lowered value holds one source value (`origin`). Whatever reads or makes it must stand where the source has that origin.
- An op's input and output types follow from its choices by Recipe.types, shards numbered by with_nest. An op without a
  recipe, or marked `whole`, is 'I' on every axis, except that an op that only reads sizes takes its input in any type
  and what is set into a buffer has the type the buffer is placed in.
- R and I are told apart only where a gradient can flow: the value carries one, the op ran in grad mode and some output carries one.
- Where an op uses one value at two positions, each position is checked by itself.
- Scalars are the same on every rank: type I, or no type at all.
- After an in-place write, values of the old version are stale in every type; a use is an error. Versions that share storage in
  the source (views of one tensor) must be written through one lowered variable, the module's own tensors directly and not as a
  converted copy.
- `copy` is demanded of a Convert that may not make a new tensor (nothing, slice, keep) if its result, a view or
  a later version of it is written in place, here or in a called block; it is harmless elsewhere.
- A split random op needs `rng`, all axes that split it, unless its local form is a function of the runtime, which draws by itself.
- Every tensor of the graph has exactly one placement, R, I or S, and every block that uses the tensor reads it in that type.
- Choices need not be those of the plan: they need to be legal. Which block serves which instance follows from the calls; all calls
  of one module instance go to one block.
"""

from __future__ import annotations

from collections import defaultdict

from autopar.errors import CheckError
from autopar.ir.graph import Graph, join, refs
from autopar.ir.types import I, Type
from autopar.lower.check_block import BlockCheck, Shared, same, show, wrong_type
from autopar.lower.program import Invoke, LoweredBlock, Program

SHOWN = 20  # errors printed; the rest is counted


def check(graph: Graph, program: Program) -> None:
    """Raise CheckError with everything that is wrong; return if the program provably computes what the graph does."""
    found = errors(graph, program)
    if found:
        more = f"\n... and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise CheckError(f"the lowered program is not its graph, {len(found)} found:\n" + "\n".join(found[:SHOWN]) + more)


def errors(graph: Graph, program: Program) -> list[str]:
    """What is wrong with a program, one line each; nothing if it is proven."""
    s = Shared(graph, program)
    if program.plan.mesh != program.mesh:
        s.errors.append(f"program: its {program.mesh} is not the plan's {program.plan.mesh}")
    root = program.blocks.get(program.root)
    if root is None or root.source != graph.root:
        return [*s.errors, f"program: root {program.root!r} is not a lowering of the graph's root {graph.root!r}"]
    for name, low in program.blocks.items():
        src = graph.blocks.get(low.source)
        if src is None or low.name != name:
            s.errors.append(f"{name}: is named {low.name!r} and lowers {low.source!r}, which is no block of the graph")
            continue
        s.guarded(name, BlockCheck(s, src, low).run)
        s.done.add(name)
    if not s.errors:  # what follows makes sense only of well-formed blocks
        s.guarded("program", lambda: _instances(s, root))
        s.guarded("program", lambda: _interface(s, root))
    return s.errors


def _instances(s: Shared, root: LoweredBlock) -> None:
    """Every block is instantiated where it says, and every tensor is read as it is placed."""
    placed = _placements(s)
    tensors = {n: t for t in s.graph.tensors for n in (t.name, *t.aliases)}
    found: dict[str, set[str]] = defaultdict(set)
    todo = [(root, "")]
    while todo:
        low, path = todo.pop()
        if path in found[low.name]:
            continue
        found[low.name].add(path)
        read = [(join(path, p.name), p.kind, low.values[p.value]) for p in low.params]
        read += [(join(path, name), "buffer", v) for block, name, v in s.buffers if block == low.name]
        for name, kind, v in read:
            t = tensors.get(name)
            if t is None:
                s.errors.append(f"{low.name}: {name} is no tensor of the graph")
            elif (t.kind, t.shape, t.dtype) != (kind, v.shape, v.dtype):
                s.errors.append(f"{low.name}: {name} is used as {kind} {v.dtype}{v.shape}, but is {t.kind} {t.dtype}{t.shape}")
            elif t.name in placed and not same(placed[t.name], v.type, v.grad or t.grad):
                s.errors.append(f"{low.name}: {name} is {show(v.type)} here but placed {show(placed[t.name])}")
        # NB: the second call of one module instance is 'layer#1'
        todo += [(s.program.blocks[i.block], join(path, i.id.partition("#")[0])) for i in low.body if isinstance(i, Invoke)]
    owner: dict[str, str] = {}
    for name, paths in found.items():
        for path in sorted(paths):
            if owner.setdefault(path, name) != name:
                s.errors.append(f"program: module {path!r} is both a {owner[path]} and a {name}; its tensors would be held twice")
    for low in s.program.blocks.values():
        if set(low.instances) != found[low.name]:
            s.errors.append(f"{low.name}: says its instances are {sorted(low.instances)}, but it is called as {sorted(found[low.name])}")


def _placements(s: Shared) -> dict[str, Type]:
    """The placement of every tensor, after checking that they are complete and possible."""
    placed: dict[str, Type] = {}
    for p in s.program.placements:
        if p.name in placed:
            s.errors.append(f"placements: {p.name} is placed twice")
        placed[p.name] = p.type
    tensors = {t.name: t for t in s.graph.tensors}
    for name in sorted(set(placed) ^ set(tensors)):
        s.errors.append(f"placements: {name} " + ("is no tensor of the graph" if name in placed else "has no placement"))
    wrong: dict[tuple[tuple[int, ...], Type], list[str]] = {}
    for name in sorted(placed.keys() & tensors.keys()):
        case = tensors[name].shape, placed[name]
        if case not in wrong:
            wrong[case] = wrong_type(*case, s.mesh)
        s.errors += [f"placements: {name}: {e}" for e in wrong[case]]
        if any(a.kind == "P" for a in placed[name]):
            s.errors.append(f"placements: {name} is placed {show(placed[name])}; a tensor that is kept cannot be P")
    return placed


def _interface(s: Shared, root: LoweredBlock) -> None:
    """Inputs and outputs of the module are the same on every rank."""
    for i in dict.fromkeys((*root.inputs, *root.outputs, *(r.id for r in refs(s.program.output)))):
        v = root.values[i]
        if v.kind == "tensor" and not same(v.type, (I,) * len(s.mesh.axes), v.grad):
            what = "input" if i in root.inputs else "output"
            s.errors.append(f"{root.name}: {what} %{i} {v.name!r} of the module is {show(v.type)}, expected I on every axis")
