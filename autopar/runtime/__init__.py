"""What generated code uses, as `ap`: Axis and conversions, Block and ParallelModule, guards, random streams, parallel functions.
Must not import any stage of the compiler.
"""

from autopar.runtime.axis import Axis
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
    record,
    s_to_i,
    s_to_p,
    s_to_r,
    s_to_s,
)
from autopar.runtime.inproc import run_ranks

__all__ = [n for n in dir() if not n.startswith("_")]
