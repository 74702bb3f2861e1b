"""State of modules and optimizers: per-rank, deduplicated and merged state dicts, checkpoints, safetensors.
Must not know the compiler, nor why a tensor is split as it is.
"""

from autopar.runtime.state.checkpoint import load_checkpoint, save_checkpoint
from autopar.runtime.state.merge import load_merged_state_dict, merge_state_dicts
from autopar.runtime.state.onefile import save_weights
from autopar.runtime.state.ranks import (
    broadcast_weights,
    deduped_state_dict,
    load_deduped_state_dict,
    load_sharded_state_dict,
    sharded_state_dict,
)

__all__ = [
    "broadcast_weights",
    "deduped_state_dict",
    "load_checkpoint",
    "load_deduped_state_dict",
    "load_merged_state_dict",
    "load_sharded_state_dict",
    "merge_state_dicts",
    "save_checkpoint",
    "save_weights",
    "sharded_state_dict",
]
