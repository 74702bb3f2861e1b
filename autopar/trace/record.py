"""record(): one traced run of a module, from the dummy inputs to the Recording, leaving the module as it was.
Must not know single ops (tracer.py).
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Mapping
from typing import Any

import torch

from autopar.config import TRACE_STRATEGIES
from autopar.errors import ConfigError, TraceError, suggest
from autopar.ir.graph import Argument, Ref, Tensor, refs
from autopar.trace import trees
from autopar.trace.flags import Read, doubtful, refuse
from autopar.trace.ledger import ValueReadError
from autopar.trace.names import qualified
from autopar.trace.patches import Watch, patched
from autopar.trace.recording import RecordedOp, Recording
from autopar.trace.state import ModuleState, RandomState
from autopar.trace.strategies import Real, pick
from autopar.trace.tracer import Tracer

log = logging.getLogger("autopar.trace")


def record(
    module: torch.nn.Module, dummy_forward_args: Mapping[str, Any], *, strategy: str = "auto", constant_folding: bool = False
) -> Recording:
    """Run the module once on the dummy inputs (forward argument name -> value) and return everything it did.

    It is run again in its other mode (train, eval) where Python code looks at the mode in a way that may matter.
    The module, its gradients and the random generators are as before afterwards. Raises TraceError for what cannot be
    recorded faithfully, ConfigError for a strategy that does not exist or cannot run here.
    """
    if not isinstance(module, torch.nn.Module):
        raise TraceError(f"a {type(module).__name__} cannot be traced; give a torch.nn.Module")
    for path, m in module.named_modules():
        if isinstance(m, torch.jit.ScriptModule):
            raise TraceError(
                f"{path or 'the module'} is a ScriptModule, which the tracer cannot look into; use the module it was scripted from"
            )
    if not isinstance(dummy_forward_args, Mapping):
        raise TraceError(
            f"dummy_forward_args is a {type(dummy_forward_args).__name__}; it must be a dict of forward argument name to value"
        )
    if strategy not in TRACE_STRATEGIES:
        raise ConfigError(f"unknown trace_strategy {strategy!r}: {suggest(strategy, TRACE_STRATEGIES)}")
    params, given = trees.call_of(module, dummy_forward_args)
    if strategy != "auto":
        return _in_both_modes(_Run(module, params, given, pick(strategy, module), constant_folding))
    run = _Run(module, params, given, pick("meta", module), constant_folding)
    try:
        recording = _in_both_modes(run)
    except Exception as e:
        if not (isinstance(e, ValueReadError) or run.fake_failed):
            raise
        if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            raise
        name = "cuda_run_cpu_offload" if torch.cuda.is_available() else "cpu"
        log.warning("trace strategy 'meta' does not do (%s); tracing again with %r", str(e).splitlines()[0], name)
        return _in_both_modes(_Run(module, params, given, pick(name, module), constant_folding))
    log.info("traced with strategy 'meta'")
    return recording


def _in_both_modes(run: _Run) -> Recording:
    """The recording of a run, made right in the other mode (train, eval) too, or marked with the line where the modes part."""
    recording = run.result()
    flags = run.tracer.flags
    if flags.certain is not None:
        return refuse(recording, flags.certain.source)
    reads = flags.reads
    if not reads and (guess := doubtful(recording, flags.handed)) is not None:
        reads = [Read("", guess)]
    if not reads:
        return recording
    from autopar.trace import modes  # NB: here, because all of rules comes with it

    module, mode = run.module, "eval" if recording.training else "training"
    before = [(m, m.training) for m in module.modules()]
    other = _Run(module, run.params, run.given, pick(run.strategy.name, module), run.fold, lenient=True)
    try:
        for m, _ in before:
            m.training = not recording.training  # NB: not train(), which may be the user's and merge weights
        found = other.result()
    except Exception as e:
        log.info("the model cannot be traced in %s mode: %s", mode, e)
        return refuse(recording, reads[0].source)
    finally:
        for m, training in before:
            m.training = training
    return modes.merge(recording, found, reads)


class _Run:
    """One attempt with one strategy."""

    def __init__(
        self, module: torch.nn.Module, params: list[Any], given: dict[str, Any], strategy: Real, fold: bool, lenient: bool = False
    ) -> None:
        self.module, self.params, self.given, self.strategy, self.fold = module, params, given, strategy, fold
        self.lenient = lenient  # objects in the output that generated code cannot make are no error
        self.inputs: list[int] = []

    @property
    def fake_failed(self) -> bool:
        """Whether a fake kernel, not the model, may be to blame for the failure."""
        return self.strategy.name == "meta" and getattr(self, "tracer", None) is not None and self.tracer.op_failed

    def result(self) -> Recording:
        module = self.module
        state, rng = ModuleState(module), RandomState()
        device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        tracer = self.tracer = Tracer(module, self.strategy, fold=self.fold, device=device, state=state)
        training = module.training
        # NB: fake tensors are freed by reference counting; the collector would only walk the growing recording again and again
        collect = gc.isenabled() and self.strategy.name == "meta"
        if collect:
            gc.disable()
        try:
            tensors, buffers = self._place(tracer)
            values, arguments = self._inputs(tracer)
            args, kwargs = trees.bind(self.params, values)
            watch = (
                contextlib.nullcontext() if self.strategy.name == "meta" else Watch(tracer)
            )  # NB: unseen fake tensors are noticed anyway
            with patched(tracer), watch, tracer:
                try:
                    out = module(*args, **kwargs)
                except TraceError:
                    raise
                except Exception as e:
                    if tracer.failure is not None:
                        raise tracer.failure from e
                    e.add_note(f"while tracing {qualified(type(module))} with strategy {self.strategy.name!r}")
                    raise
            if tracer.failure is not None:
                raise tracer.failure
            output = self._output(tracer, out)
            buffers_set = self._buffers_set(tracer, buffers)
            if rng.drawn() and not any("is drawn" in w for w in tracer.warnings):
                tracer.warnings["Python or NumPy random numbers were drawn: they are constants of the trace"] = None
            for name in state.new_attributes():
                if name not in {n.rpartition(".")[2] for n, _ in buffers_set}:
                    tracer.warnings[f"forward sets the attribute {name!r} to a tensor; generated code does not keep it between calls"] = (
                        None
                    )
        finally:
            tracer.live = False
            if collect:
                gc.enable()
            state.restore()
            rng.restore()
        events = _without_dead_scalars(tracer.events, output, buffers_set)
        return Recording(
            module=qualified(type(module)),
            values=tracer.values.list,
            events=events,
            tensors=(*tensors, *tracer.described_constants()),
            arguments=arguments,
            inputs=tuple(self.inputs),
            output=output,
            folded=self.fold,
            training=training,
            buffers_set=buffers_set,
            warnings=tuple(tracer.warnings),
            constants=tracer.constants,
        )

    def _place(self, tracer: Tracer) -> tuple[list[Tensor], dict[str, tuple[dict[str, Any], str, torch.Tensor]]]:
        """Put stand-ins for parameters and buffers into the module; return the list of tensors and where the buffers are."""
        names: dict[int, list[str]] = {}
        found: dict[int, tuple[torch.Tensor, bool, bool]] = {}
        slots: list[tuple[dict[str, Any], str, torch.Tensor, bool, str]] = []
        for path, m in self.module.named_modules(remove_duplicate=False):
            prefix = path + "." if path else ""
            for holder, buffer in ((m._parameters, False), (m._buffers, True)):
                for key, t in holder.items():
                    if t is None:
                        continue
                    if isinstance(t, torch.nn.parameter.UninitializedTensorMixin):
                        raise TraceError(f"{prefix + key} is not initialised; run the module once before tracing it")
                    names.setdefault(id(t), []).append(prefix + key)
                    persistent = not (buffer and key in m._non_persistent_buffers_set)
                    found.setdefault(id(t), (t, buffer, persistent))
                    slots.append((holder, key, t, buffer, prefix + key))
        stand_ins: dict[int, torch.Tensor] = {}
        tensors: list[Tensor] = []
        for buffers in (False, True):
            for key_id, (t, buffer, persistent) in found.items():
                if buffer is not buffers:
                    continue
                name, *aliases = names[key_id]
                dtype = str(t.dtype).removeprefix("torch.")
                described = Tensor(
                    name, "buffer" if buffer else "param", tuple(t.shape), dtype, t.requires_grad, persistent, tuple(aliases)
                )
                tensors.append(described)
                stand_ins[key_id] = self.strategy.place(t, buffer)
                tracer.place(name, described, t, stand_ins[key_id])
        where = {}
        for holder, key, t, buffer, name in slots:
            if holder.get(key) is t and stand_ins[id(t)] is not t:
                holder[key] = stand_ins[id(t)]
            if buffer:
                where[name] = (holder, key, stand_ins[id(t)])
        self.originals = [t for t, _, _ in found.values()]  # keeps their ids taken
        self.stand_ins = list(stand_ins.values())
        return tensors, where

    def _inputs(self, tracer: Tracer) -> tuple[dict[str, Any], tuple[Argument, ...]]:
        """Private copies of the inputs, each tensor leaf a value of its own, and the description of the signature."""
        self.kept: list[torch.Tensor] = []

        def copy(t: torch.Tensor, path: str) -> torch.Tensor:
            out = self.strategy.input(t)
            self.kept.append(out)
            self.inputs.append(tracer.input(out, path))
            return out

        values: dict[str, Any] = {}
        arguments = []
        for p in self.params:
            given = p.name in self.given
            tree: Any = None
            if given:
                values[p.name] = trees.map_inputs(self.given[p.name], copy, p.name)
                tree = trees.encode(values[p.name], lambda t: Ref(_found(tracer, t)), f"the value of forward argument {p.name!r}")
            argument = trees.argument(p, tree, given)
            if not given:
                argument = trees.argument(
                    p, () if p.kind is p.VAR_POSITIONAL else {} if p.kind is p.VAR_KEYWORD else argument.default, given
                )
            arguments.append(argument)
        return values, tuple(arguments)

    def _output(self, tracer: Tracer, out: Any) -> Any:
        if self.lenient:
            return trees.encode_what_can(out, tracer._leaf)
        return trees.encode(out, tracer._leaf, "the result of forward")

    def _buffers_set(self, tracer: Tracer, buffers: dict[str, tuple[dict[str, Any], str, torch.Tensor]]) -> tuple[tuple[str, int], ...]:
        """Buffers that were given another tensor (`self.buf = x`)."""
        out = []
        for name, (holder, key, before) in buffers.items():
            now = holder.get(key)
            if now is not before and isinstance(now, torch.Tensor):
                out.append((name, tracer._leaf(now).id))
        return tuple(out)


def _found(tracer: Tracer, t: torch.Tensor) -> int:
    vid = tracer.values.find(t)
    assert vid is not None
    return vid


def _without_dead_scalars(events: list[Any], output: Any, buffers_set: tuple[tuple[str, int], ...]) -> list[Any]:
    """Sizes that were read along with others (x.shape) but never used are dropped."""
    live = {r.id for r in refs(output)} | {v for _, v in buffers_set}
    kept = []
    for e in reversed(events):
        if isinstance(e, RecordedOp):
            if e.fn.startswith(("torch.Tensor.size", "torch.Tensor.numel", "operator.", "math.", "builtins.")) and e.out.id not in live:
                continue
            live.update(r.id for r in refs((e.args, e.kwargs)))
        elif hasattr(e, "value"):
            live.update(r.id for r in refs(e.value))
        kept.append(e)
    kept.reverse()
    return kept
