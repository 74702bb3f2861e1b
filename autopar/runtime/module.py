"""Block and ParallelModule: the base classes of generated modules, holding this rank's tensors under their original names.
Must not know how the code was generated, nor where weights come from (a reader is handed in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from autopar.errors import LayoutError
from autopar.runtime import step
from autopar.runtime.mesh import UNITS, RankMesh
from autopar.runtime.placement import Placement
from autopar.runtime.reducer import BUCKET_MB, Reducer

Reader = Callable[[str, tuple[slice, ...]], torch.Tensor]


class _Indexed(nn.Module):
    """Names that are no identifiers, and elements of lists, by subscript: layers[3], layers[2:6]."""

    def __getitem__(self, index: int | str | slice) -> Any:
        if isinstance(index, slice):
            return list(self._modules.values())[index]
        return getattr(self, str(index))


class Holder(_Indexed):
    """A place in the tree of names: what the original had there is in the forward of the block around it."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())

    def __len__(self) -> int:
        return len(self._modules)


class Block(_Indexed):
    """Generated code for one region of the model. Tensors are declared under dotted original names, relative to the block."""

    guards = "error"  # what guards do: 'error' | 'warn' | 'off'

    def __init__(self, mesh: RankMesh | None = None):
        super().__init__()
        self.mesh = mesh
        self._declared: dict[str, Placement] = {}
        self._aliases: dict[str, str] = {}

    def declare(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *types: str,
        kind: str = "param",
        grad: bool = True,
        persistent: bool = True,
    ) -> None:
        """A tensor of the whole shape, held as `types` says along each mesh axis. It is on the meta device until load().

        A block made without its mesh gets its tensors when it is added to one that has it.
        """
        placement = Placement(name, tuple(shape), dtype, tuple(types), kind, grad, persistent and kind != "constant")
        if name in self._declared:
            raise LayoutError(f"{name} is declared twice")
        self._declared[name] = placement
        if self.mesh is not None:
            placement.check(self.mesh)
            self._put(placement, torch.empty(placement.local_shape(self.mesh), dtype=dtype, device="meta"))

    def add(self, name: str, block: nn.Module) -> None:
        """Put a block (or a module left as it was) at a dotted name; it keeps what was declared below that name before."""
        if isinstance(block, Block) and self.mesh is not None:
            block._bind(self.mesh)
        parent, last = self._parent(name)
        old = parent._modules.get(last)
        if old is not None:
            if not isinstance(old, Holder):
                raise LayoutError(f"{name} is added twice")
            for store in ("_modules", "_parameters", "_buffers"):
                for key, value in getattr(old, store).items():
                    getattr(block, store).setdefault(key, value)
        elif hasattr(parent, last):
            raise LayoutError(f"the model calls a submodule {name!r}, a name that generated modules use themselves; rename it")
        parent._modules[last] = block

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    def alias(self, name: str, of: str) -> None:
        """`name` is the same parameter as `of` (tied weights)."""
        self._aliases[name] = of
        if self.mesh is not None:
            self._tie(name, of)

    # -- the tree

    def _bind(self, mesh: RankMesh) -> None:
        if self.mesh is mesh:
            return
        self.mesh = mesh
        for p in self._declared.values():
            p.check(mesh)
            self._put(p, torch.empty(p.local_shape(mesh), dtype=p.dtype, device="meta"))
        for child in self.modules():
            if isinstance(child, Block) and child is not self:
                child._bind(mesh)
        for name, of in self._aliases.items():
            self._tie(name, of)

    def _parent(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds a dotted name, holders made on the way, and the last piece of the name."""
        *path, last = name.split(".")
        here: nn.Module = self
        for piece in path:
            child = here._modules.get(piece)
            if child is None:
                if hasattr(here, piece):
                    raise LayoutError(
                        f"the model calls a submodule {piece!r} (in {name}), a name that generated modules use themselves; rename it"
                    )
                child = here._modules[piece] = Holder()
            here = child
        return here, last

    def _put(self, p: Placement, t: torch.Tensor) -> None:
        """Register a local tensor at its name, replacing what is there."""
        parent, last = self._parent(p.name)
        if last not in parent._parameters and last not in parent._buffers and hasattr(parent, last):
            raise LayoutError(f"the model calls a {p.kind} {p.name!r}, a name that generated modules use themselves; rename it")
        if p.kind == "param":
            parent._parameters[last] = nn.Parameter(t, requires_grad=p.grad)
        else:
            parent._buffers[last] = t
            (parent._non_persistent_buffers_set.discard if p.persistent else parent._non_persistent_buffers_set.add)(last)

    def _tie(self, name: str, of: str) -> None:
        source, key = self._parent(of)
        target, last = self._parent(name)
        for store in ("_parameters", "_buffers"):
            if key in getattr(source, store):
                getattr(target, store)[last] = getattr(source, store)[key]
                if store == "_buffers" and key in source._non_persistent_buffers_set:
                    target._non_persistent_buffers_set.add(last)
                return
        raise LayoutError(f"{name} is tied to {of}, which is not declared")


class ParallelModule(Block):
    """One rank's part of a whole model: forward is generated; this class holds the mesh, loads weights and sums gradients.

    .mesh, .device, .guards ('error' | 'warn' | 'off'), .compute_config (of the parallelize that made it, else None).
    .end2end: trained by train_step; calling it is an error. .check_finite: train_step stops on all ranks for a NaN on any (docs/steps.md).
    """

    end2end = False
    check_finite = False
    _stepping = False
    compute_config: Any = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in vars(cls):
            cls.forward = step.entered(cls.forward)

    def __init__(self, mesh: RankMesh):
        super().__init__(mesh)
        self._reducer: Reducer | None = None

    def _blocks(self) -> Iterator[tuple[str, Block]]:
        for path, m in self.named_modules():
            if isinstance(m, Block):
                yield path + "." if path else "", m

    def named_placements(self) -> dict[str, Placement]:
        """The placement of every declared tensor by its original name; aliases are not repeated."""
        return {prefix + name: p for prefix, block in self._blocks() for name, p in block._declared.items()}

    def named_aliases(self) -> dict[str, str]:
        """Other name -> declared name, of tied tensors."""
        return {prefix + name: prefix + of for prefix, block in self._blocks() for name, of in block._aliases.items()}

    def local_slice(self, name: str) -> tuple[slice, ...]:
        """This rank's slice of a declared tensor (or of an alias of one)."""
        aliases = self.named_aliases()
        while name in aliases:
            name = aliases[name]
        placements = self.named_placements()
        if name not in placements:
            raise LayoutError(f"{name!r} is no parameter or buffer of {type(self).__name__}")
        return placements[name].slices(self.mesh)

    def load(self, reader: Reader, device: torch.device | str | None = None) -> ParallelModule:
        """Allocate every declared tensor on the device and fill it with this rank's slice of what reader(name, slices) returns.

        Raises LayoutError where a shape or dtype is not the declared one.
        """
        device = torch.device(device) if device is not None else self.mesh.device
        for prefix, block in self._blocks():
            for name, p in block._declared.items():
                full = prefix + name
                t = p.shard(self.mesh, partial(reader, full))
                if tuple(t.shape) != p.local_shape(self.mesh) or t.dtype != p.dtype:
                    raise LayoutError(
                        f"the weights of {full} are {tuple(t.shape)} {t.dtype}; "
                        f"this rank's slice of {p.shape} is {p.local_shape(self.mesh)} {p.dtype}"
                    )
                # NB: a copy, never the reader's memory: it may be another rank's too, or mapped from a file.
                block._put(p, torch.empty(t.shape, dtype=t.dtype, device=device).copy_(t))
        # NB: outer aliases may lead to inner ones.
        for _, block in reversed(list(self._blocks())):
            for name, of in block._aliases.items():
                block._tie(name, of)
        self._reducer = None
        return self

    def train_step(
        self,
        samples: Sequence[Any],
        is_dummy_batch: Sequence[bool] | None = None,
        scale_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> list[Any]:
        """Forward and backward of every sample, and the sum of the gradients over the ranks. NB: collective.

        Returns the outputs, detached, in order. Gradients of before are forgotten first. A dummy batch takes part in all collectives
        and leaves nothing behind, whatever is in it.
        scale_fn: loss -> what the backward starts from; the outputs are not scaled. Every rank has to give as many samples.
        Raises StepError on all ranks if one fails or calls it unlike the others; the rank that fails raises its own error.
        """
        return step.train_step(self, samples, is_dummy_batch, scale_fn)

    def infer_step(self, samples: Sequence[Any]) -> list[Any]:
        """The outputs for every sample, without gradients, in the module's mode (train or eval). NB: collective inside a unit."""
        return step.infer_step(self, samples)

    def reduce_axes(self) -> dict[str, tuple[str, ...]]:
        """For every parameter, the axes its gradient is summed over: those of type R, and the scale units."""
        units = (UNITS,) if self.mesh.units > 1 else ()
        return {n: units + p.replicated(self.mesh) for n, p in self.named_placements().items() if p.kind == "param"}

    def sync_grads(self, bucket_mb: float = BUCKET_MB) -> None:
        """Sum the gradients of type-R parameters over their axes, and all gradients over the scale units. NB: a sum, not a mean.

        Call once per step, after the last backward, on all ranks. See Reducer for parameters without a gradient.
        """
        if self._reducer is None or self._reducer.bucket_mb != bucket_mb:
            axes = self.reduce_axes()
            # NB: in the order of their sets, so that all ranks create their groups alike.
            joint = {names: self.mesh.join(names) for names in sorted(set(axes.values())) if names}
            items = [(n, self.get_parameter(n), joint[names]) for n, names in axes.items() if names]
            self._reducer = Reducer(items, bucket_mb)
        self._reducer.reduce()
