"""torch.distributed.checkpoint (DCP) planners: what this rank writes and reads as rectangles of whole tensors, and a reader of metadata.
Must not know modules: it is handed tensors with layouts under the names they are stored by.

NB: DCP itself unpickles its metadata file freely; here only the classes that metadata is made of may be in it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, Metadata, SavePlan
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.futures import Future

from autopar.errors import CheckpointError
from autopar.runtime.state.layout import Box, Layout
from autopar.runtime.state.stored import Locator, Stored, locate, read

Parts = list[tuple[Box, torch.Tensor]]


class SavePlanner(DefaultSavePlanner):
    """Writes tensors (name -> layout and local tensor) and objects (name -> anything torch.load takes with weights_only=True)."""

    def __init__(self, tensors: Mapping[str, tuple[Layout, torch.Tensor]], objects: Mapping[str, Any]):
        super().__init__(flatten_state_dict=False)
        self.tensors, self.objects = tensors, objects
        self.views: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def set_up_planner(self, state_dict: dict, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO) for name in self.objects]
        for name, (layout, t) in self.tensors.items():
            for box, view in layout.cut(t):
                offsets = torch.Size(box.offsets)
                self.views[name, box.offsets] = view
                data = TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(box.sizes)),
                    properties=TensorProperties(dtype=t.dtype),
                    size=torch.Size(layout.shape),
                )
                items.append(WriteItem(index=MetadataIndex(name, offsets), type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        name = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            out = io.BytesIO()
            torch.save(self.objects[name], out)
            return out
        return self.views[name, tuple(write_item.index.offset)].detach()


class ReadPlanner(LoadPlanner):
    """Fills the views of tensors (name -> rectangles)."""

    def __init__(self, tensors: Mapping[str, Parts]):
        self.tensors = tensors
        self.targets: list[torch.Tensor] = []

    def set_up_planner(self, state_dict: dict, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, parts in self.tensors.items():
            chunks = [Box(tuple(c.offsets), tuple(c.sizes)) for c in self.metadata.state_dict_metadata[name].chunks]
            for i, chunk in enumerate(chunks):
                for box, view in parts:
                    both = chunk.meet(box)
                    if both is None:
                        continue
                    dest = MetadataIndex(name, box.offsets, len(self.targets))
                    self.targets.append(box.within(view, both))
                    at = torch.Size(a - b for a, b in zip(both.offsets, chunk.offsets, strict=True))
                    stored = MetadataIndex(name, chunk.offsets, i)
                    items.append(ReadItem(LoadItemType.TENSOR, dest, torch.Size(both.offsets), stored, at, torch.Size(both.sizes)))
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("objects are read by read_objects")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.targets[read_item.dest_index.index]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


class Reader(FileSystemReader):
    """DCP's reader of a folder, with metadata that was read (by read_metadata below) before."""

    def __init__(self, path: Path, metadata: Metadata):
        super().__init__(path)
        self.known = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return replace(self.known)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Into the memory of the targets, without a copy between, and of a stored rectangle only the rows that are wanted."""
        files: dict[str, list[tuple[Any, ReadItem]]] = {}
        for item in plan.items:
            at = self.known.storage_data[item.storage_index]
            files.setdefault(at.relative_path, []).append((at, item))
        for path, items in files.items():
            with (Path(self.path) / path).open("rb") as f:
                last, found, find = None, None, Locator()
                for at, item in sorted(items, key=lambda x: x[0].offset):
                    if at.offset != last:
                        last, found = at.offset, _located(f, at, item.storage_index, find)
                    read(f, found, item.storage_offsets, planner.resolve_tensor(item).detach())
        done: Future[None] = Future()
        done.set_result(None)
        return done


_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        found = getattr(torch, name, None) if module == "torch" else None
        if found is torch.Size or isinstance(found, torch.dtype):
            return found
        raise CheckpointError(f"the metadata holds a {module}.{name}, which has no place there; it is not loaded")


def read_metadata(folder: Path) -> Metadata:
    """Raises CheckpointError for a file that is missing, damaged, or holds anything but DCP's metadata."""
    file = folder / ".metadata"
    try:
        with file.open("rb") as f:
            found = _Unpickler(f).load()
    except CheckpointError:
        raise
    except Exception as e:  # NB: a damaged pickle raises nearly anything
        raise CheckpointError(f"cannot read {file}: {type(e).__name__}: {e}; it is truncated or damaged") from e
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{file} holds a {type(found).__name__}, no DCP metadata")
    return found


def shapes_of(metadata: Metadata, prefix: str) -> dict[str, tuple[int, ...]]:
    """name without the prefix -> whole shape, of the tensors stored under it."""
    return {
        n.removeprefix(prefix): tuple(m.size)
        for n, m in metadata.state_dict_metadata.items()
        if n.startswith(prefix) and isinstance(m, TensorStorageMetadata)
    }


def objects_of(metadata: Metadata) -> set[str]:
    return {n for n, m in metadata.state_dict_metadata.items() if isinstance(m, BytesStorageMetadata)}


def _located(file: BinaryIO, at: Any, index: MetadataIndex, find: Callable[..., Any] = locate) -> Stored | torch.Tensor:
    try:
        return find(file, at)
    except Exception as e:  # NB: torch raises RuntimeError, UnpicklingError, EOFError, ...
        raise CheckpointError(f"cannot read {index.fqn} in {file.name}: {type(e).__name__}: {e}") from e


def _stored(folder: Path, metadata: Metadata, index: MetadataIndex) -> Any:
    at = metadata.storage_data[index]
    with (folder / at.relative_path).open("rb") as f:
        f.seek(at.offset)
        try:
            return torch.load(io.BytesIO(f.read(at.length)), map_location="cpu", weights_only=True)
        except Exception as e:  # NB: torch raises RuntimeError, UnpicklingError, EOFError, ...
            raise CheckpointError(f"cannot read {index.fqn} in {folder / at.relative_path}: {type(e).__name__}: {e}") from e


def read_objects(folder: Path, metadata: Metadata, names: list[str]) -> dict[str, Any]:
    """On this rank alone."""
    return {name: _stored(folder, metadata, MetadataIndex(name)) for name in names}


def read_slice(folder: Path, metadata: Metadata, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
    """A slice of a whole tensor, on this rank alone; only rows of it are in memory."""
    m = metadata.state_dict_metadata[name]
    spans = [s.indices(n)[:2] for s, n in zip(slices or (slice(None),) * len(m.size), m.size, strict=True)]
    wanted = Box(tuple(a for a, _ in spans), tuple(b - a for a, b in spans))
    out = torch.empty(wanted.sizes, dtype=m.properties.dtype)
    for c in m.chunks:
        chunk = Box(tuple(c.offsets), tuple(c.sizes))
        both = chunk.meet(wanted)
        if both is not None:
            index = MetadataIndex(name, c.offsets)
            at = metadata.storage_data[index]
            with (folder / at.relative_path).open("rb") as f:
                inside = [a - b for a, b in zip(both.offsets, chunk.offsets, strict=True)]
                read(f, _located(f, at, index), inside, wanted.within(out, both))
    return out
