"""Exchange: a row of numbers from every rank to every rank, the one small message of a step that the trainer adds.
Must not know what a step is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.runtime import axis as axis_module
from autopar.runtime.axis import DistComm
from autopar.runtime.faults import control
from autopar.runtime.mesh import RankMesh


class Exchange:
    """Called with a row, by all ranks alike, returns the rows of all: (ranks, numbers) in float64, good until the next call."""

    def __init__(self, mesh: RankMesh, width: int):
        self.axis = control(mesh)
        self.rows = torch.zeros((self.axis.size, width), dtype=torch.float64)
        self._out = [list(self.rows.unbind())]
        self._work: Any = None

    def __call__(self, row: Sequence[float]) -> Tensor:
        self.begin(row)
        return self.end()

    def begin(self, row: Sequence[float]) -> None:
        """Send the row; what is done until end() costs the others' rows no wait."""
        self._mine = mine = torch.tensor(row, dtype=torch.float64)  # NB: kept until it is sent
        if self.axis.size == 1:
            self.rows[0] = mine
        elif isinstance(self.axis.comm, DistComm):
            # NB: below torch.distributed's functions, which cost three times what they do here.
            self._work = self.axis.comm.group.allgather(self._out, [mine])
        else:
            self.rows.copy_(self.axis.stack(mine))

    def end(self) -> Tensor:
        work, self._work = self._work, None
        if work is not None:
            axis_module.wait(work)
        return self.rows
