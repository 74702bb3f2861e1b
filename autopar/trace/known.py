"""Known: what the tracer must know of a torch function by its name: free metadata, a size, a read, a write, a draw.
Must not know recordings. Everything not listed is an ordinary op.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from autopar.trace.names import name_of

# Answers without looking at numbers and without making a tensor.
FREE = frozenset(
    """dim ndimension is_floating_point is_complex is_contiguous element_size stride storage_offset get_device is_inference
    is_same_size _is_view data_ptr untyped_storage storage _typed_storage storage_type is_signed is_pinned dim_order
    has_names result_type can_cast promote_types _set_grad_enabled is_conj is_neg is_set_to is_coalesced is_shared dense_dim
    sparse_dim nbytes __format__ __repr__ __str__ __hash__ _has_compatible_shallow_copy_type _use_cudnn_ctc_loss
    _cudnn_rnn_flatten_weight is_autocast_enabled get_default_dtype __dir__ __sizeof__ __reduce_ex__
    _nested_tensor_from_mask_left_aligned is_distributed record_stream module_load __dlpack_device__ is_tensor is_storage
    is_grad_enabled is_inference_mode_enabled is_vulkan_available get_device_module _is_zerotensor q_scale
    _debug_has_internal_overlap set_default_device get_default_device _assert_async _assert_tensor_metadata _fw_primal
    _version is_meta""".split()  # noqa: SIM905
)
SIZES = frozenset(["size", "shape", "numel", "nelement", "__len__"])
# Reads of numbers: torch name -> how a guard reads it again.
READS = {
    "item": "item",
    "tolist": "tolist",
    "__bool__": "bool",
    "__int__": "int",
    "__index__": "int",
    "__float__": "float",
    "__complex__": "item",
    "numpy": "tolist",
    "__array__": "tolist",
}
COMPARES = frozenset(["equal", "allclose", "__contains__", "is_nonzero"])
# Results hold no numbers of the inputs, only their shapes.
BLANK = frozenset(
    """zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full
    new_empty""".split()  # noqa: SIM905
)
RANDOM = frozenset(
    """dropout dropout1d dropout2d dropout3d dropout_ alpha_dropout feature_alpha_dropout feature_dropout native_dropout rand randn
    randint randperm rand_like randn_like randint_like bernoulli bernoulli_ normal normal_ uniform_ exponential_ multinomial
    gumbel_softmax rrelu rrelu_ cauchy_ log_normal_ geometric_ random_ poisson fractional_max_pool2d
    fractional_max_pool3d""".split()  # noqa: SIM905
)
DATA_SHAPES = frozenset(["nonzero", "masked_select", "unique", "unique_consecutive", "_unique2", "argwhere", "bincount"])
BY_CONTENT = frozenset(["__getitem__", "where", "repeat_interleave"])  # the same, for some arguments
FROM_DATA = frozenset(["tensor", "as_tensor", "asarray", "new_tensor"])
DETACHED = frozenset(["detach", "detach_", "data"])
# Returning its input unchanged, these say nothing about the program (dtypes and devices are those of the trace).
ELIDED = frozenset(
    """to float half bfloat16 double type type_as int long short bool char byte cpu cuda resolve_conj resolve_neg positive real conj
    __torch_function__ __deepcopy__""".split()  # noqa: SIM905
)
TENSOR_GETTERS = frozenset(["T", "mT", "H", "mH", "real", "imag", "data"])
INPLACE_DUNDER = re.compile(r"__i(add|sub|mul|truediv|div|floordiv|mod|pow|and|or|xor|lshift|rshift|matmul)__$")
FORBIDDEN = {
    "backward": "forward calls backward()",
    "set_": "forward replaces a tensor's memory (set_)",
    "resize_": "forward resizes a tensor in place",
    "resize_as_": "forward resizes a tensor in place",
    "share_memory_": "forward moves a tensor to shared memory",
    "__setstate__": "forward unpickles a tensor",
}


@dataclass(eq=False)
class Known:
    """The facts of one callable. kind: free | size | read | compare | inline | forbidden | grad_flag | set_data | op."""

    fn: str
    kind: str
    short: str
    writes: bool = False  # by its name; version counters tell the rest
    random: bool = False
    why: str = ""


def classify(func: Any) -> Known:
    """Decide what a callable is. Raises TraceError if its name would not lead back to it."""
    short = getattr(func, "__name__", type(func).__name__)
    if isinstance(func, torch._ops.HigherOrderOperator):
        return Known(str(func), "forbidden", short, why=f"torch.ops.higher_order.{short} runs a function the tracer cannot see into")
    if short in ("__get__", "__set__", "__delete__"):
        attr = getattr(func.__self__, "__name__", "")  # a Python property has none
        if short == "__get__":
            kind = "size" if attr == "shape" else "op" if attr in TENSOR_GETTERS else "free"
        else:
            kind = {"requires_grad": "grad_flag", "data": "set_data"}.get(attr, "free")
        return Known(name_of(func) if kind == "op" else attr, kind, attr)
    if isinstance(func, torch._ops.OpOverload):
        short = func._schema.name.partition("::")[2]
        return Known(name_of(func), "op", short, writes=func._schema.is_mutable, random=torch.Tag.nondeterministic_seeded in func.tags)
    if func is torch.nn.functional.multi_head_attention_forward:
        return Known("", "inline", short)
    if short in FREE:
        return Known("", "free", short)
    if short in SIZES:
        return Known("", "size", short)
    if short in READS:
        return Known("", "read", short)
    if short in FORBIDDEN:
        return Known("", "forbidden", short, why=FORBIDDEN[short])
    if short == "requires_grad_":
        return Known(name_of(func), "grad_flag", short)
    writes = (short.endswith("_") and not short.endswith("__")) or short == "__setitem__" or bool(INPLACE_DUNDER.match(short))
    return Known(name_of(func), "compare" if short in COMPARES else "op", short, writes, short in RANDOM)
