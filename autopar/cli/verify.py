"""autopar verify: all ranks of a plan in this process against the model itself.
Must not know how either is run.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
import torch.utils._pytree as pytree

from autopar.cli import target
from autopar.cli.stages import listening
from autopar.errors import ConfigError, suggest
from autopar.verification import verify

MODES = ("train", "eval")


def run(args: Namespace) -> int:
    modes = tuple(args.modes.split(","))
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"unknown mode {mode!r}: {suggest(mode, MODES)}")
    policy, config = target.policy_and_config(args)
    module, inputs = target.build_module(args), target.build_inputs(args)
    if args.float64:
        module, inputs = module.double(), pytree.tree_map(_double, inputs)
    with listening():
        report = verify(module, inputs, policy, config, modes=modes)
    print(report)
    return 0 if report.ok else 1


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
