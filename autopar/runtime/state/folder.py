"""The folder of a checkpoint: written aside and renamed once complete; its manifest, written last, holds the size of every file.
Must not know what the files hold.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autopar.errors import CheckpointError

log = logging.getLogger("autopar")
FORMAT = 1
MANIFEST = "autopar.json"


def aside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def remove(path: Path) -> None:
    """Whatever is there: a folder, a file, a link (not what it leads to), or nothing."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def start(folder: Path) -> Path:
    """An empty folder beside, to write to. Raises CheckpointError where something else than a checkpoint is in the place."""
    if folder.exists() and not (folder / MANIFEST).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is no complete checkpoint; save to another folder, or remove it first")
    tmp = aside(folder, "saving")
    remove(tmp)
    tmp.mkdir(parents=True)
    return tmp


def finish(tmp: Path, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest and put the folder in its place."""
    sizes = {f.name: f.stat().st_size for f in sorted(tmp.iterdir())}
    text = json.dumps({"format": FORMAT, **facts, "files": sizes}, indent=1)
    with (tmp / MANIFEST).open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    _sync(tmp)
    swap(tmp, folder)


def swap(tmp: Path, folder: Path) -> None:
    """Put a complete folder in its place. NB: at every moment one complete checkpoint is in `folder` or `.previous`."""
    previous = aside(folder, "previous")
    if os.path.lexists(folder):
        remove(previous)
        folder.rename(previous)
    tmp.rename(folder)
    _sync(folder.parent)
    remove(previous)


def _sync(folder: Path) -> None:
    """The names in it are on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def open_folder(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder (or the previous one, where a save was killed while it took its place) and its manifest.

    Raises CheckpointError where it is not complete.
    """
    folder = Path(folder).absolute()
    if not folder.exists():
        previous = aside(folder, "previous")
        if not (previous / MANIFEST).exists():
            raise CheckpointError(f"there is no checkpoint {folder}")
        log.warning("%s was being replaced when its save was killed; loading the checkpoint before that", folder)
        folder = previous
    if not (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder} is no complete checkpoint: it has no {MANIFEST}, which is written last; its save did not end")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes, form = dict(manifest["files"]), manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"cannot read {folder / MANIFEST}: {type(e).__name__}: {e}; it is truncated or damaged") from e
    if form != FORMAT:
        raise CheckpointError(f"{folder} has format {form}; this version of autopar reads {FORMAT}")
    for name, size in sizes.items():
        if not (folder / name).exists():
            raise CheckpointError(f"{folder} is not complete: {name} is missing{_whose(name)}")
        there = (folder / name).stat().st_size
        if there != size:
            raise CheckpointError(f"{folder / name} is damaged: it has {there} bytes, {size} were written{_whose(name)}")
    return folder, manifest


def _whose(file: str) -> str:
    rank = file.removeprefix("__").partition("_")[0] if file.endswith(".distcp") else file.removeprefix("rank").removesuffix(".pt")
    return f" (the file of rank {rank})" if rank.isdigit() else ""
