"""Rules of ops that pick, place or order entries along one dim: gather, scatter, index_select, topk, sort, one_hot, searchsorted.
Must not know values: the dim in question stays whole, other dims may be split where the tensors line up.
"""

from __future__ import annotations

from collections.abc import Sequence

from autopar.rules.case import Case, NoRule
from autopar.rules.recipe import Recipe
from autopar.rules.registry import rule
from autopar.rules.terms import aligned, term


def lined_up(shapes: Sequence[tuple[int, ...]], dim: int, own: Sequence[str]) -> list[str]:
    """A term per shape: the same name for dims of one size everywhere, kept names where sizes differ, `own` for `dim`."""
    if len({len(s) for s in shapes}) != 1:
        raise NoRule("tensors of different ranks")
    out = []
    for at, shape in enumerate(shapes):
        names = []
        for i, n in enumerate(shape):
            if i == dim:
                names.append(own[at])
            elif len({s[i] for s in shapes}) == 1:
                names.append(f"d{i}")
            else:
                names.append(f"k{at}_{i}^")
            if n == 1:
                names[-1] = "1"
        out.append(" ".join(names))
    return out


@rule("gather", args="input|self, dim, index, sparse_grad=False")
def gather(c: Case) -> Recipe:
    x, index = c.tensor("input"), c.tensor("index")
    if c["sparse_grad"] or not x.shape:
        return c.unsplit()
    a, b = lined_up([x.shape, index.shape], c.dim("dim"), ["x^", "k"])
    # NB: where index is smaller than input in another dim, the output follows index and input is needed whole.
    return c.make({"input": a, "index": b}, b, linear=[("input",)])


@rule("take_along_dim", args="input|self, indices, dim=None")
def take_along_dim(c: Case) -> Recipe:
    x, index = c.tensor("input").shape, c.tensor("indices").shape
    if c["dim"] is None or len(x) != len(index):
        return c.unsplit()
    dim = c.dim("dim")
    if any(a != b for i, (a, b) in enumerate(zip(x, index, strict=True)) if i != dim):
        return c.unsplit()  # they broadcast
    a, b = lined_up([x, index], dim, ["x^", "k"])
    return c.make({"input": a, "indices": b}, b, linear=[("input",)])


def _scatter(c: Case, source: str, linear: bool) -> Recipe:
    x, index, src = c.tensor("input"), c.tensor("index"), c.tensor(source) if source in c.args else None
    if c.args.get(source) is not None and src is None and not isinstance(c[source], (int, float, bool)):
        raise NoRule("a run-time number")
    if not x.shape:
        return c.unsplit()
    shapes = [x.shape, index.shape] + ([src.shape] if src is not None and src.shape else [])
    terms = lined_up(shapes, c.dim("dim"), ["x^", "k^", "s^"])
    groups = [("input", source) if src is not None else ("input",)] if linear else []
    if linear and src is None and c.args.get(source) not in (0, None):
        groups = []  # a number put into addends would be added up
    given = {"input": terms[0], "index": terms[1]}
    if src is not None:
        given[source] = terms[2] if src.shape else ""
    return c.make(given, terms[0], linear=groups)


@rule("scatter", args="input|self, dim, index, src|value, reduce=None")
def scatter(c: Case) -> Recipe:
    return _scatter(c, "src", c["reduce"] is None)


@rule("scatter_add", args="input|self, dim, index, src")
def scatter_add(c: Case) -> Recipe:
    return _scatter(c, "src", True)


@rule("scatter_reduce", args="input|self, dim, index, src, reduce=None, include_self=True")
def scatter_reduce(c: Case) -> Recipe:
    return _scatter(c, "src", False)


@rule("index_select", args="input|self, dim, index")
def index_select(c: Case) -> Recipe:
    x, dim = c.tensor("input").shape, c.dim("dim")
    if not x:
        return c.unsplit()
    index = "" if not c.tensor("index").shape else "1" if c.tensor("index").shape[0] == 1 else "k"
    names = term(x, kept=[dim])
    out = names.split()
    out[dim] = index or "1"
    return c.make({"input": names, "index": index}, " ".join(out), linear=[("input",)])


@rule("index_add", "index_copy", args="input|self, dim, index, source, alpha=1")
def index_add(c: Case) -> Recipe:
    x, src, dim = c.tensor("input").shape, c.tensor("source").shape, c.dim("dim")
    if len(x) != len(src) or any(a != b for i, (a, b) in enumerate(zip(x, src, strict=True)) if i != dim):
        return c.unsplit()
    if not isinstance(c["alpha"], (int, float)):
        raise NoRule("alpha is no literal")
    a, b = lined_up([x, src], dim, ["x^", "k^"])
    index = "1" if c.tensor("index").shape in ((), (1,)) else "k^"
    return c.make({"input": a, "index": index if c.tensor("index").shape else "", "source": b}, a, linear=[("input", "source")])


@rule("index_fill", args="input|self, dim, index, value")
def index_fill(c: Case) -> Recipe:
    names = term(c.tensor("input").shape, kept=[c.dim("dim")])
    value = c.tensor("value")
    if value is not None and value.shape:
        raise NoRule("a value with dims")
    terms = {"input": names, "index": "?"}
    return c.make({**terms, "value": ""} if value is not None else terms, names)


def _along(c: Case, dim: int) -> Recipe:
    """Other dims than `dim` go through from the input to every output."""
    x = c.inputs[0].shape
    if not x or len(c.inputs) != 1:
        return c.unsplit()
    outs = []
    for o in c.outputs:
        if len(o.shape) != len(x):
            raise NoRule("another rank")
        names = term(o.shape, kept=[dim]).split()
        names[dim] = "1" if o.shape[dim] == 1 else "out^"
        outs.append(" ".join(names))
    return c.make({"input": term(x, kept=[dim])}, outs)


@rule("topk", args="input|self, k, dim=-1, largest=True, sorted=True")
def topk(c: Case) -> Recipe:
    return _along(c, c.dim("dim"))


@rule("sort", args="input|self, dim=-1, descending=False, stable=None")
def sort(c: Case) -> Recipe:
    return _along(c, c.dim("dim"))


@rule("argsort", args="input|self, dim=-1, descending=False, stable=False")
def argsort(c: Case) -> Recipe:
    return _along(c, c.dim("dim"))


@rule("msort", args="input|self")
def msort(c: Case) -> Recipe:
    return _along(c, 0)


@rule("kthvalue", args="input|self, k, dim=-1, keepdim=False")
def kthvalue(c: Case) -> Recipe:
    x, dim = c.inputs[0].shape, c.dim("dim")
    names = term(x, kept=[dim]).split()
    out = [*names[:dim], *(["1"] if c["keepdim"] is True else []), *names[dim + 1 :]]
    return c.make({"input": " ".join(names)}, " ".join(out))


@rule("one_hot", args="tensor|input|self, num_classes=-1")
def one_hot(c: Case) -> Recipe:
    if not isinstance(c["num_classes"], int) or c["num_classes"] < 0:
        return c.unsplit()  # the number of classes is the maximum over the whole tensor
    names = term(c.inputs[0].shape)
    return c.make({"tensor": names}, f"{names} {'1' if c['num_classes'] == 1 else 'c^'}")


@rule("searchsorted", args="sorted_sequence, input|self, out_int32=False, right=False, side=None, sorter=None")
def searchsorted(c: Case) -> Recipe:
    seq, values = c.tensor("sorted_sequence"), c.tensor("input")
    if seq is None or values is None:
        return c.unsplit()
    if len(seq.shape) == 1:
        names = term(values.shape)
        return c.make({"sorted_sequence": term(seq.shape, "s", kept=[0]), "input": names, "sorter": "?"}, names)
    rows = seq.shape[:-1]
    lead = term(rows)
    seq_term = f"{lead} {'1' if seq.shape[-1] == 1 else 's^'}"
    names = f"{lead} {'1' if values.shape[-1] == 1 else 'v'}"
    return c.make({"sorted_sequence": seq_term, "input": names, "sorter": seq_term}, names)


@rule("bucketize", args="input|self, boundaries, ...")
def bucketize(c: Case) -> Recipe:
    if c.tensor("input") is None:
        return c.unsplit()
    names = term(c.tensor("input").shape)
    return c.make({"input": names, "boundaries": "?"}, names)


@rule("isin", args="elements, test_elements, ...")
def isin(c: Case) -> Recipe:
    if c.tensor("elements") is None:
        return c.unsplit()
    names = term(c.tensor("elements").shape)
    return c.make({"elements": names, "test_elements": "?"}, names)


@rule("cdist", args="x1, x2, p=2.0, compute_mode=None")
def cdist(c: Case) -> Recipe:
    a, b, out = c.tensor("x1").shape, c.tensor("x2").shape, c.outputs[0].shape
    lead = out[:-2]

    def of(shape: tuple[int, ...], name: str) -> str:
        return " ".join(x for x in (aligned(shape[:-2], lead, "b"), "1" if shape[-2] == 1 else name) if x)

    m = "1" if a[-1] == 1 else "m^"
    tail = "1" if out[-1] == 1 else "r"
    return c.make({"x1": f"{of(a, 'p')} {m}", "x2": f"{of(b, 'r')} {m}"}, f"{of(out, 'p')} {tail}")


@rule("pairwise_distance", args="x1, x2, p=2.0, eps=1e-6, keepdim=False")
def pairwise_distance(c: Case) -> Recipe:
    x1, x2 = c.tensor("x1"), c.tensor("x2")
    if "functional" not in c.op.fn and not c.op.fn.startswith("torch."):
        raise NoRule("another signature")
    if x1.shape != x2.shape or not x1.shape:
        return c.unsplit()
    last = len(x1.shape) - 1
    names = term(x1.shape, kept=[last])
    out = names.split()[:-1] + (["1"] if c["keepdim"] is True else [])
    return c.make({"x1": names, "x2": names}, " ".join(out))
