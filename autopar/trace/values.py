"""Values: which recorded value each live tensor is, and which tensors share memory.
Must not know ops or modules. Tensors are held weakly: the table never keeps an intermediate alive.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from autopar.ir.graph import Ref
from autopar.trace.recording import RecordedValue

# What a value depends on, as bits. Only the tracer needs them; a recording keeps `from_params`.
INPUT = 1  # the numbers of an input or a buffer
PARAM = 2  # the numbers of a parameter
RANDOM = 4  # a random draw
SHAPE = 8  # its shape depends on the shapes of inputs
DATA_SHAPE = 16  # its shape depends on numbers (nonzero, masked_select)
NUMBERS = INPUT | PARAM | RANDOM

Tensor = torch.Tensor
_storage_of = torch._C.TensorBase.untyped_storage


class _TensorRef(weakref.ref):  # type: ignore[type-arg]
    __slots__ = ("key", "memory")

    key: int
    memory: int


class Values:
    """The list of recorded values and the identity map from live tensors to them."""

    def __init__(self) -> None:
        self.list: list[RecordedValue] = []
        self.refs: list[Ref] = []
        self.bits: list[int] = []
        self._ids: dict[int, int] = {}  # id(tensor) -> value id
        self._weak: dict[int, _TensorRef] = {}
        self._memories: dict[int, tuple[int, set[int]]] = {}  # address of a storage -> (its number, ids of live tensors in it)
        self._next = 0
        self._dtypes: dict[torch.dtype, str] = {}

    def find(self, tensor: Tensor) -> int | None:
        return self._ids.get(id(tensor))

    def tensor(self, tensor: Tensor, name: str, origin: str, *, grad: bool, bits: int, qualified: str = "") -> int:
        """A new value that `tensor` is from now on."""
        shape, dtype = tensor.shape, tensor.dtype
        spelled = self._dtypes.get(dtype)
        if spelled is None:
            spelled = self._dtypes[dtype] = str(dtype).removeprefix("torch.")
        memory = self._track(tensor)
        v = RecordedValue(name, "tensor", tuple(shape), spelled, grad, memory, origin, qualified, bool(bits & PARAM))
        vid = self._append(v, bits)
        self._ids[id(tensor)] = vid
        return vid

    def version(self, key: int, old: int, grad: bool, bits: int) -> int:
        """A new value for the live tensor with this id: the same memory after a write."""
        v = self.list[old]
        vid = self._append(RecordedValue(v.name, v.kind, v.shape, v.dtype, grad, v.storage, "op", "", bool(bits & PARAM)), bits)
        self._ids[key] = vid
        return vid

    def scalar(self, value: Any, name: str, bits: int) -> int:
        kind = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"
        self._next += 1
        return self._append(RecordedValue(name, "scalar", (), kind, False, self._next, "op", "", bool(bits & PARAM)), bits)

    def aliases(self, tensor: Tensor) -> list[tuple[int, int]]:
        """(id of the tensor, value) of every known live tensor in the same memory, the tensor itself first."""
        weak = self._weak.get(id(tensor))
        if weak is None:
            return []
        _, keys = self._memories[weak.memory]
        others = sorted((self._ids[k], k) for k in keys if k != id(tensor))
        return [(id(tensor), self._ids[id(tensor)]), *((k, v) for v, k in others)]

    def _append(self, value: RecordedValue, bits: int) -> int:
        vid = len(self.list)
        self.list.append(value)
        self.refs.append(Ref(vid))
        self.bits.append(bits)
        return vid

    def _track(self, tensor: Tensor) -> int:
        """The number of the tensor's memory; a dead tensor is forgotten, and its memory's number with the last of them."""
        key = id(tensor)
        if key in self._weak:
            return self._memories[self._weak[key].memory][0]
        try:
            address = _storage_of(tensor)._cdata
        except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage
            address = -key
        known = self._memories.get(address)
        if known is None:
            self._next += 1
            known = self._memories[address] = (self._next, set())
        known[1].add(key)
        weak = _TensorRef(tensor, self._forget)
        weak.key, weak.memory = key, address
        self._weak[key] = weak
        return known[0]

    def _forget(self, weak: _TensorRef) -> None:
        # NB: runs when the tensor dies, before its id can be used again
        if self._weak.get(weak.key) is not weak:
            return
        del self._weak[weak.key], self._ids[weak.key]
        keys = self._memories[weak.memory][1]
        keys.discard(weak.key)
        if not keys:
            del self._memories[weak.memory]
