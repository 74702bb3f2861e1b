"""autopar checkpoint: merge, convert and show.
Must not know the files of a checkpoint; train/merged.py does.
"""

from __future__ import annotations

from argparse import Namespace
from datetime import datetime
from math import prod
from pathlib import Path
from typing import Any

from autopar.train.merged import Source, convert, open_source
from autopar.train.retention import LINKS, kept


def run(args: Namespace) -> int:
    if args.what == "show":
        print(show(Path(args.source)))
    else:
        convert(args.source, args.out, args.to if args.what == "convert" else "merged")
        print(f"wrote {args.out}, {_bytes(_size(Path(args.out)))}")
    return 0


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.iterdir())


def show(path: Path) -> str:
    found = kept(path)
    return _folder(path, found) if found else _checkpoint(open_source(path))


def _folder(path: Path, found: list[Any]) -> str:
    """The checkpoints of a run, the oldest first."""
    rows = [("checkpoint", "step", "epoch", "val loss", "save type", "")]
    for k in found:
        names = [n for n in LINKS if (path / n).is_symlink() and (path / n).resolve() == k.path.resolve()]
        rows.append((k.path.name, *(_text(k.head.get(x)) for x in ("step", "epoch", "val_loss")), k.kind, " ".join(names)))
    return _table(rows)


def _checkpoint(source: Source) -> str:
    head, weights = source.head, source.weights()
    whose = f"{head['world']} in scale units of {head['unit']}" if head.get("world") else "?"
    parameters = sum(prod(shape) for shape, _ in weights.values())
    rows = [
        ("checkpoint", str(source.path)),
        ("save type", source.kind),
        ("model", _text(head.get("model"))),
        ("step", _text(head.get("step"))),
        ("epoch", _text(head.get("epoch"))),
        ("val loss", _text(head.get("val_loss"))),
        ("best val loss", _text(head.get("best_val_loss"))),
        ("saved", datetime.fromtimestamp(head["saved"]).isoformat(" ", "seconds") if head.get("saved") else "-"),
        ("ranks", whose),
        ("plan", head.get("mesh") or "one device per unit"),
        ("total", f"{_bytes(source.bytes())}, {len(weights)} tensors of the model with {parameters:,} entries"),
    ]
    lines = [f"{name:<14} {value}" for name, value in rows]
    tensors = [(n, "x".join(map(str, shape)) or "scalar", str(dtype).removeprefix("torch.")) for n, (shape, dtype) in weights.items()]
    return "\n".join([*lines, "", _table([("tensor", "shape", "dtype"), *tensors])])


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _bytes(n: int) -> str:
    return f"{n:,} bytes" if n < 10_000 else f"{n / 1e6:,.2f} MB"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
