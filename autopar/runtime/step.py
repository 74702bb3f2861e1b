"""train_step and infer_step of a module compiled with use_end2end: accumulation, dummy batches, scaled losses; and who may call forward.
Must not know optimizers, nor how ranks learn of each other's failures (faults.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.errors import StepError
from autopar.runtime import faults, finite
from autopar.runtime.random import unit_stream

if TYPE_CHECKING:
    from autopar.runtime.module import ParallelModule

ScaleFn = Callable[[Tensor], Tensor]


def train_step(
    module: ParallelModule,
    samples: Sequence[Any],
    is_dummy_batch: Sequence[bool] | None = None,
    scale_fn: ScaleFn | None = None,
    *,
    agreed: bool = False,
) -> list[Any]:
    """See ParallelModule.train_step. agreed: all ranks know that they give as many samples, and ranks of a unit the same flags."""
    _require(module, "train_step")
    if getattr(module.compute_config, "inference_only", False):
        raise StepError("this module was compiled with inference_only=True and cannot be trained; call infer_step")
    if not torch.is_grad_enabled():
        raise StepError("train_step was called under torch.no_grad(): there would be no gradients; call it outside, or infer_step")
    with faults.together(module.mesh, "train_step") as turn:
        dummies = turn.agree(samples, is_dummy_batch, agreed=agreed)
        _forget_gradients(module)
        reducer = getattr(module, "_grad_reducer", None)
        # NB: a check needs each rank's own gradients, so nothing may leave before it.
        check = module.check_finite
        outputs, losses = [], []
        for i, (sample, dummy) in enumerate(zip(samples, dummies, strict=True)):
            hold = reducer is not None and (check or i + 1 < len(samples))
            with reducer.accumulate() if hold else nullcontext(), leaving_no_trace(module) if dummy else nullcontext():
                turn.doing(f"forward of sample {i}")
                output, loss = _forward(module, sample)
                scaled = loss if scale_fn is None else _scaled(scale_fn, loss)
                turn.doing(f"backward of sample {i}")
                scaled.backward()
            outputs.append(detached(output))
            losses.append(None if dummy else loss.detach())
        turn.doing("sum of the gradients")
        if check:
            finite.check(module, losses)
        if reducer is not None:
            reducer.reduce()
        else:
            module.sync_grads()
    return outputs


def infer_step(module: ParallelModule, samples: Sequence[Any]) -> list[Any]:
    """See ParallelModule.infer_step."""
    _require(module, "infer_step")
    outputs = []
    with faults.together(module.mesh, "infer_step") as turn, torch.no_grad():
        turn.agree(samples, None)
        for i, sample in enumerate(samples):
            turn.doing(f"sample {i}")
            outputs.append(_call(module, sample))
    return outputs


def entered(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a root class: each scale unit draws its own random numbers, and an end-to-end module is left to its steps."""

    @functools.wraps(forward)
    def call(self: ParallelModule, *args: Any, **kwargs: Any) -> Any:
        if self.end2end and not self._stepping:
            raise StepError(
                f"{type(self).__name__} was compiled with use_end2end=True: call train_step(samples) to train and infer_step(samples) to "
                f"evaluate, not forward; gradients that forward leaves would never be summed over the ranks. To call it as a module "
                f"(inside another one, or with a loop of your own), compile with use_end2end=False"
            )
        if self.mesh is None or self.mesh.unit == 0:
            return forward(self, *args, **kwargs)
        with unit_stream(self.mesh):
            return forward(self, *args, **kwargs)

    return call


def _require(module: ParallelModule, what: str) -> None:
    if not module.end2end:
        raise StepError(
            f"{what} needs a module compiled with ComputeConfig(use_end2end=True), and {type(module).__name__} was not; "
            f"call it as a module, and sync_grads() or an optimizer of autopar.build_optimizer after the last backward"
        )


def _call(module: ParallelModule, sample: Any) -> Any:
    before, module._stepping = module._stepping, True
    try:
        return module(sample)
    finally:
        module._stepping = before


def _forward(module: ParallelModule, sample: Any) -> tuple[Any, Tensor]:
    """The output and the loss, its first value."""
    output = _call(module, sample)
    loss = first_value(output)
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        what = f"a tensor of shape {tuple(loss.shape)} {loss.dtype}" if isinstance(loss, Tensor) else f"{loss!r:.60}"
        raise StepError(f"the first value that {type(module).__name__} returns must be the loss, one floating-point number; it is {what}")
    return output, loss


def _scaled(scale_fn: ScaleFn, loss: Tensor) -> Tensor:
    scaled = scale_fn(loss)
    if not isinstance(scaled, Tensor) or scaled.dim() or not scaled.requires_grad:
        what = f"a tensor of shape {tuple(scaled.shape)}" if isinstance(scaled, Tensor) else f"{scaled!r:.60}"
        what += " without a gradient" if isinstance(scaled, Tensor) and not scaled.dim() else ""
        raise StepError(f"scale_fn returned {what}; it must return the loss it is given times a number")
    return scaled


def first_value(output: Any) -> Any:
    if isinstance(output, Mapping):
        return next(iter(output.values()), None)
    if isinstance(output, (tuple, list)):
        return output[0] if output else None
    if is_dataclass(output):
        return getattr(output, fields(output)[0].name)
    return output


def detached(output: Any) -> Any:
    return pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, output)


def _forget_gradients(module: ParallelModule) -> None:
    """NB: gradients of an earlier step are summed already; summing them again with new ones would be wrong without an error."""
    reducer = getattr(module, "_grad_reducer", None)
    if reducer is not None:
        reducer.zero_grad()
    for p in module.parameters():
        p.grad = None


@contextmanager
def leaving_no_trace(module: nn.Module) -> Iterator[None]:
    """For a dummy batch: all collectives happen, but gradients, buffers and random numbers stay as they are, whatever is in the batch."""
    # NB: zeros instead of the gradient, not the loss times zero: zero times NaN is NaN.
    hooks = [p.register_hook(torch.zeros_like) for p in module.parameters() if p.requires_grad]
    constants = {name for name, p in getattr(module, "named_placements", dict)().items() if p.kind == "constant"}
    kept = []
    for path, owner in module.named_modules():
        for key, b in owner._buffers.items():
            if b is not None and f"{path}.{key}".lstrip(".") not in constants:
                kept.append((owner, key, b, b.clone()))
    try:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            # NB: all of them; batch_norm writes its statistics without a new version of the tensor.
            for owner, key, b, values in kept:
                owner._buffers[key] = b.copy_(values)
