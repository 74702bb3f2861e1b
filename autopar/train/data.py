"""Feed: a loader as windows of micro batches, one window per step, that can go on in the middle of an epoch.
Must not know models, other ranks, or how loaders are made.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from autopar.errors import ConfigError
from autopar.runtime.state.generators import random_state, restore
from autopar.train.flops import count_tokens, tensors
from autopar.train.state import randomness_kept


@dataclass(slots=True)
class Window:
    """The micro batches of one step on this rank, on its device. The first `real` ones are data, the others dummies."""

    batches: list[Any]
    real: int
    samples: int = 0
    tokens: int = 0

    @property
    def data(self) -> list[Any]:
        return self.batches if self.real == len(self.batches) else self.batches[: self.real]

    @property
    def dummies(self) -> list[bool] | None:
        n = len(self.batches)
        return None if self.real == n else [i >= self.real for i in range(n)]

    def cut(self, n: int) -> Window:
        """No more than n batches; never fewer than the real ones."""
        return self if n >= len(self.batches) else Window(self.batches[:n], self.real, self.samples, self.tokens)


class Feed:
    """Windows of `size` micro batches of a loader. A loader that has state_dict() and load_state_dict() goes on by itself.

    spare: a micro batch that stands in for dummies before there was any other. prepare: loader's batch -> the model's sample.
    layout: which part of the data this rank has, and how it is cut; a state is of use only where that is the same.
    """

    def __init__(
        self,
        loader: Any,
        size: int,
        *,
        device: torch.device,
        prepare: Callable[[Any], Any] | None = None,
        spare: Any = None,
        layout: dict[str, int] | None = None,
        waiting: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.loader, self.size, self.device, self.waiting = loader, size, device, waiting
        self._prepare = _on_device(prepare, device)
        self._spare = None if spare is None else self._prepare(spare)
        self.layout = layout or {}
        self._iterator: Iterator[Any] = iter(())
        self._start: dict[str, Any] | None = None  # random states when the epoch began
        self.epoch = self.taken = 0
        self._stateful = _keeps_place(loader)

    def length(self) -> int:
        """Micro batches of an epoch on this rank; -1 where the loader does not know."""
        try:
            return len(self.loader)
        except TypeError:
            return -1

    def begin(self, epoch: int, skip: int = 0, state: dict[str, Any] | None = None) -> None:
        """Start an epoch; after `skip` micro batches, or where `state` (of state(), on this rank) says."""
        if not (state and skip and state["epoch"] == epoch and state["layout"] == self.layout):
            state = None
        skip = state["taken"] if state else skip
        own = state["loader"] if state else None
        if state and state["random"] is not None:
            restore(state["random"])  # so that a shuffling sampler gives the same order again
        self._start = None if self._stateful else random_state()
        if own is not None and self._stateful:
            self.loader.load_state_dict(own)
        for part in _with_epochs(self.loader):
            part.set_epoch(epoch)
        self.epoch, self.taken = epoch, skip
        self._iterator = iter(self.loader)
        if own is None or not self._stateful:
            _skip(self._iterator, skip)

    def fetch(self) -> Window:
        """The next window; dummies fill it up where the data ends."""
        batches, samples, tokens = [], 0, 0
        with self.waiting():
            while len(batches) < self.size:
                batch = next(self._iterator, _END)
                if batch is _END:
                    break
                samples += batch_size(batch)
                tokens += count_tokens(batch) or 0
                batches.append(self._prepare(batch))
        real = len(batches)
        self.taken += real
        if real:
            self._spare = batches[-1]
        if real < self.size:
            if self._spare is None:
                raise ConfigError("this rank has no data, and no example of it to fill up with")
            batches += [self._spare] * (self.size - real)
        return Window(batches, real, samples, tokens)

    def state(self, *, ended: bool) -> dict[str, Any]:
        """What begin() needs to go on here. At the end of an epoch that is nothing: the next one begins anew."""
        if ended:
            return {"epoch": self.epoch + 1, "taken": 0, "loader": None, "random": None, "layout": self.layout}
        loader = self.loader.state_dict() if self._stateful else None
        return {"epoch": self.epoch, "taken": self.taken, "loader": loader, "random": self._start, "layout": self.layout}


_END = object()


def _keeps_place(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def batch_size(batch: Any) -> int:
    first = next(iter(tensors(batch)), None)
    return 1 if first is None or not first.dim() else first.shape[0]


def checksum(window: Window) -> int:
    """Of the data in a window: the same on ranks that were given the same."""
    total = window.real
    for batch in window.data:
        for t in tensors(batch):
            total = zlib.crc32(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), total)
    return total


def example(loader: Any, micro_batch_size: int) -> Any:
    """One collated micro batch, as the loader would give it; random states stay as they are.

    Raises ConfigError where there is not enough data for one.
    """
    dataset = getattr(loader, "dataset", None)
    with randomness_kept():
        if isinstance(loader, DataLoader) and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__"):
            n = len(dataset)
            if n == 0:
                raise ConfigError(f"the training set is empty: {type(dataset).__name__} has 0 samples")
            return loader.collate_fn([dataset[i % n] for i in range(micro_batch_size)])
        # NB: a loader that keeps its place would go on behind what is read here
        place = loader.state_dict() if _keeps_place(loader) else None
        batch = next(iter(loader), _END)
        if place is not None:
            loader.load_state_dict(place)
    if batch is _END:
        raise ConfigError(f"the training set is empty: {type(loader).__name__} gave no batch")
    return batch


def _on_device(prepare: Callable[[Any], Any] | None, device: torch.device) -> Callable[[Any], Any]:
    if device.type == "cpu":
        return prepare or (lambda batch: batch)

    def move(batch: Any) -> Any:
        batch = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), batch)
        return batch if prepare is None else prepare(batch)

    return move


def _with_epochs(loader: Any) -> list[Any]:
    """What takes set_epoch: the loader, its samplers, its data set; each once."""
    sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    parts = [loader, sampler, batches, getattr(batches, "sampler", None), getattr(loader, "dataset", None)]
    return list({id(p): p for p in parts if callable(getattr(p, "set_epoch", None))}.values())


def _skip(iterator: Iterator[Any], n: int) -> None:
    """Pass over n batches. Where this process reads them itself, by index, they need not be read."""
    indices = getattr(iterator, "_sampler_iter", None)
    if indices is not None and type(iterator).__name__ == "_SingleProcessDataLoaderIter" and not hasattr(iterator, "dataset_iter"):
        fetcher = getattr(iterator, "_dataset_fetcher", None)
        if type(fetcher).__name__ == "_MapDatasetFetcher":
            for _ in range(n):
                next(indices, None)
            return
    for _ in range(n):
        if next(iterator, _END) is _END:
            return
