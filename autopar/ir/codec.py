"""Graph as JSON and back, its constants as safetensors, and its fingerprint. Nothing is a pickle.
Must not know what the ops mean; it knows the dataclasses of ir/graph.py and the literals an argument may hold.

Trees: a tuple is a JSON array; what JSON lacks is an object with one key: {"ref": 3}, {"list": [...]}, {"dict": [[k, v], ...]},
{"slice": [a, b, c]}, {"dtype": "float32"}, {"float": "nan"}, {"Op": {...}} for a dataclass with its non-default fields.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import MISSING, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from autopar.errors import SavedirError
from autopar.ir import graph as ir
from autopar.ir.graph import Block, Global, Graph, Op, Ref, Source, Struct

FORMAT = 1
GRAPH_FILE, CONSTANTS_FILE = "graph.json", "constants.safetensors"
RECORDS = {c.__name__: c for c in (ir.Argument, Block, ir.Call, ir.Context, ir.Guard, Op, ir.Param, Source, Struct, ir.Tensor, ir.Value)}
SOURCE = Source("", 0, "", "")
TORCH_NAMES = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


# ---- trees --------------------------------------------------------------------------------------------------


@cache
def _fields(cls: type) -> tuple[tuple[str, Any], ...]:
    """Field names and defaults (MISSING where there is none)."""
    made = lambda f: f.default if f.default_factory is MISSING else f.default_factory()  # noqa: E731
    return tuple((f.name, made(f)) for f in fields(cls) if f.compare)


def encode(x: Any) -> Any:
    """A value as plain JSON data. Raises TypeError for objects that are not part of the graph's language."""
    kind = type(x)
    if x is None or kind is bool or kind is int or kind is str:
        return x
    if kind is Ref:
        return {"ref": x.id}
    if kind is float:
        return x if x - x == 0.0 else {"float": repr(x)}
    if kind is complex:
        return {"complex": [encode(x.real), encode(x.imag)]}
    if kind is tuple or kind is torch.Size:
        return [encode(v) for v in x]
    if kind is list:
        return {"list": [encode(v) for v in x]}
    if kind is dict:
        return {"dict": [[encode(k), encode(v)] for k, v in x.items()]}
    if kind is slice:
        return {"slice": [encode(x.start), encode(x.stop), encode(x.step)]}
    if x is Ellipsis:
        return {"ellipsis": True}
    if kind is Global:
        return {"global": x.name}
    if kind is ir.AxisRef:
        return {"axis": x.name}
    if kind is torch.device:
        return {"device": str(x)}
    for tag, cls in TORCH_NAMES.items():
        if kind is cls:
            return {tag: str(x).removeprefix("torch.")}
    if kind.__name__ in RECORDS and RECORDS[kind.__name__] is kind:
        return {
            kind.__name__: {n: encode(v) for n, default in _fields(kind) if (v := getattr(x, n)) != default or type(v) is not type(default)}
        }
    if isinstance(x, (bool, int, str)):  # NB: enum members and size-like ints are stored as what they are worth
        return encode(next(t for t in (bool, int, str) if isinstance(x, t))(x))
    raise TypeError(f"a graph cannot hold a {kind.__module__}.{kind.__qualname__}: {x!r}")


def decode(x: Any) -> Any:
    """Inverse of encode. Raises KeyError, TypeError or ValueError on malformed data."""
    if isinstance(x, list):
        return tuple([decode(v) for v in x])
    if not isinstance(x, dict):
        return x
    ((tag, v),) = x.items()
    if tag == "ref":
        return Ref(v)
    if tag == "list":
        return [decode(y) for y in v]
    if tag == "dict":
        return {decode(k): decode(y) for k, y in v}
    if tag == "slice":
        return slice(*(decode(y) for y in v))
    if tag in RECORDS:
        return RECORDS[tag](**{k: decode(y) for k, y in v.items()})
    if tag == "float":
        return float(v)
    if tag == "complex":
        return complex(*(decode(y) for y in v))
    if tag == "ellipsis":
        return Ellipsis
    if tag == "global":
        return Global(v)
    if tag == "axis":
        return ir.AxisRef(v)
    if tag == "device":
        return torch.device(v)
    if tag in TORCH_NAMES:
        found = getattr(torch, v)
        if not isinstance(found, TORCH_NAMES[tag]):
            raise ValueError(f"torch.{v} is not a {tag}")
        return found
    raise KeyError(tag)


# ---- the graph ----------------------------------------------------------------------------------------------


def graph_to_json(graph: Graph) -> str:
    """The text of graph.json: one value or op per line, stable order. Constants are not in it (see save_graph)."""
    one = lambda x: json.dumps(encode(x), ensure_ascii=False)  # noqa: E731
    blocks = []
    for b in graph.blocks.values():
        rows = [f'      "{n}": {one(getattr(b, n))}' for n, _ in _fields(Block) if n not in ("params", "values", "ops")]
        rows += [
            f'      "{n}": [\n' + ",\n".join("        " + one(x) for x in getattr(b, n)) + "\n      ]" for n in ("params", "values", "ops")
        ]
        blocks.append("    {\n" + ",\n".join(rows) + "\n    }")
    rows = [f'  "format": {FORMAT}']
    rows += [f'  "{n}": {one(getattr(graph, n))}' for n, _ in _fields(Graph) if n not in ("blocks", "tensors")]
    rows.append('  "tensors": [\n' + ",\n".join("    " + one(t) for t in graph.tensors) + "\n  ]")
    rows.append('  "blocks": [\n' + ",\n".join(blocks) + "\n  ]")
    return "{\n" + ",\n".join(rows) + "\n}\n"


def graph_from_json(text: str, source: str = "graph") -> Graph:
    """Parse graph.json; the constants of the result are empty. Raises SavedirError that says what is wrong."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        raise SavedirError(f"{source} is not valid JSON: {e.msg} at line {e.lineno}, column {e.colno}") from e
    if not isinstance(data, dict) or "format" not in data:
        raise SavedirError(f"{source} is not an autopar graph: it has no 'format' field")
    if data.pop("format") != FORMAT:
        raise SavedirError(f"{source} has another graph format than {FORMAT}, the one this version reads; compile the module again")
    try:
        blocks = [Block(**{k: decode(v) for k, v in b.items()}) for b in data.pop("blocks")]
        return Graph(blocks={b.name: b for b in blocks}, **{k: decode(v) for k, v in data.items()})
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise SavedirError(f"{source} is damaged: {type(e).__name__}: {e}") from e


def graph_fingerprint(graph: Graph) -> str:
    """Hex digest of everything that decides what is computed: structure, shapes, parameter names and constants.

    Source positions, names of local values and warnings are not in it: moving the user's file changes nothing.
    """
    h = hashlib.sha256()
    put = lambda x: h.update(json.dumps(encode(x)).encode() + b"\n")  # noqa: E731
    for b in graph.blocks.values():
        values = tuple(replace(v, name="") for v in b.values)
        ops = tuple(x if isinstance(x, ir.Call) else replace(x, src=SOURCE) for x in b.ops)
        put(replace(b, values=values, ops=ops, input_names=()))
    for n, _ in _fields(Graph):
        if n not in ("blocks", "tensors", "warnings", "branch"):
            put((n, getattr(graph, n)))
    columns = [n for n, _ in _fields(ir.Tensor)]
    h.update(json.dumps([[getattr(t, n) for n in columns] for t in graph.tensors]).encode())  # NB: there are as many as layers
    if graph.branch is not None:
        put("branch")
    for name in sorted(graph.constants):
        put((name, tensor_digest(graph.constants[name])))
    return h.hexdigest()


# ---- constants ----------------------------------------------------------------------------------------------


def tensor_digest(t: torch.Tensor) -> str:
    """Hex digest of a tensor's dtype, shape and content; where it lives does not matter."""
    return hashlib.sha256(f"{t.dtype}{tuple(t.shape)}".encode() + _bytes(t).numpy().tobytes()).hexdigest()


def _bytes(t: torch.Tensor) -> torch.Tensor:
    """The content of a dense tensor as a flat uint8 tensor on the CPU."""
    if t.layout != torch.strided or t.is_quantized or t.is_meta:
        raise TypeError(f"a constant must be a dense tensor with data, not {t.layout} {t.dtype} on {t.device}")
    flat = t.detach().cpu().resolve_conj().resolve_neg().reshape(-1).contiguous()
    return (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8)


def _from_bytes(data: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not dtype.is_complex:
        return data.clone().view(dtype).reshape(shape)
    real = torch.empty(0, dtype=dtype).real.dtype
    return torch.view_as_complex(data.clone().view(real).reshape(-1, 2)).reshape(shape)


def save_graph(graph: Graph, folder: str | Path) -> None:
    """Write graph.json and constants.safetensors into a folder, each under a temporary name first."""
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # NB: raw bytes, because safetensors lacks some dtypes; dtype and shape travel in the header.
    data = {n: _bytes(t) for n, t in graph.constants.items()}
    meta = {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in graph.constants.items()}
    _replace(folder / CONSTANTS_FILE, save(data, metadata={"constants": json.dumps(meta)}))
    _replace(folder / GRAPH_FILE, graph_to_json(graph).encode())


def load_graph(folder: str | Path) -> Graph:
    """Read what save_graph wrote. Raises SavedirError if a file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    try:
        text = (folder / GRAPH_FILE).read_text()
    except OSError as e:
        raise SavedirError(f"cannot read {folder / GRAPH_FILE}: {e.strerror}") from e
    graph = graph_from_json(text, str(folder / GRAPH_FILE))
    constants = {}
    path = folder / CONSTANTS_FILE
    try:
        with safe_open(str(path), "pt") as f:
            for name, (dtype, shape) in json.loads((f.metadata() or {})["constants"]).items():
                constants[name] = _from_bytes(f.get_tensor(name), getattr(torch, dtype), tuple(shape))
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError) as e:
        raise SavedirError(f"cannot read {path}: {e}") from e
    wanted = {t.name for t in graph.tensors if t.kind == "constant"}
    if missing := wanted - constants.keys():
        raise SavedirError(f"{path} lacks the constants {', '.join(sorted(missing))}")
    return replace(graph, constants=constants)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)
