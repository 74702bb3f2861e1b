"""Savedir: the folder of one compiled module, written atomically and found again by fingerprint.
Must not know how its contents were made (parallelize.py) or how they are run (runtime).

Layout: <gen_savedir>/<module qualified name>/<instance name or _>/ with manifest.json (written last), graph.json,
constants.safetensors, plan.json, model.py, rank<r>.py, weights.safetensors and buffers.safetensors. Nothing is a pickle.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from autopar.config import ReuseType
from autopar.errors import ConfigError, SavedirError

if TYPE_CHECKING:  # NB: the runtime reads manifests, and must not load the compiler for it
    from autopar.codegen.identity import Identity

FORMAT = 1


def folder_of(gen_savedir: str | Path, module_name: str, instance_name: str | None) -> Path:
    """Where a module's code goes. Raises ConfigError for an instance name that is no plain folder name."""
    if instance_name is not None and not re.fullmatch(r"\w[\w.=+@-]*", instance_name):
        raise ConfigError(f"instance_name {instance_name!r} must be a plain folder name: letters, digits and any of _.=+@-")
    return Path(gen_savedir) / module_name / (instance_name or "_")


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
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not isinstance(manifest.get("files"), dict):
        found = f"has format {manifest['format']!r}" if isinstance(manifest, dict) and "format" in manifest else "is no manifest of autopar"
        raise SavedirError(f"{path} {found}; this version reads format {FORMAT}. Compile with reuse='override'")
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
    if manifest.get("not_sent"):
        return Decision("nothing", f"the folder was received without {', '.join(manifest['not_sent'])}")
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


def check_writable(folder: Path) -> None:
    """Raise SavedirError where the folder could not be written: at once, not after a long compile."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=folder.parent) as f:
            f.write(b"autopar")
    except OSError as e:
        raise _unwritable(folder, e) from e


def write(folder: Path, identity: Identity, fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder beside the target, then rename it into place: a killed compile leaves nothing that loads.

    Raises SavedirError where the place cannot be written (read-only, full).
    """
    mine = f"{socket.gethostname()}-{os.getpid()}"
    tmp, old = (folder.with_name(f".{folder.name}.{kind}-{mine}") for kind in ("tmp", "old"))
    try:
        _remove_leftovers(folder)
        tmp.mkdir(parents=True)
        fill(tmp)
        # NB: code may be edited by hand while debugging, so only data files are held to their size.
        files = {p.name: None if p.suffix == ".py" else p.stat().st_size for p in sorted(tmp.iterdir())}
        manifest = {"format": FORMAT, "graph": identity.graph, "code": identity.code, "files": files}
        (tmp / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        _swap(tmp, folder, old)
    except (OSError, SafetensorError) as e:
        raise _unwritable(folder, e) from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _swap(new: Path, folder: Path, old: Path) -> None:
    """Put a folder in another's place. Of two processes that do this at once, the later wins."""
    for attempt in range(20):
        with contextlib.suppress(FileNotFoundError):
            folder.rename(old)
        try:
            new.rename(folder)
            return
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 19:
                raise
            shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Temporary folders of compiles on this machine that were killed."""
    host = re.escape(socket.gethostname())
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.(tmp|old)-{host}-(\d+)")
    for p in folder.parent.iterdir() if folder.parent.is_dir() else ():
        if (m := pattern.fullmatch(p.name)) and not _runs(int(m[2])):
            shutil.rmtree(p, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


def _unwritable(folder: Path, e: Exception) -> SavedirError:
    why = getattr(e, "strerror", None) or str(e)
    full = getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in why
    return SavedirError(
        f"cannot write generated code to {folder}: {why}; {'free some space or ' if full else ''}choose another gen_savedir"
    )
