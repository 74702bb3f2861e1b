"""What generated code uses, as `ap`: Axis and conversions, Block and ParallelModule, guards, random streams, parallel functions.
Must not import any stage of the compiler.
"""

from autopar.runtime.axis import Axis, Record, record
from autopar.runtime.collectives import (
    i_to_p,
    i_to_r,
    i_to_s,
    p_to_i,
    p_to_r,
    p_to_s,
    r_to_i,
    r_to_p,
    r_to_s,
    s_to_i,
    s_to_p,
    s_to_r,
    s_to_s,
)
from autopar.runtime.functional import *  # noqa: F403
from autopar.runtime.functional import __all__ as _functional
from autopar.runtime.groups import fail_together, init, rank_mesh
from autopar.runtime.guards import check_divisible, check_input, check_mode, guard
from autopar.runtime.inproc import run_ranks
from autopar.runtime.mesh import RankMesh
from autopar.runtime.module import Block, Holder, ParallelModule
from autopar.runtime.placement import Placement
from autopar.runtime.random import EXACT, exact_random, random_streams
from autopar.runtime.reader import SafetensorsReader
from autopar.runtime.reducer import Reducer
from autopar.runtime.structs import check_argument, check_structure, checkpoint, struct

__all__ = [
    "Axis",
    "Block",
    "EXACT",
    "Holder",
    "ParallelModule",
    "Placement",
    "RankMesh",
    "Record",
    "Reducer",
    "SafetensorsReader",
    "check_argument",
    "check_divisible",
    "check_input",
    "check_mode",
    "check_structure",
    "checkpoint",
    "exact_random",
    "fail_together",
    "guard",
    "i_to_p",
    "i_to_r",
    "i_to_s",
    "init",
    "p_to_i",
    "p_to_r",
    "p_to_s",
    "r_to_i",
    "r_to_p",
    "r_to_s",
    "random_streams",
    "rank_mesh",
    "record",
    "run_ranks",
    "s_to_i",
    "s_to_p",
    "s_to_r",
    "s_to_s",
    "struct",
    *_functional,
]
