"""docs/configuration.md from the fields of args.py and the texts behind them: `python -m autopar.train.docs > docs/configuration.md`.
Must not know what settings do.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from autopar.train import args as config
from autopar.train.fill import describe

HEAD = """\
# Configuration of the trainer

Every setting of a run, made by `python -m autopar.train.docs` from `autopar/train/args.py`; [trainer.md](trainer.md) shows a run.
The same names are keys of a YAML file, options of the command line and fields of `autopar.train.TrainerArgs`.

```yaml
# config.yaml
compute_config: {plan_ngpus: 2, runtime_ngpus: 4, use_end2end: true}
seed: 0
micro_batch_size: 2
global_batch_size: 8
max_epochs: 4
model:
  type: net.Net                    # package.module.Name, or path/to/file.py:Name
  args: {dim: 16}
optimizer: {type: torch.optim.AdamW, args: {lr: 0.01}}
dataset:
  type: net.Data
  train_args: {size: 100}
```

    autopar train -f config.yaml --max_epochs 2 --model.args.dim 32
    torchrun --nproc_per_node 4 -m autopar.cli.train -f config.yaml --max_epochs 2 --model.args.dim 32

`autopar train` starts the processes of one machine itself, and with `--max-restarts N` again when one dies.
`--print-config` shows every setting and where it came from, and ends.

## Values

| written | means |
|---|---|
| `--a.b.c value`, `--a.b.c=value` | a nested key |
| `--a.b` | true |
| `--log.0.type x` | an entry of a list by its index; the index after the last adds one, and 0 makes a list where there is none |
| `--lr_scheduler!` | the key is removed: what the file says of it is forgotten |
| `-f a.yaml -f b.yaml` | dicts are merged; for anything else the later file counts, and the command line last |
| `$(model.args.dim)` | the value of another key. As a part of a text (`run-$(seed)`) it becomes text |
| `${HOME}` | an environment variable |
| `$$` | a dollar sign |
| `{__type: package.Name, a: 1}` | among arguments: the object `package.Name(a=1)` |
| `{__value_type: str, value: 1}` | among arguments: `str(1)`; any builtin type or `package.Name` |
| `{__value_type: import, value: package.name}` | among arguments: the object `package.name`, such as a function or a dtype |

Where no text is expected, and among the arguments of components, texts are read as Python literals: `1e-3`, `[1, 2]`, `None`, and `true`,
`false`, `null` as in YAML. `__value_type: str` keeps a text that looks like one.

The folder of the configuration file and the current one are searched for modules. Relative paths of files are relative to the current one.
A name of a class or function may be the object itself in Python: `{"model": {"type": Net}}`.

An unknown key at any depth, a wrong type, a part that is missing and settings that contradict are errors that name the key, the line of
the file it is in, and the nearest valid name. Paths of classes say which part of them does not import.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for cls in _classes(config.TrainerArgs):
        parts.append(f"## {_title(cls)}\n\n{inspect.getdoc(cls)}\n\n{_table(cls)}\n")
    return "\n".join(parts)


def _classes(cls: type, seen: list[type] | None = None) -> list[type]:
    """A config class and those in its fields, in order. ComputeConfig has a page of its own."""
    seen = [] if seen is None else seen
    if cls not in seen and cls.__module__ == config.__name__:
        seen.append(cls)
        for hint in get_type_hints(cls).values():
            for inner in _dataclasses(hint):
                _classes(inner, seen)
    return seen


def _dataclasses(hint: Any) -> Iterator[type]:
    if is_dataclass(hint) and isinstance(hint, type):
        yield hint
    for inner in get_args(hint):
        yield from _dataclasses(inner)


def _keys(cls: type) -> Iterator[str]:
    """Where instances of a class are in the tree."""
    for owner in _classes(config.TrainerArgs):
        for name, hint in get_type_hints(owner).items():
            if cls in _dataclasses(hint):
                above = next(_keys(owner), "")
                yield f"{above}.{name}".lstrip(".") + ("[i]" if "list" in str(hint) else "")


def _title(cls: type) -> str:
    return f"`{next(_keys(cls))}` ({cls.__name__})" if cls is not config.TrainerArgs else "The run (TrainerArgs)"


def _table(cls: type) -> str:
    hints = get_type_hints(cls, include_extras=True)
    texts = field_texts(cls)
    rows = ["| key | default | type | |", "|---|---|---|---|"]
    for f in fields(cls):
        rows.append(f"| `{f.name}` | {_default(f)} | {_cell(_kind(hints[f.name]))} | {_cell(texts[f.name])} |")
    return "\n".join(rows)


def _kind(hint: Any) -> str:
    inner = list(_dataclasses(hint))
    if config.ComputeConfig in inner:
        return "[ComputeConfig](parallelize.md#computeconfig)"
    if inner:
        return ("list of " if "list" in str(hint) else "") + " or ".join(f"[{c.__name__}](#{_anchor(c)})" for c in inner)
    return describe(hint).removesuffix(" or null").replace("the name of a class", "a class")


def _anchor(cls: type) -> str:
    return "".join(c for c in _title(cls).lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _default(f: Field[Any]) -> str:
    value = f.default if f.default is not MISSING else f.default_factory() if f.default_factory is not MISSING else None
    if is_dataclass(value):
        return ""
    names = {None: "", True: "true", False: "false"}
    return "" if value is None else f"`{names[value] if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def field_texts(cls: type) -> dict[str, str]:
    """The text behind each field of a class. Raises KeyError where one has none."""
    tree = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and isinstance(after, ast.Expr):
            value = after.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[statement.target.id] = value.value
    return {f.name: found[f.name] for f in fields(cls)}


if __name__ == "__main__":
    print(page(), end="")
