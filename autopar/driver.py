"""The driver: trace, policy, lower, check, emit, save, load. Reads as section 1 of the design.
Must not know how any stage works.
"""

from __future__ import annotations

import copy
import logging
import shutil
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autopar.codegen import savedir
from autopar.codegen.emit import emit
from autopar.codegen.end2end import check_end2end
from autopar.codegen.identity import identify, policy_name
from autopar.config import BroadcastStrategy, ComputeConfig, ReuseType
from autopar.errors import ConfigError, PlanError
from autopar.ir.codec import load_graph, save_graph
from autopar.ir.graph import Graph
from autopar.lower.check import check
from autopar.lower.lower import lower
from autopar.lower.program import Program
from autopar.pas.plan import Plan
from autopar.pas.policies import get_policy
from autopar.progress import stage
from autopar.trace import trace
from autopar.weights import BUFFERS, WEIGHTS, refresh, save_weights

log = logging.getLogger("autopar")
Reader = Callable[[str, tuple[slice, ...]], torch.Tensor]


@dataclass(frozen=True)
class Compiled:
    """Everything one compile made, before it is written."""

    graph: Graph
    plan: Plan
    program: Program
    texts: dict[str, str]  # file name -> generated source


def compile_module(
    module: nn.Module,
    dummy_forward_args: Mapping[str, Any],
    pas_policy: str | Path | Callable[[Graph, ComputeConfig], Plan] | Plan,
    config: ComputeConfig,
    *,
    graph: Graph | None = None,
) -> Compiled:
    """Compile in memory: no file is touched, no GPU or process group is needed. A graph traced before may be handed in.

    Raises TraceError, PlanError, ConfigError or CheckError, each naming the user's source line where there is one.
    """
    pas_policy = read_policy(pas_policy)
    if graph is None:
        with stage("trace"):
            graph = trace(module, dummy_forward_args, strategy=config.trace_strategy, constant_folding=config.constant_folding)
    if config.use_end2end:
        check_end2end(graph, inference_only=config.inference_only)
    with stage("policy"):
        plan = make_plan(graph, pas_policy, config)
    with stage("lower"):
        program = lower(graph, plan)
    with stage("check"):
        check(graph, program)
    with stage("emit"):
        return Compiled(graph, plan, program, emit(graph, program, guards=config.guards, end2end=config.use_end2end))


def read_policy(pas_policy: Any) -> Any:
    """A policy as given, or the Plan in the file that a path or a text ending in '.json' names.

    Raises ConfigError for an unknown policy, PlanError for a file that is missing or damaged: before anything is traced.
    """
    if isinstance(pas_policy, Path) or (isinstance(pas_policy, str) and pas_policy.endswith(".json")):
        return Plan.load(pas_policy)
    if not isinstance(pas_policy, Plan):
        get_policy(pas_policy)
    return pas_policy


def make_plan(graph: Graph, pas_policy: Any, config: ComputeConfig) -> Plan:
    """The plan of a policy (name, function or a ready Plan) with the graph's fingerprint. Raises PlanError, ConfigError."""
    plan = pas_policy if isinstance(pas_policy, Plan) else get_policy(pas_policy)(graph, config)
    if not isinstance(plan, Plan):
        raise ConfigError(f"policy {policy_name(pas_policy)} returned {type(plan).__name__}; a policy returns an autopar.Plan")
    if plan.mesh.size != config.plan_ngpus:
        raise PlanError(f"the plan's {plan.mesh} has {plan.mesh.size} devices, but plan_ngpus is {config.plan_ngpus}")
    return plan if plan.graph else replace(plan, graph=graph.fingerprint)


def compile_to(
    module: nn.Module,
    dummy_forward_args: Mapping[str, Any],
    pas_policy: Any,
    config: ComputeConfig,
    *,
    gen_savedir: str | Path = "./.autopar",
    reuse: ReuseType | str = ReuseType.MATCH,
    instance_name: str | None = None,
) -> Path:
    """Compile into a folder, reusing what is there as `reuse` says (design section 9), and return the folder.

    The initial weights in it are those of the module given, whatever else is reused.
    Raises SavedirError where the folder cannot be written, is damaged, or was made from another configuration.
    """
    import autopar

    reuse, pas_policy = ReuseType.of(reuse), read_policy(pas_policy)
    identity = identify(module, dummy_forward_args, pas_policy, config, autopar.__version__)
    folder = savedir.folder_of(gen_savedir, identity.graph["module"], instance_name)
    decision = savedir.decide(folder, identity, reuse)
    log.info("%s: reusing %s (%s)", folder, decision.reuse, decision.reason, extra={"decision": decision})
    if decision.reuse == "code":
        refresh(module, folder)
        return folder
    savedir.check_writable(folder)
    old = load_graph(folder) if decision.reuse == "graph" else None
    compiled = compile_module(module, dummy_forward_args, pas_policy, config, graph=old)

    def fill(tmp: Path) -> None:
        if old is not None:
            for name in ("graph.json", "constants.safetensors", WEIGHTS, BUFFERS):
                if (folder / name).exists():
                    _keep(folder / name, tmp / name)
        else:
            held = [t for t in compiled.graph.tensors if t.kind != "constant"]
            save_graph(compiled.graph, tmp)
            state, others = ([t.name for t in held if t.persistent is kept] for kept in (True, False))
            save_weights(module, state, others, compiled.graph.constants, tmp)
        compiled.plan.save(tmp / "plan.json")
        for name, text in compiled.texts.items():
            (tmp / name).write_text(text)

    with stage("write"):
        savedir.write(folder, identity, fill)
    if old is not None:
        refresh(module, folder)
    return folder


def _keep(file: Path, new: Path) -> None:
    """The same file in another place; its bytes are never written again, so a link will do."""
    try:
        new.hardlink_to(file)
    except OSError:
        shutil.copy2(file, new)


def parallelize(
    module: nn.Module | type[nn.Module],
    dummy_forward_args: Mapping[str, Any],
    pas_policy: str | Path | Callable[[Graph, ComputeConfig], Plan] | Plan = "tp",
    compute_config: ComputeConfig | Mapping[str, Any] | None = None,
    *,
    gen_savedir: str | Path = "./.autopar",
    reuse: ReuseType | str = ReuseType.MATCH,
    instance_name: str | None = None,
    load_module: bool = True,
    module_dtype: torch.dtype | None = None,
    module_fn: Callable[[], nn.Module] | None = None,
    init_module_params: bool = True,
    weights: str | Path | Reader | None = None,
    broadcast_strategy: BroadcastStrategy | str = BroadcastStrategy.NONE,
    device: str | torch.device | None = None,
    timeout: float = 600.0,
) -> Any:
    """Compile a module for a cluster and load this rank's part of it. Every argument is described in docs/parallelize.md.

    module: the module, which is never changed; or its class, built by `module_fn()` or without arguments.
    dummy_forward_args: name -> example value for every argument of forward that has no default.
    pas_policy: a built-in policy's name ('dp', 'tp', 'data'), a function (graph, config) -> Plan, a Plan or the path of a plan.json.
    compute_config: a ComputeConfig, or a dict of its settings.
    gen_savedir, reuse, instance_name: where generated code is kept and when it is used again (docs/savedir.md).
    load_module: False compiles only, needs no process group, and returns the folder.
    module_dtype: compile the module in this floating dtype (a copy of it; the dummy arguments are taken as they are).
    init_module_params: False leaves parameters NaN, to be loaded afterwards; it may differ from rank to rank.
    weights: a .safetensors file, a folder of them or a function (name, slices) -> tensor, to be read instead of the module's own values.
    broadcast_strategy: what is sent to nodes that do not share rank 0's disk: 'none', 'all', 'no_weights', 'code' (docs/nodes.md).

    Under torchrun rank 0 compiles and the others wait; an error on one rank ends all with that error. Tensors on the meta device get
    their values, slice by slice, from the module's own init_weights() or reset_parameters() (docs/parallelize.md).
    Returns a ParallelModule on this rank's device (CUDA where there is one), with the module's training flag and initial weights; for a
    class a class, of which each call makes one.
    """
    from autopar.runtime.launch import compile_once, distribute, load_class

    config, strategy = ComputeConfig.of(compute_config), BroadcastStrategy.of(broadcast_strategy)
    ReuseType.of(reuse)
    if module_dtype is not None and not (isinstance(module_dtype, torch.dtype) and module_dtype.is_floating_point):
        raise ConfigError(f"module_dtype is {module_dtype!r:.60}; it must be a floating torch.dtype")
    settings: dict[str, Any] = {"gen_savedir": gen_savedir, "reuse": reuse, "instance_name": instance_name}

    is_class = isinstance(module, type)
    # NB: the class of the result lives on, and must not keep all weights of a module that the user has let go.
    kept = (lambda given=module: given) if is_class or not isinstance(module, nn.Module) else weakref.ref(module)

    def make() -> nn.Module:
        found = kept()
        if found is None:
            raise ConfigError("the module that was parallelised is gone, and its initialisation with it; parallelize it again")
        return _converted(_instance(found, module_fn), module_dtype, given=not is_class)

    if not load_module:
        return compile_to(make(), dummy_forward_args, pas_policy, config, **settings)

    def build() -> tuple[str, Path, Path, torch.Tensor, torch.Tensor]:
        before = torch.get_rng_state()
        made = make()
        after = torch.get_rng_state()
        folder = compile_to(made, dummy_forward_args, pas_policy, config, **settings)
        return str(gen_savedir), folder.absolute(), folder.relative_to(gen_savedir), before, after

    given, source, inside, before, after = compile_once(build, config, timeout)
    if torch.equal(torch.get_rng_state(), before):
        torch.set_rng_state(after)  # a class was built on rank 0 only; what is built next is to draw the same numbers everywhere
    here = source if str(gen_savedir) == given and (source / "manifest.json").exists() else Path(gen_savedir).absolute() / inside
    distribute(source, here, strategy, timeout)

    def original() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            return make()

    ask_rank0 = strategy in (BroadcastStrategy.NO_WEIGHTS, BroadcastStrategy.CODE)
    sources = {"init_params": init_module_params, "weights": weights, "original": original, "ask_rank0": ask_rank0}
    made = load_class(here, units=config.units, config=config, device=device, timeout=timeout, **sources)
    return made if is_class else made()


def _converted(module: nn.Module, dtype: torch.dtype | None, *, given: bool) -> nn.Module:
    """The module in another floating dtype; a copy where it is the user's own."""
    floating = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    if dtype is None or all(t.dtype == dtype for t in floating):
        return module
    return (copy.deepcopy(module) if given else module).to(dtype)


def _instance(module: nn.Module | type[nn.Module], module_fn: Callable[[], nn.Module] | None) -> nn.Module:
    if isinstance(module, nn.Module):
        if module_fn is not None:
            raise ConfigError("module_fn makes an instance of a module class, but the module given is an object; leave module_fn out")
        if type(module).__name__ == "OptimizedModule":
            raise ConfigError("the module is wrapped by torch.compile; give the original and compile what parallelize returns")
        return module
    if isinstance(module, type) and issubclass(module, nn.Module):
        made = module_fn() if module_fn else module()
        if not isinstance(made, nn.Module):
            raise ConfigError(f"module_fn returned {type(made).__name__}; it must return an instance of {module.__qualname__}")
        return made
    raise ConfigError(f"module must be a torch.nn.Module or a class of one, got {module!r}")
