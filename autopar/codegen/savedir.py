"""Savedir: the folder of one compiled module, written atomically and found again by fingerprint.
Must not know how its contents were made (parallelize.py) or how they are run (runtime).

Layout: <gen_savedir>/<module qualified name>/<instance name or _>/ with manifest.json (written last), graph.json,
constants.safetensors, plan.json, model.py, rank<r>.py and weights.safetensors. Nothing is a pickle.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from autopar.config import ComputeConfig, ReuseType
from autopar.errors import SavedirError

FORMAT = 1
TRACE_FIELDS = ("constant_folding", "trace_strategy", "user_config")  # of ComputeConfig: what decides the graph


def folder_of(gen_savedir: str | Path, module_name: str, instance_name: str | None) -> Path:
    return Path(gen_savedir) / module_name.replace(":", ".") / (instance_name or "_")


@dataclass(frozen=True)
class Identity:
    """What a folder was made from: named fields, so that a mismatch can be explained."""

    graph: dict[str, Any]
    code: dict[str, Any]

    def differences(self, other: Mapping[str, Any], part: str) -> list[str]:
        """One line per field of a part ('graph' or 'code') that differs from a stored manifest."""
        mine, theirs = getattr(self, part), other.get(part, {})
        keys = [*mine, *(k for k in theirs if k not in mine)]
        return [f"{k}: saved {theirs.get(k)!r}, now {mine.get(k)!r}" for k in keys if _plain(mine.get(k)) != theirs.get(k)]


def identify(module: torch.nn.Module, dummy_args: Mapping[str, Any], policy: Any, config: ComputeConfig, version: str) -> Identity:
    """The identity of a compile: module source, input schema, trace settings; then policy, configuration and version."""
    settings = config.to_dict()
    graph = {
        "module": f"{type(module).__module__}.{type(module).__qualname__}",
        "source": _source_digest(module),
        "structure": _structure_digest(module),
        "training": module.training,
        "inputs": _schema(dummy_args),
        **{k: settings.pop(k) for k in TRACE_FIELDS},
    }
    code = {"policy": policy_name(policy), "autopar": version, **settings}
    return Identity(_plain(graph), _plain(code))


def policy_name(policy: Any) -> str:
    """A policy's identity: its name, or the digest of its source and of what it closes over; a Plan's digest."""
    if isinstance(policy, str):
        return policy
    if hasattr(policy, "to_json"):
        return "plan:" + _digest(policy.to_json())
    if isinstance(policy, partial):
        return f"{policy_name(policy.func)}({_settled((policy.args, policy.keywords))})"
    try:
        source = inspect.getsource(policy)
    except (OSError, TypeError):
        source = getattr(policy, "__qualname__", repr(policy))
    name = f"{getattr(policy, '__module__', '')}.{getattr(policy, '__qualname__', type(policy).__qualname__)}"
    # NB: mesh_policy makes one function per mesh; their source is the same. A function may close over itself.
    held = [_settled(c.cell_contents) for c in getattr(policy, "__closure__", None) or () if c.cell_contents is not policy]
    return f"{name}:{_digest(source + ''.join(held))}"


def _settled(x: Any) -> str:
    """A value as text that is the same in every process: functions by identity, not by address."""
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{k!r}: {_settled(v)}" for k, v in x.items()) + "}"
    if isinstance(x, (list, tuple)):
        return "(" + ", ".join(map(_settled, x)) + ")"
    return policy_name(x) if callable(x) else repr(x)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete folder; None where there is nothing or only a torn write.

    Raises SavedirError where files the manifest names are missing or truncated, or its format is another one.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise SavedirError(f"cannot read {path}: {e.strerror}") from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise SavedirError(f"{path} is damaged ({e}); delete the folder or compile with reuse='override'") from e
    if manifest.get("format") != FORMAT:
        raise SavedirError(f"{path} has format {manifest.get('format')!r}; this version reads {FORMAT}. Compile with reuse='override'")
    for name, size in manifest["files"].items():
        file = folder / name
        if not file.exists():
            raise SavedirError(f"{folder} is incomplete: {name} is missing; compile again with reuse='override'")
        if size is not None and file.stat().st_size != size:
            raise SavedirError(
                f"{folder} is damaged: {name} has {file.stat().st_size} bytes, {size} were written; compile again with reuse='override'"
            )
    return manifest


@dataclass(frozen=True)
class Decision:
    """What to reuse of a folder: 'code' (everything), 'graph' (graph and weights), or nothing."""

    reuse: str  # 'code' | 'graph' | 'nothing'
    reason: str


def decide(folder: Path, identity: Identity, reuse: ReuseType) -> Decision:
    """Apply the reuse policy. Raises SavedirError for MATCH with a difference, naming each differing field."""
    if reuse is ReuseType.OVERRIDE:
        return Decision("nothing", "reuse='override'")
    try:
        manifest = read_manifest(folder)
    except SavedirError:
        if reuse is ReuseType.MATCH:
            raise
        return Decision("nothing", "the saved folder is damaged")
    if manifest is None:
        return Decision("nothing", "nothing was generated before")
    graph, code = identity.differences(manifest, "graph"), identity.differences(manifest, "code")
    if reuse is ReuseType.GRAPH:
        return Decision("nothing", "; ".join(graph)) if graph else Decision("graph", "the graph matches")
    if not graph and not code:
        return Decision("code", "everything matches")
    if reuse is ReuseType.MATCH:
        lines = "\n  ".join(graph + code)
        raise SavedirError(
            f"{folder} was generated from another configuration:\n  {lines}\n"
            "use reuse='moo' to regenerate where it differs, 'override' always, or another instance_name to keep both"
        )
    return Decision("nothing", "; ".join(graph + code))


def write(folder: Path, identity: Identity, fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder beside the target, then rename it into place: a killed compile leaves nothing that loads.

    Raises SavedirError where the place cannot be written (read-only, full).
    """
    tmp = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        fill(tmp)
        # NB: code may be edited by hand while debugging, so only data files are held to their size.
        files = {p.name: None if p.suffix == ".py" else p.stat().st_size for p in sorted(tmp.iterdir())}
        manifest = {"format": FORMAT, "graph": identity.graph, "code": identity.code, "files": files}
        (tmp / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        if folder.exists():
            folder.rename(old)
        tmp.rename(folder)
    except (OSError, SafetensorError) as e:
        why = getattr(e, "strerror", None) or e
        raise SavedirError(f"cannot write generated code to {folder}: {why}; choose another gen_savedir") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _plain(x: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(x, default=repr))


def _digest(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


def _source_digest(module: torch.nn.Module) -> str:
    """Digest of the source of every module class in use; a class without source counts by name."""
    texts = []
    for cls in sorted({type(m) for m in module.modules()}, key=lambda c: (c.__module__, c.__qualname__)):
        name = f"{cls.__module__}.{cls.__qualname__}"
        if cls.__module__.split(".")[0] == "torch":
            texts.append(name)
            continue
        try:
            texts.append(name + inspect.getsource(cls))
        except (OSError, TypeError):
            texts.append(name)
    return _digest("\n".join(texts))


def _structure_digest(module: torch.nn.Module) -> str:
    """Digest of the module tree as printed, and of every parameter's and buffer's name, shape and dtype."""
    rows = [repr(module)]
    for name, p in module.named_parameters(remove_duplicate=False):
        rows.append(f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}")
    rows += [f"{name} {tuple(b.shape)} {b.dtype}" for name, b in module.named_buffers(remove_duplicate=False)]
    return _digest("\n".join(rows))


def _schema(x: Any) -> Any:
    """Shapes and dtypes of a nested input; literals by value."""
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    if isinstance(x, Mapping):
        return {str(k): _schema(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_schema(v) for v in x]
    if hasattr(x, "__dataclass_fields__"):
        return {"class": type(x).__qualname__, **{k: _schema(getattr(x, k)) for k in x.__dataclass_fields__}}
    return repr(x)
