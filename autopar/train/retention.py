"""Which checkpoints are in a folder, which of them `last` and `best` are, and which are removed.
Must not know what is in a checkpoint, but for its manifest.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopar.errors import CheckpointError, suggest
from autopar.runtime.state import folder as files

log = logging.getLogger("autopar")
LINKS = ("last", "best")
_NAME = re.compile(r"\d{4,}-\d{7,}")


def name_of(epoch: int, step: int) -> str:
    return f"{epoch:04d}-{step:07d}"


@dataclass(frozen=True)
class Kept:
    """A complete checkpoint in a folder of them."""

    path: Path
    kind: str
    head: dict[str, Any]


def kept(save_dir: Path) -> list[Kept]:
    """The complete ones, the oldest first. NB: by time: a run that was resumed from an earlier step saves the same steps again."""
    out = []
    for path in save_dir.iterdir() if save_dir.is_dir() else ():
        if _NAME.fullmatch(path.name) and path.is_dir():
            try:
                manifest = json.loads((path / files.MANIFEST).read_text())
                out.append(Kept(path, manifest.get("kind", "dcp"), manifest.get("trainer") or {}))
            except (OSError, ValueError, AttributeError):
                continue  # not complete, or not ours
    return sorted(out, key=lambda k: (k.head.get("saved", 0), k.head.get("step", 0)))


def prune(save_dir: Path, keep: int | None) -> None:
    """Remove all but the last `keep`, and those that last and best lead to."""
    pinned = {(save_dir / name).resolve() for name in LINKS}
    for old in kept(save_dir)[: -keep if keep else 0]:
        if old.path.resolve() not in pinned:
            discard(old.path)


def discard(path: Path) -> None:
    """Remove a checkpoint. NB: renamed first, so that what is removed in part is not taken for one."""
    gone = files.aside(path, "removed")
    try:
        files.remove(gone)
        path.rename(gone)
        files.remove(gone)
    except OSError as e:
        log.warning("cannot remove the old checkpoint %s: %s", path, e)


def sweep(save_dir: Path) -> None:
    """Remove what killed saves have left."""
    for path in save_dir.iterdir():
        stem, _, what = path.name.removeprefix(".").rpartition(".")
        ours = path.name.startswith(".") and (_NAME.fullmatch(stem) or stem in LINKS)
        if ours and (what in ("saving", "removed") or (what == "previous" and os.path.lexists(save_dir / stem))):
            files.remove(path)


def point(place: Path, to: Path, link: bool) -> None:
    """Make `place` (last or best) a relative link to a checkpoint, or a copy of it."""
    tmp = files.aside(place, "saving")
    files.remove(tmp)
    if link:
        try:
            tmp.symlink_to(to.name)
        except OSError as e:
            what = f"cannot link {place} to {to.name}: {e.strerror}"
            raise CheckpointError(f"{what}; where links are not possible set checkpoint.symlink_best_and_last to false") from e
        if place.is_symlink():
            tmp.replace(place)
            return
    else:
        shutil.copytree(to, tmp, copy_function=_copy)
    files.swap(tmp, place)


def _copy(src: str, dst: str) -> None:
    """NB: a second name of the same file where the disk can do that: nothing writes to it again, and it outlives the first name."""
    try:
        os.link(src, dst)
    except OSError:
        shutil.copy2(src, dst)


def best_there(save_dir: Path) -> bool:
    return os.path.lexists(save_dir / "best")


def find(save_dir: Path, resume_from: str | None) -> Path | None:
    """See Checkpointer.find."""
    if resume_from is None:
        return None
    if resume_from not in LINKS:
        path = Path(resume_from).absolute()
        if os.path.lexists(path) or files.aside(path, "previous").exists():
            return path
        near = [k.path.name for k in kept(path.parent)]
        there = f"; in {path.parent}: {suggest(path.name, [*near, *(n for n in LINKS if (path.parent / n).exists())])}" if near else ""
        raise CheckpointError(f"checkpoint.resume_from: there is no checkpoint {path}{there}")
    place = save_dir / resume_from
    for there in (place, files.aside(place, "previous")):
        if not os.path.lexists(there):
            continue
        to = save_dir / os.readlink(there) if there.is_symlink() else there
        if to.exists() or files.aside(to, "previous").exists():
            return to
        raise CheckpointError(
            f"checkpoint.resume_from: {place} leads to {to.name}, which is not there any more; name another checkpoint, "
            f"or remove {place} to start anew"
        )
    return None


def check_writable(save_dir: Path) -> None:
    """Raises CheckpointError where no checkpoint could be written."""
    there = next(p for p in (save_dir, *save_dir.parents) if os.path.lexists(p))
    if not there.is_dir():
        raise CheckpointError(f"checkpoint.save_dir is {save_dir}, but {there} is no folder")
    try:
        probe = tempfile.mkdtemp(prefix=".autopar", dir=there)
        os.rmdir(probe)
    except OSError as e:
        raise CheckpointError(f"checkpoint.save_dir is {save_dir}, but {there} cannot be written to: {e.strerror}") from e
