"""autopar compile: a model into a folder of generated code, offline.
Must not know how any stage works.
"""

from __future__ import annotations

from argparse import Namespace

from autopar.cli import facts, target
from autopar.cli.stages import listening
from autopar.driver import compile_to
from autopar.ir.codec import load_graph


def run(args: Namespace) -> int:
    policy, config = target.policy_and_config(args)
    module, inputs = target.build_module(args), target.build_inputs(args)
    with listening() as heard:
        folder = compile_to(
            module, inputs, policy, config, gen_savedir=args.gen_savedir, reuse=args.reuse, instance_name=args.instance_name
        )
    for name, seconds in heard.seconds.items():
        note = f"  {heard.notes[-1]}" if name == "trace" and heard.notes else ""
        print(f"{name:<8}{seconds:>7.2f} s{note}")
    print(f"reused    {heard.decision.reuse} ({heard.decision.reason})")
    missing = facts.unruled(load_graph(folder))
    print("ops without a rule, replicated:", ", ".join(f"{name} ({len(uses)})" for name, uses in missing.items()) or "none")
    print(f"generated code: {folder / 'model.py'}")
    return 0
