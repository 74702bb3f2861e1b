"""Seeded mutations of a Program: each makes one that differs from it and computes something else.
Must not be imported by the package. `mutations` is the table; a mutation returns None where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

from edits import (
    backward_matters,
    conversions,
    divisible,
    edit,
    items,
    last,
    leaves,
    map_tree,
    pick,
    put,
    rename,
    retype,
    rewire,
    users,
)

from autopar.ir.graph import AxisRef, Guard, Ref, map_refs, refs
from autopar.ir.types import I, P, R, S, Step, apply_step, without_grad
from autopar.lower.program import Convert, Invoke, Local, LoweredBlock, Program
from autopar.rules import canonical
from autopar.rules.recipe import Scaled

Mutation = Callable[[Program, Random], Program | None]
mutations: dict[str, Mutation] = {}

COMMUTE = {"add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or", "bitwise_and", "bitwise_or"}
VIEWS = {"view", "reshape", "expand", "unflatten", "new_zeros", "repeat", "zeros", "ones", "split", "narrow"}


def mutation(f: Mutation) -> Mutation:
    mutations[f.__name__] = f
    return f


# conversions


@mutation
def conversion_dropped(p: Program, rng: Random) -> Program | None:
    if (got := pick(conversions(p), rng)) is None:
        return None
    b, n, c = got
    return rewire(p, b, [*b.body[:n], *b.body[n + 1 :]], {c.out: c.value})


@mutation
def conversion_doubled(p: Program, rng: Random) -> Program | None:
    if (got := pick((x for x in conversions(p) if {x[2].src.kind, x[2].dst.kind} != {"R", "S"} or x[2].dst.kind == "S"), rng)) is None:
        return None
    b, n, c = got
    new = replace(b.values[c.out], id=len(b.values))
    again = replace(c, value=c.out, out=new.id)
    return rewire(p, replace(b, values=(*b.values, new)), [*b.body[: n + 1], again, *b.body[n + 1 :]], {c.out: new.id}, n + 2)


@mutation
def conversion_of_another_kind(p: Program, rng: Random) -> Program | None:
    """Same result forward, another backward: P -> I becomes P -> R."""
    swap = {"I": R, "R": I}
    fit = [(b, n, c) for b, n, c in conversions(p) if c.dst.kind in swap and c.src.kind in "PS" and backward_matters(p, b, c.out)]
    if (got := pick(fit, rng)) is None:
        return None
    b, n, c = got
    return edit(p, b, n, replace(c, dst=swap[c.dst.kind]))


@mutation
def conversion_of_another_kind_retyped(p: Program, rng: Random) -> Program | None:
    """The same with the recorded type of the result changed too, so that only its uses tell."""
    swap = {"I": R, "R": I}
    fit = [(b, n, c) for b, n, c in conversions(p) if c.dst.kind in swap and c.src.kind in "PS" and backward_matters(p, b, c.out)]
    if (got := pick(fit, rng)) is None:
        return None
    b, n, c = got
    k, t = p.mesh.index(c.axis), list(b.values[c.out].type)
    t[k] = swap[c.dst.kind]
    return edit(p, replace(b, values=retype(b, c.out, tuple(t))), n, replace(c, dst=t[k]))


@mutation
def conversions_exchanged(p: Program, rng: Random) -> Program | None:
    """The results of two conversions of equal-shaped values change places."""
    found = conversions(p)
    pairs = [(b, n, c, m, d) for b, n, c in found for a, m, d in found
             if a is b and n < m and c.value != d.value and b.values[c.out].origin != b.values[d.out].origin
             and b.values[c.out].shape == b.values[d.out].shape and d.value not in _made_between(b, n, m)]  # fmt: skip
    if (got := pick(pairs, rng)) is None:
        return None
    b, n, c, m, d = got
    body = list(b.body)
    body[n], body[m] = replace(c, value=d.value), replace(d, value=c.value)
    return put(p, replace(b, body=tuple(body)))


def _made_between(b: LoweredBlock, n: int, m: int) -> set[int]:
    made: set[int] = set()
    for x in b.body[n:m]:
        made |= set(_made(x))
    return made


def _made(x: Any) -> list[int]:
    if isinstance(x, Convert):
        return [x.out]
    if isinstance(x, Invoke):
        return [*x.out, *(new for _, new in x.writes)]
    return [*(r.id for r in refs(x.out)), *(new for _, new in x.writes)] if isinstance(x, Local) else []


@mutation
def conversion_on_another_axis(p: Program, rng: Random) -> Program | None:
    fit = [(b, n, c, a) for b, n, c in conversions(p) for a in p.mesh.names if a != c.axis and p.mesh.sizes[p.mesh.index(a)] > 1]
    if (got := pick(fit, rng)) is None:
        return None
    b, n, c, axis = got
    c = replace(c, axis=axis)
    if rng.random() < 0.5:  # the recorded type follows, where the conversion is possible at all
        try:
            t = apply_step(b.values[c.value].type, Step(p.mesh.index(axis), c.src, c.dst))
            b = replace(b, values=retype(b, c.out, t))
        except ValueError:
            pass
    return edit(p, b, n, c)


@mutation
def shard_of_another_dim(p: Program, rng: Random) -> Program | None:
    """A conversion to a shard cuts another dim."""
    fit = []
    for b, n, c in conversions(p):
        v, k = b.values[c.out], p.mesh.sizes[p.mesh.index(c.axis)]
        fit += [
            (b, n, c, d) for d in range(len(v.shape)) if c.dst.kind == "S" and d != c.dst.dim and divisible(v, d, k) and v.shape[d] >= k
        ]
    if (got := pick(fit, rng)) is None:
        return None
    b, n, c, d = got
    dst = S(d)
    if rng.random() < 0.5:
        t = list(b.values[c.out].type)
        t[p.mesh.index(c.axis)] = dst
        b = replace(b, values=retype(b, c.out, tuple(t)))
    return edit(p, b, n, replace(c, dst=dst))


@mutation
def slices_in_another_order(p: Program, rng: Random) -> Program | None:
    """Two axes that shard one dim change places: the outer slices become the inner ones."""
    fit = []
    for b in p.blocks.values():
        for v in b.values:
            on = [k for k, a in enumerate(v.type) if a.kind == "S"]
            fit += [(b, v, j, k) for j in on for k in on if j < k and v.type[j].dim == v.type[k].dim and users(p, b, v.id)]
    if (got := pick(fit, rng)) is None:
        return None
    b, v, j, k = got
    t = list(v.type)
    t[j], t[k] = t[k], t[j]
    body = [replace(c, dst=t[p.mesh.index(c.axis)]) if isinstance(c, Convert) and c.out == v.id else c for c in b.body]
    return put(p, replace(b, values=retype(b, v.id, tuple(t)), body=tuple(body)))


@mutation
def bias_added_on_all_ranks(p: Program, rng: Random) -> Program | None:
    """A value that enters a sum as P (kept on one rank) is used as it is on all of them."""
    if (got := pick((x for x in conversions(p) if x[2].dst == P), rng)) is None:
        return None
    b, n, c = got
    return rewire(p, b, [*b.body[:n], *b.body[n + 1 :]], {c.out: c.value})


@mutation
def bias_declared_partial(p: Program, rng: Random) -> Program | None:
    """The same for a parameter, its type in the block and its placement made to fit."""
    fit = []
    for b, n, c in conversions(p):
        fit += [(b, n, c, x) for x in b.params if c.dst == P and x.value == c.value]
    if (got := pick(fit, rng)) is None:
        return None
    b, n, c, x = got
    t = b.values[c.out].type
    names = {".".join(filter(None, (i, x.name))) for i in b.instances}
    p = replace(p, placements=tuple(replace(q, type=t) if q.name in names else q for q in p.placements))
    return rewire(p, replace(b, values=retype(b, c.value, t)), [*b.body[:n], *b.body[n + 1 :]], {c.out: c.value})


# ops


@mutation
def constant_changed(p: Program, rng: Random) -> Program | None:
    fit = []
    for b, n, x in items(p, Local):
        fit += [(b, n, x, k) for k, v in enumerate(leaves((x.args, x.kwargs))) if isinstance(v, (bool, int, float)) and v == v]
    if (got := pick(fit, rng)) is None:
        return None
    b, n, x, k = got
    count = iter(range(10**6))
    other = lambda v: (not v) if isinstance(v, bool) else v + 1 if isinstance(v, int) else v * 1.5 + 0.25  # noqa: E731
    args, kwargs = map_tree((x.args, x.kwargs), lambda v: other(v) if next(count) == k else v)
    return edit(p, b, n, replace(x, args=args, kwargs=kwargs))


@mutation
def outputs_exchanged(p: Program, rng: Random) -> Program | None:
    fit = []
    for b, n, x in items(p, (Local, Invoke)):
        out = [r.id for r in refs(x.out)] if isinstance(x, Local) else x.out
        kind = {i: (b.values[i].kind, b.values[i].shape, b.values[i].type) for i in out}
        fit += [(b, n, x, i, j) for i in out for j in out if i < j and kind[i] == kind[j] and (users(p, b, i) or users(p, b, j))]
    if (got := pick(fit, rng)) is None:
        return None
    b, n, x, i, j = got
    swap = {i: j, j: i}
    if isinstance(x, Invoke):
        return edit(p, b, n, replace(x, out=tuple(swap.get(k, k) for k in x.out)))
    return edit(p, b, n, replace(x, out=map_refs(x.out, lambda r: Ref(swap.get(r.id, r.id)))))


@mutation
def inputs_exchanged(p: Program, rng: Random) -> Program | None:
    fit = []
    for b, n, x in items(p, (Local, Invoke)):
        args = list(dict.fromkeys(x.args if isinstance(x, Invoke) else (r.id for r in refs((x.args, x.kwargs)))))
        if isinstance(x, Local) and (canonical(x.fn) in COMMUTE or x.writes):
            continue
        kind = {i: (b.values[i].shape, b.values[i].type, b.values[i].dtype) for i in args if b.values[i].kind == "tensor"}
        fit += [(b, n, x, i, j) for i in kind for j in kind if i < j and kind[i] == kind[j] and b.values[i].origin != b.values[j].origin]
    if (got := pick(fit, rng)) is None:
        return None
    b, n, x, i, j = got
    return edit(p, b, n, rename(x, {i: j, j: i}))


@mutation
def input_of_another_op(p: Program, rng: Random) -> Program | None:
    """An op reads a value of the same shape and type that it should not."""
    fit = []
    for b, n, x in items(p, Local):
        made = {i for y in b.body[:n] for i in _made(y)} | {*b.inputs, *(q.value for q in b.params)}
        for r in refs((x.args, x.kwargs)):
            v = b.values[r.id]
            fit += [(b, n, x, v.id, w) for w in made if v.kind == "tensor" and b.values[w].origin != v.origin
                    and (v.shape, v.type, v.dtype) == (b.values[w].shape, b.values[w].type, b.values[w].dtype)]  # fmt: skip
    if (got := pick(fit, rng)) is None:
        return None
    b, n, x, i, w = got
    return edit(p, b, n, rename(x, {i: w}))


@mutation
def wrong_local_size(p: Program, rng: Random) -> Program | None:
    """A view is told the global size, or half the local one."""
    fit = []
    for b, n, x in items(p, Local):
        sharded = any(a.kind == "S" for r in refs((x.args, x.out)) for a in b.values[r.id].type)
        if last(x.fn) in VIEWS and sharded:
            fit += [(b, n, x, k) for k, v in enumerate(leaves((x.args[1:], x.kwargs)))
                    if (isinstance(v, int) and not isinstance(v, bool) and v > 1)]  # fmt: skip
    if (got := pick(fit, rng)) is None:
        return None
    b, n, x, k = got
    count = iter(range(10**6))
    factor = rng.choice([2, 0.5])
    args, kwargs = map_tree((x.args[1:], x.kwargs), lambda v: int(v * factor) if next(count) == k else v)
    return edit(p, b, n, replace(x, args=(x.args[0], *args), kwargs=kwargs))


@mutation
def size_not_localised(p: Program, rng: Random) -> Program | None:
    """A run-time size is used whole where the local part was meant."""
    fit = [(b, n, x) for b, n, x in items(p, Local) if _scaled((x.args, x.kwargs))]
    if (got := pick(fit, rng)) is None:
        return None
    b, n, x = got
    args, kwargs = _unscale((x.args, x.kwargs))
    return edit(p, b, n, replace(x, args=args, kwargs=kwargs))


def _scaled(tree: Any) -> bool:
    return _unscale(tree) != tree


def _unscale(tree: Any) -> Any:
    if isinstance(tree, Scaled):
        return tree.ref
    if isinstance(tree, (tuple, list)):
        return type(tree)(_unscale(x) for x in tree)
    return {k: _unscale(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


@mutation
def unsplit_form(p: Program, rng: Random) -> Program | None:
    """The op itself runs where its split form was needed (a vocabulary, the ids not shifted)."""
    fit = [
        (b, n, x)
        for b, n, x in items(p, Local)
        if x.fn.startswith("ap.") and any(isinstance(v, AxisRef) for v in leaves((x.args, x.kwargs)))
    ]
    if (got := pick(fit, rng)) is None:
        return None
    b, n, x = got
    drop = lambda t: tuple(v for v in t if not any(isinstance(y, AxisRef) for y in leaves(v)))  # noqa: E731
    kwargs = {k: v for k, v in x.kwargs.items() if not any(isinstance(y, AxisRef) for y in leaves(v))}
    fn = "torch.nn.functional." + last(x.fn).removeprefix("vocab_").removeprefix("sharded_")
    return edit(p, b, n, replace(x, fn=fn, args=drop(x.args), kwargs=kwargs))


@mutation
def split_form_on_fewer_axes(p: Program, rng: Random) -> Program | None:
    """A split form that communicates over two axes is given another set of axes."""
    fit = [(b, n, x) for b, n, x in items(p, Local) if any(isinstance(v, AxisRef) for v in leaves((x.args, x.kwargs)))]
    names = p.mesh.names
    if len(names) < 2 or (got := pick(fit, rng)) is None:
        return None
    b, n, x = got
    other = dict(zip(names, (*names[1:], names[0]), strict=True))
    args, kwargs = map_tree((x.args, x.kwargs), lambda v: AxisRef(other[v.name]) if isinstance(v, AxisRef) else v)
    return edit(p, b, n, replace(x, args=args, kwargs=kwargs)) if (args, kwargs) != (x.args, x.kwargs) else None


@mutation
def divide_missing(p: Program, rng: Random) -> Program | None:
    if (got := pick((y for y in items(p, Local) if y[2].divide != 1), rng)) is None:
        return None
    b, n, x = got
    return edit(p, b, n, replace(x, divide=rng.choice([1, x.divide * 2])))


@mutation
def times_missing(p: Program, rng: Random) -> Program | None:
    """The local size is taken for the size."""
    if (got := pick((y for y in items(p, Local) if y[2].times != 1), rng)) is None:
        return None
    b, n, x = got
    return edit(p, b, n, replace(x, times=1))


@mutation
def same_random_numbers(p: Program, rng: Random) -> Program | None:
    """Ranks that hold different shards draw the same numbers."""
    fit = [(b, n, x) for b, n, x in items(p, Local) if x.rng or x.kwargs.get("shards")]
    if (got := pick(fit, rng)) is None:
        return None
    b, n, x = got
    kwargs = {**x.kwargs, "shards": x.kwargs["shards"][1:]} if x.kwargs.get("shards") else x.kwargs
    return edit(p, b, n, replace(x, rng=x.rng[1:], kwargs=kwargs))


@mutation
def other_random_numbers(p: Program, rng: Random) -> Program | None:
    """Ranks that hold the same data draw different numbers."""
    fit = []
    for b, n, x in items(p, Local):
        axes = {*x.rng, *(v.name for v in leaves(x.kwargs) if isinstance(v, AxisRef))}
        fit += [(b, n, x, a) for a in p.mesh.names if "dropout" in x.fn and a not in axes]
    if (got := pick(fit, rng)) is None:
        return None
    b, n, x, a = got
    return edit(p, b, n, replace(x, rng=(*x.rng, a)))


@mutation
def op_dropped(p: Program, rng: Random) -> Program | None:
    """An op between two values of one shape and type is left out: a residual, a dropout, a norm."""
    fit = []
    for b, n, x in items(p, Local):
        out = [r.id for r in refs(x.out)]
        if len(out) == 1 and not x.writes and users(p, b, out[0]):
            v = b.values[out[0]]
            fit += [
                (b, n, v.id, r.id) for r in refs((x.args, x.kwargs)) if (b.values[r.id].shape, b.values[r.id].type) == (v.shape, v.type)
            ]
    if (got := pick(fit, rng)) is None:
        return None
    b, n, i, j = got
    return rewire(p, b, [*b.body[:n], *b.body[n + 1 :]], {i: j})


@mutation
def write_dropped(p: Program, rng: Random) -> Program | None:
    """An op that writes in place is left out; its new versions are what was there before."""
    if (
        got := pick(
            (y for y in items(p, Local) if y[2].writes and not {r.id for r in refs(y[2].out)} - {w for _, w in y[2].writes}), rng
        )
    ) is None:
        return None
    b, n, x = got
    return rewire(p, b, [*b.body[:n], *b.body[n + 1 :]], {new: old for old, new in x.writes})


@mutation
def op_doubled(p: Program, rng: Random) -> Program | None:
    """An op with an effect (in place, random) runs twice."""
    if (got := pick((y for y in items(p, Local) if y[2].writes or "dropout" in y[2].fn), rng)) is None:
        return None
    b, n, x = got
    return put(p, replace(b, body=(*b.body[: n + 1], x, *b.body[n + 1 :])))


@mutation
def op_reordered(p: Program, rng: Random) -> Program | None:
    """An op runs after the next one that reads its result, or a draw of random numbers after the next draw."""
    fit = []
    for b, n, x in items(p, (Local, Convert, Invoke)):
        for m in range(n + 1, len(b.body)):
            if rename(b.body[m], dict.fromkeys(_made(x), -1)) != b.body[m]:
                fit.append((b, n, m))
                break
            if isinstance(x, Local) and "dropout" in x.fn and isinstance(b.body[m], Local) and "dropout" in b.body[m].fn:
                fit.append((b, n, m))
                break
    if (got := pick(fit, rng)) is None:
        return None
    b, n, m = got
    return put(p, replace(b, body=(*b.body[:n], *b.body[n + 1 : m + 1], b.body[n], *b.body[m + 1 :])))


@mutation
def context_changed(p: Program, rng: Random) -> Program | None:
    """An op records a gradient where the user's program did not, or the other way round."""
    fit = [(b, n, x) for b, n, x in items(p, Local) if any(b.values[r.id].grad for r in refs((x.args, x.kwargs)))
           and (not x.ctx.grad or any(b.values[r.id].grad for r in refs(x.out)))]  # fmt: skip
    if (got := pick(fit, rng)) is None:
        return None
    b, n, x = got
    return edit(p, b, n, replace(x, ctx=replace(x.ctx, grad=not x.ctx.grad)))


# in-place writes


@mutation
def stale_copy(p: Program, rng: Random) -> Program | None:
    """After a write in place, a use reads another variable that still holds the old version."""
    fit = []
    for b, n, x in items(p, (Local, Invoke)):
        for old, new in x.writes:
            o = b.values[old].origin
            # NB: `old` itself is no stale copy, it is the variable that was written
            copies = [*(c.out for c in b.body[:n] if isinstance(c, Convert) and b.values[c.out].origin == o and c.out != old),
                      *(c.value for c in b.body[:n] if isinstance(c, Convert) and c.out == old)]  # fmt: skip
            fit += [(b, n, new, i) for i in copies if any(rename(y, {new: -1}) != y for y in b.body[n + 1 :]) or new in b.outputs]
    if (got := pick(fit, rng)) is None:
        return None
    b, n, new, i = got
    return rewire(p, b, list(b.body), {new: i}, n + 1)


@mutation
def write_to_a_copy(p: Program, rng: Random) -> Program | None:
    """A conversion chain to another type and back is put before a write in place: the copy is written."""
    fit = [(b, n, x, k) for b, n, x in items(p, Local) for k, _ in enumerate(x.writes)
           if p.mesh.axes and b.values[x.writes[k][0]].type[0] == I and any(q.value == x.writes[k][0] for q in b.params)]  # fmt: skip
    if (got := pick(fit, rng)) is None:
        return None
    b, n, x, k = got
    v = b.values[x.writes[k][0]]
    r = replace(v, id=len(b.values), type=(P, *v.type[1:]))
    i = replace(v, id=len(b.values) + 1)
    axis = p.mesh.names[0]
    body = [*b.body[:n], Convert(v.id, r.id, axis, I, P), Convert(r.id, i.id, axis, P, I, True), rename(x, {v.id: i.id}), *b.body[n + 1 :]]
    return put(p, replace(b, values=(*b.values, r, i), body=tuple(body)))


@mutation
def copy_missing(p: Program, rng: Random) -> Program | None:
    """A write in place reaches the memory of what was converted. (Conversions from S and P make new tensors anyway.)"""
    if (got := pick((y for y in items(p, Convert) if y[2].copy and y[2].src.kind in "RI"), rng)) is None:
        return None
    b, n, c = got
    return edit(p, b, n, replace(c, copy=False))


# blocks, module, placements


@mutation
def call_of_another_block(p: Program, rng: Random) -> Program | None:
    fit = [(b, n, x, c) for b, n, x in items(p, Invoke) for c in p.blocks.values()
           if c.name not in (x.block, b.name) and (len(c.inputs), len(c.outputs)) == (len(x.args), len(x.out))]  # fmt: skip
    if (got := pick(fit, rng)) is None:
        return None
    b, n, x, c = got
    return edit(p, b, n, replace(x, block=c.name))


@mutation
def call_of_another_instance(p: Program, rng: Random) -> Program | None:
    fit = [(b, n, x, m, y) for b, n, x in items(p, Invoke) for m, y in enumerate(b.body) if isinstance(y, Invoke) and n < m and x.id != y.id
           and p.blocks[x.block].source == p.blocks[y.block].source and p.blocks[x.block].params]  # fmt: skip
    if (got := pick(fit, rng)) is None:
        return None
    b, n, x, m, y = got
    body = list(b.body)
    body[n], body[m] = replace(x, id=y.id), replace(y, id=x.id)
    return put(p, replace(b, body=tuple(body)))


@mutation
def call_interface_changed(p: Program, rng: Random) -> Program | None:
    """A block takes an argument or gives a result in another type than its callers think."""
    fit = [(b, i) for b in p.blocks.values() for i in b.outputs if b.name != p.root and p.mesh.axes and b.values[i].grad]
    if (got := pick(fit, rng)) is None:
        return None
    b, i = got
    k = rng.randrange(len(p.mesh.axes))
    c = next((c for c in b.body if isinstance(c, Convert) and c.out == i), None)
    if c is not None:  # the last conversion is left to a caller that does not know
        return put(p, replace(b, outputs=tuple(c.value if j == i else j for j in b.outputs)))
    t = list(b.values[i].type)
    t[k] = R if t[k].kind != "R" else I
    return put(p, replace(b, values=retype(b, i, tuple(t))))


@mutation
def parameters_exchanged(p: Program, rng: Random) -> Program | None:
    fit = []
    for b in p.blocks.values():
        key = lambda q, b=b: (q.kind, b.values[q.value].shape, b.values[q.value].type)  # noqa: E731
        fit += [(b, j, k) for j, x in enumerate(b.params) for k, y in enumerate(b.params) if j < k and key(x) == key(y)]
    if (got := pick(fit, rng)) is None:
        return None
    b, j, k = got
    params = list(b.params)
    params[j], params[k] = replace(params[j], value=params[k].value), replace(params[k], value=params[j].value)
    return put(p, replace(b, params=tuple(params)))


@mutation
def placement_changed(p: Program, rng: Random) -> Program | None:
    used = {".".join(filter(None, (i, q.name))): b.values[q.value] for b in p.blocks.values() for q in b.params for i in b.instances
            if users(p, b, q.value)}  # fmt: skip
    fit = []
    for n, q in enumerate(p.placements):
        v = used.get(q.name)
        for k, size in enumerate(p.mesh.sizes if v else ()):
            others = [R, I, *(S(d) for d in range(len(v.shape)) if divisible(v, d, size) and v.shape[d] >= size)]
            for a in others:
                t = (*q.type[:k], a, *q.type[k + 1 :])
                if (t != q.type) if v.grad else (without_grad(t) != without_grad(q.type)):
                    fit.append((n, q, t))
    if (got := pick(fit, rng)) is None:
        return None
    n, q, t = got
    return replace(p, placements=(*p.placements[:n], replace(q, type=t), *p.placements[n + 1 :]))


@mutation
def parameter_type_changed(p: Program, rng: Random) -> Program | None:
    """A parameter's placement and its type in the blocks agree, but its uses need another."""
    fit = []
    for b in p.blocks.values():
        for q in b.params:
            v = b.values[q.value]
            for k, size in enumerate(p.mesh.sizes if backward_matters(p, b, v.id) else ()):
                others = [R, I, *(S(d) for d in range(len(v.shape)) if divisible(v, d, size) and v.shape[d] >= size)]
                fit += [(b, q, (*v.type[:k], a, *v.type[k + 1 :])) for a in others if a != v.type[k]]
    if (got := pick(fit, rng)) is None:
        return None
    b, q, t = got
    names = {".".join(filter(None, (i, q.name))) for i in b.instances}
    p = replace(p, placements=tuple(replace(x, type=t) if x.name in names else x for x in p.placements))
    return put(p, replace(b, values=retype(b, q.value, t)))


@mutation
def wrong_output(p: Program, rng: Random) -> Program | None:
    """The module returns another value of the same shape, or the value before its last conversion."""
    b = p.blocks[p.root]
    made = [i for x in b.body for i in _made(x)]
    outs = [r.id for r in refs(p.output)]
    fit = [(i, j) for i in outs for j in made if i != j and b.values[i].shape == b.values[j].shape and b.values[i].kind == b.values[j].kind
           and (b.values[i].origin != b.values[j].origin or b.values[i].type != b.values[j].type)]  # fmt: skip
    if (got := pick(fit, rng)) is None:
        return None
    i, j = got
    output = map_refs(p.output, lambda r: Ref(j) if r.id == i else r)
    return put(replace(p, output=output), replace(b, outputs=tuple(j if k == i else k for k in b.outputs)))


@mutation
def guard_changed(p: Program, rng: Random) -> Program | None:
    if (got := pick(items(p, Guard), rng)) is None:
        return None
    b, n, g = got
    if rng.random() < 0.5:
        return put(p, replace(b, body=(*b.body[:n], *b.body[n + 1 :])))
    return edit(p, b, n, replace(g, expected=(not g.expected) if isinstance(g.expected, bool) else "something else"))
