"""What the arguments name: modules, functions, policies and plans, imported from packages or files.
Must not know what is done with them.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autopar import importing
from autopar.config import ComputeConfig
from autopar.errors import AutoparError, ConfigError, one_line, suggest
from autopar.ir.mesh import Mesh
from autopar.pas.plan import Plan
from autopar.pas.policies import AXIS_POLICIES, get_policy, mesh_policy, policies


def find(text: str, what: str, home: str = "") -> Any:
    """The object that 'package.module:Name' or 'path/to/file.py:Name' names; 'Name' alone is looked for in `home`.

    Raises ConfigError that says which part does not exist or failed to import.
    """
    where, colon, name = text.rpartition(":")
    where = where if colon else home
    if not where or not name:
        raise ConfigError(f"{what} {text!r} is not of the form 'package.module:Name' or 'path/to/file.py:Name'")
    return importing.find(f"{where}:{name}", f"{what} {text!r}")


def _home(args: Namespace) -> str:
    return args.module.rpartition(":")[0]


def build_module(args: Namespace) -> nn.Module:
    """The module that MODULE and --module-fn name, built under --seed. Raises ConfigError if it is none."""
    found = find(args.module, "MODULE")
    torch.manual_seed(args.seed)
    if isinstance(found, nn.Module):
        return found
    build, name = (find(args.module_fn, "--module-fn", _home(args)), args.module_fn) if args.module_fn else (found, args.module)
    if not callable(build):
        raise ConfigError(f"MODULE {name!r} is {found!r}, no module, class of one or function that builds one")
    try:
        made = build()
    except AutoparError:
        raise
    except Exception as e:
        hint = "; give --module-fn a function that builds it" if isinstance(e, TypeError) and not args.module_fn else ""
        raise ConfigError(f"{name}() failed: {one_line(e)}{hint}") from e
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{name}() returned {type(made).__name__}; it must return a torch.nn.Module")
    return made


def build_inputs(args: Namespace) -> dict[str, Any]:
    """The dummy forward arguments. Raises ConfigError if it is no dict of names."""
    found = find(args.inputs, "--inputs", _home(args))
    if callable(found) and not isinstance(found, Mapping):
        try:
            found = found()
        except Exception as e:
            raise ConfigError(f"--inputs {args.inputs}() failed: {one_line(e)}") from e
    if not isinstance(found, Mapping) or not all(isinstance(k, str) for k in found):
        kind = "a dict with other keys" if isinstance(found, Mapping) else type(found).__name__
        raise ConfigError(f"--inputs {args.inputs} gave {kind}; it must be a dict of forward argument name to value")
    return dict(found)


def policy_and_config(args: Namespace) -> tuple[Any, ComputeConfig]:
    """The policy (name, function or Plan) and the configuration. Raises ConfigError or PlanError."""
    mesh = Mesh.parse(args.mesh) if args.mesh else None
    names = args.policy.split(",")
    if mesh is not None and not (len(names) == 1 and names[0].endswith(".json")):
        if len(names) != len(mesh.axes):
            raise ConfigError(f"--mesh {args.mesh} has {len(mesh.axes)} axes, --policy names {len(names)}; name one each, as in data,tp")
        each = [_policy(n, args, AXIS_POLICIES) for n in names]
        policy = mesh_policy({axis: (size, how) for (axis, size), how in zip(mesh.axes, each, strict=True)})
    elif len(names) > 1:
        raise ConfigError(f"--policy {args.policy} names several policies; give their axes with --mesh, as in dp=2,tp=2")
    else:
        policy = _policy(names[0], args, policies)
        if isinstance(policy, Plan):
            if mesh is not None and mesh != policy.mesh:
                raise ConfigError(f"--mesh is {mesh}, but {args.policy} was made for {policy.mesh}")
            mesh = policy.mesh
    ngpus = args.plan_ngpus if args.plan_ngpus is not None else mesh.size if mesh is not None else 1
    config = ComputeConfig(
        plan_ngpus=ngpus,
        runtime_ngpus=args.runtime_ngpus,
        trace_strategy=args.trace_strategy,
        constant_folding=args.constant_folding,
        guards=args.guards,
        pas_config=settings(args.pas),
    )
    return policy, config


def _policy(name: str, args: Namespace, built_in: Mapping[str, Any]) -> Any:
    if name.endswith(".json"):
        return Plan.load(name)
    if name in policies or ":" not in name:
        get_policy(name)  # raises with the nearest name
        if name not in built_in:
            raise ConfigError(f"policy {name!r} is not for an axis of --mesh; {suggest(name, built_in)}, or a function")
        return name
    found = find(name, "--policy")
    if isinstance(found, Plan) or callable(found):
        return found
    raise ConfigError(f"--policy {name!r} is {found!r}; a policy is a function (graph, config) -> Plan")


def settings(pairs: list[str]) -> dict[str, Any]:
    """KEY=VALUE texts as a dict; a value is JSON, or else the text itself. Raises ConfigError for a piece without '='."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, eq, value = pair.partition("=")
        if not eq or not key:
            raise ConfigError(f"--pas {pair!r} is not of the form key=value")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found
