"""Saved checkpoints as wholes, in one process and without a model: merged into one file, converted, described.
Must not know how they are loaded into a model (resume.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from autopar.errors import CheckpointError, ConfigError, suggest
from autopar.runtime.state import checkpoint, planner
from autopar.runtime.state import folder as files
from autopar.runtime.state.disk import save_file
from autopar.runtime.state.merge import Whole, join_ranks, read_rank
from autopar.runtime.state.onefile import save_weights

MERGED = "merged.pt"  # the file of a merged checkpoint; sharded and deduped ones have one per rank
KEEP = ("status", "lr_scheduler", "args", "head")  # of the trainer's state, what is taken from rank 0
TARGETS = ("merged", "dcp", "safetensors")


def rank_file(rank: int) -> str:
    return f"rank{rank}.pt"


def join(owns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The trainer's state of all ranks as one: a list of the dataloaders' states, and of every value of the custom data."""
    keys = {key: None for own in owns for key in own["custom"]}
    return {
        **{k: owns[0][k] for k in KEEP},
        "dataloader": [own["dataloader"] for own in owns],
        "custom": {key: [own["custom"].get(key) for own in owns] for key in keys},
    }


def part(joined: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """What join() was given for a rank."""
    custom = {key: values[rank] for key, values in joined["custom"].items()}
    return {**{k: joined[k] for k in KEEP}, "dataloader": joined["dataloader"][rank], "custom": custom}


def merged_file(whole: Whole, joined: Mapping[str, Any]) -> dict[str, Any]:
    """What a merged checkpoint holds: 'model' and 'optimizer' are what the original ones load. No random states."""
    model, optimizer = whole.state_dicts()
    names = None if whole.groups is None else [g["names"] for g in whole.groups]
    return {
        "autopar": {"format": files.FORMAT, "kind": "merged"},
        "model": model,
        "optimizer": optimizer,
        "names": {"model": whole.names, "params": whole.params, "groups": names},
        "trainer": joined,
    }


def read_merged(path: Path) -> Mapping[str, Any]:
    """Raises CheckpointError for a file that is missing, damaged, or something else."""
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # NB: torch raises RuntimeError, UnpicklingError, EOFError, ... for a damaged file
        why = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
        raise CheckpointError(f"cannot read {path}: {why}; it is truncated, damaged, or no checkpoint") from e
    head = found.get("autopar") if isinstance(found, Mapping) else None
    if not isinstance(head, Mapping) or head.get("kind") != "merged":
        if isinstance(head, Mapping) and "rank" in head:
            raise CheckpointError(f"{path} is the file of rank {head['rank']} of {head['world']}; give its folder, {path.parent}")
        raise CheckpointError(f"{path} is no merged checkpoint; make one with `autopar checkpoint merge FOLDER OUT`")
    if head["format"] != files.FORMAT:
        raise CheckpointError(f"{path} has format {head['format']}; this version of autopar reads {files.FORMAT}")
    return found


@dataclass(frozen=True)
class Source:
    """A complete checkpoint of any save type. Tensors are read when asked for."""

    kind: str
    path: Path
    manifest: dict[str, Any]
    rank_files: tuple[Path, ...] = ()  # of sharded and deduped ones

    @cached_property
    def _parts(self) -> list[Mapping[str, Any]]:
        return sorted((read_rank(f) for f in self.rank_files), key=lambda p: p["autopar"]["rank"])

    @cached_property
    def _file(self) -> Mapping[str, Any]:
        return read_merged(self.path / MERGED if self.path.is_dir() else self.path)

    @cached_property
    def trainer(self) -> dict[str, Any] | None:
        """As join() makes it; None for what a trainer has not saved."""
        if self.kind == "merged":
            return self._file["trainer"]
        if self.kind != "dcp":
            owns = [p.get("trainer") for p in self._parts]
            return join(owns) if all(owns) else None
        found = checkpoint.read_objects(self.path, lambda n: n == "extra" or n.startswith("local."))
        extra = found.pop("extra")
        return join([{**extra, **found[f"local.{r}"]} for r in range(len(found))]) if found else None

    @property
    def head(self) -> dict[str, Any]:
        """Step, epoch, validation loss, layout."""
        return {**self.manifest, **((self.trainer or {}).get("head") or {})}

    def state_dicts(self) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """Of the original module and optimizer. NB: of a merged one they stay on the disk until they are read."""
        return (self._file["model"], self._file["optimizer"]) if self.kind == "merged" else self.whole().state_dicts()

    def random(self) -> dict[str, Any]:
        """'random.RANK' -> the random states of a rank."""
        if self.kind == "dcp":
            return checkpoint.read_objects(self.path, lambda n: n.startswith("random."))
        return {f"random.{p['autopar']['rank']}": p["random"] for p in self._parts if "random" in p} if self.rank_files else {}

    def whole(self) -> Whole:
        if self.kind == "dcp":
            return checkpoint.read_whole(self.path)
        if self.kind != "merged":
            return join_ranks(list(self._parts))
        names, model, optimizer = self._file["names"], self._file["model"], self._file["optimizer"]
        first = {name: model[name] for name in names["model"]}
        if optimizer is None:
            return Whole(first, names["model"], names["params"], None, {})
        groups, state = [], {}
        for g, own in zip(optimizer["param_groups"], names["groups"], strict=True):
            groups.append({**{k: v for k, v in g.items() if k != "params"}, "names": own})
            listed = names["params"] if len(names["groups"]) == 1 else own
            state |= {n: optimizer["state"][i] for i, n in zip(g["params"], listed, strict=True) if i in optimizer["state"]}
        return Whole(first, names["model"], names["params"], groups, state)

    def weights(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> whole shape and dtype."""
        if self.kind == "dcp":
            metadata = planner.read_metadata(self.path)
            of = {n: metadata.state_dict_metadata[checkpoint.MODEL + n] for n in planner.shapes_of(metadata, checkpoint.MODEL)}
            return {n: (tuple(m.size), m.properties.dtype) for n, m in of.items()}
        if self.kind == "merged":
            return {n: (tuple(t.shape), t.dtype) for n, t in self._file["model"].items()}
        dtypes = {n: t.dtype for p in self._parts for n, t in p["model"].items()}
        return {n: (tuple(d["shape"]), dtypes[n]) for n, d in self._parts[0]["layout"].items()}

    def bytes(self) -> int:
        if self.rank_files:
            return sum(f.stat().st_size for f in self.rank_files)
        return self.path.stat().st_size if self.path.is_file() else sum(self.manifest["files"].values())


def open_source(source: str | Path | Sequence[str | Path]) -> Source:
    """A checkpoint's folder, a merged file, or the files of all ranks. Raises CheckpointError for what is not complete."""
    if not isinstance(source, (str, Path)):
        if not source:
            raise CheckpointError("there is nothing to merge; give a checkpoint's folder, or one file per rank")
        paths = [Path(s) for s in source]
        if len(paths) > 1 or (paths[0].is_file() and _is_rank_file(paths[0])):
            head = read_rank(paths[0])["autopar"]
            return Source(head["kind"], paths[0].absolute().parent, {"world": head["world"], "unit": 1, "mesh": ""}, tuple(paths))
        source = paths[0]
    path = Path(source).absolute()
    if path.is_file():
        return Source("merged", path, {})
    path, manifest = files.open_folder(path)
    kind = manifest.get("kind", "dcp")
    parts = tuple(path / rank_file(r) for r in range(manifest["world"])) if kind in ("sharded", "deduped") else ()
    return Source(kind, path, manifest, parts)


def _is_rank_file(path: Path) -> bool:
    try:
        return "rank" in read_rank(path)["autopar"]
    except CheckpointError:
        return False


def merge_checkpoint(checkpoint_files: Sequence[str | Path] | str | Path, output_file: str | Path) -> None:
    """Merge a checkpoint (its folder, or the files of all its ranks) into one file, which loads under any plan and world size.

    Its 'model' and 'optimizer' are state dicts of the original ones. Random states are left out. Raises CheckpointError for a checkpoint
    that is not complete.
    """
    convert(checkpoint_files, output_file, "merged")


def convert(source: Sequence[str | Path] | str | Path, out: str | Path, to: str) -> None:
    """Write a checkpoint as: merged (a file), dcp (a folder), safetensors (a file of the weights alone)."""
    if to not in TARGETS:
        why = "; sharded and deduped ones are of one plan, and made by training under it" if to in ("sharded", "deduped") else ""
        raise ConfigError(f"cannot convert to {to!r}{why}. {suggest(to, TARGETS)}")
    found, out = open_source(source), Path(out).absolute()
    if to != "dcp":
        if out.is_dir():
            raise CheckpointError(f"{out} is a folder; give the name of a file to write")
        out.parent.mkdir(parents=True, exist_ok=True)
    if to == "safetensors":
        save_weights(found.whole().state_dicts()[0], out)
        return
    joined = found.trainer
    if to == "merged":
        tmp = files.aside(out, "saving")
        try:
            save_file(tmp, merged_file(found.whole(), joined or join([_nothing(found.manifest)])))
            tmp.replace(out)
        finally:
            tmp.unlink(missing_ok=True)
        return
    objects: dict[str, Any] = found.random()
    layout = {k: found.head.get(k, d) for k, d in (("world", 1), ("unit", 1), ("mesh", ""))}
    if joined is not None:
        objects["extra"] = {k: joined[k] for k in KEEP}
        objects |= {f"local.{r}": part(joined, r) for r in range(len(joined["dataloader"]))}
    tmp = files.start(out)
    try:
        checkpoint.write_whole(tmp, found.whole(), objects)
        files.finish(tmp, out, {"kind": "dcp", **layout, "trainer": (joined or {}).get("head")})
    finally:
        files.remove(tmp)


def _nothing(manifest: Mapping[str, Any]) -> dict[str, Any]:
    head = {k: manifest.get(k) for k in ("world", "unit", "mesh")}
    return {"status": {}, "lr_scheduler": None, "args": {}, "head": head, "dataloader": None, "custom": {}}
