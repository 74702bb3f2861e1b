"""The autopar command: its arguments, and errors as one line with exit code 2.
Must not import torch before a command runs: `autopar --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import NoReturn

from autopar import __version__
from autopar.errors import one_line

MODULE = "the model: 'package.module:Name' or 'path/to/file.py:Name'; Name is a module class, a function that builds one, or an instance"
EPILOG = """\
NAME stands for 'package.module:Name', 'path/to/file.py:Name', or just 'Name' in the file or package of MODULE.
Start with `autopar compile` on the example: autopar compile examples/gpt/model.py:build --inputs inputs --policy tp --plan-ngpus 2
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"autopar: error: {message}; see {self.prog} --help\n")
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    p = _Parser(prog="autopar", description="Compile single-device PyTorch models to readable parallel PyTorch code.", epilog=EPILOG)
    p.add_argument("--version", action="version", version=f"autopar {__version__}")
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = p.add_subparsers(dest="command", metavar="compile | show | verify | train | checkpoint", required=True)
    _compile(commands.add_parser("compile", help="compile a model into a folder; needs no GPU and no process group"))
    _show(commands.add_parser("show", help="what a folder of generated code holds"))
    _verify(commands.add_parser("verify", help="run all ranks in this process and compare with the model; exit code 1 if they differ"))
    commands.add_parser("train", help="train from a YAML file, on all processes of this machine", add_help=False)
    _checkpoint(commands.add_parser("checkpoint", help="merge, convert and look at checkpoints"))
    for command in commands.choices.values():
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
    return p


def _model(p: argparse.ArgumentParser) -> None:
    """What compile and verify share: the model, its inputs, the policy and the configuration."""
    p.add_argument("module", metavar="MODULE", help=MODULE)
    p.add_argument("--inputs", metavar="NAME", required=True, help="a function that returns dummy forward arguments as a dict, or a dict")
    p.add_argument("--module-fn", metavar="NAME", help="a function that builds the module where MODULE is a class that needs arguments")
    p.add_argument("--seed", type=int, default=0, help="of torch's generator before the module is built (default 0)")
    p.add_argument(
        "--policy",
        default="tp",
        help="a built-in policy (dp, tp, data), NAME of a function (graph, config) -> Plan, or a plan.json; "
        "with --mesh one per axis, as in data,tp (default tp)",
    )
    p.add_argument("--mesh", metavar="AXIS=SIZE,...", help="axes of a scale unit, outermost first: dp=2,tp=4")
    p.add_argument("--plan-ngpus", type=int, metavar="N", help="devices of a scale unit (default: those of --mesh or of the plan, else 1)")
    p.add_argument("--runtime-ngpus", type=int, metavar="N", default=0, help="devices in all, a multiple (default: one unit)")
    p.add_argument("--pas", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings of the policy: seed=3")
    p.add_argument("--trace-strategy", default="auto", metavar="HOW", help="auto, meta, cpu, cuda, cuda_run_cpu_offload or reuse_cache")
    p.add_argument("--constant-folding", action="store_true", help="bake input sizes into the code")
    p.add_argument("--guards", default="error", metavar="HOW", help="error, warn or off: when an input takes another path than traced")


def _compile(p: argparse.ArgumentParser) -> None:
    _model(p)
    p.add_argument("--gen-savedir", default="./.autopar", metavar="DIR", help="where generated code goes (default ./.autopar)")
    p.add_argument("--instance-name", metavar="NAME", help="keeps several compiles of one module apart")
    p.add_argument("--reuse", default="moo", metavar="HOW", help="match, override, moo or graph (default moo: reuse if all matches)")


def _show(p: argparse.ArgumentParser) -> None:
    p.add_argument("savedir", metavar="SAVEDIR", help="a folder of generated code, or with one below it; with --diff also a plan.json")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--graph", action="store_true", help="the traced graph")
    what.add_argument("--plan", action="store_true", help="the plan as saved")
    what.add_argument("--types", action="store_true", help="the lowered program: the type of every value, every conversion")
    what.add_argument("--guards", action="store_true", help="what the trace took for granted, with source lines")
    what.add_argument("--unruled", action="store_true", help="ops that no rule knows; they are replicated")
    what.add_argument("--diff", metavar="OTHER", help="another folder or plan.json: what differs, op by op")


def _verify(p: argparse.ArgumentParser) -> None:
    _model(p)
    p.add_argument("--modes", default="train,eval", help="train, eval or both (default train,eval)")
    p.add_argument("--float64", action="store_true", help="compare in float64, to 1e-12")


def _checkpoint(p: argparse.ArgumentParser) -> None:
    what = p.add_subparsers(dest="what", metavar="merge | convert | show", required=True)
    source = "a checkpoint's folder, or a merged file"
    merge = what.add_parser("merge", help="one file, whose 'model' and 'optimizer' the original ones load; it resumes under any layout")
    merge.add_argument("source", metavar="FOLDER", nargs="+", help=f"{source}, or the files of all its ranks")
    merge.add_argument("out", metavar="OUT", help="the file to write")
    convert = what.add_parser("convert", help="another form of a checkpoint")
    convert.add_argument("source", metavar="FOLDER", help=source)
    convert.add_argument("out", metavar="OUT", help="the file or folder to write")
    convert.add_argument("--to", required=True, metavar="FORM", help="dcp (a folder), merged (a file) or safetensors (the weights alone)")
    show = what.add_parser("show", help="what is in a checkpoint, or which checkpoints a folder holds")
    show.add_argument("source", metavar="FOLDER", help=f"{source}, or a folder of checkpoints")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 where verify found a difference, 2 for an error."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:  # its settings have any names, which argparse does not
        return importlib.import_module("autopar.cli.train").main(argv[1:], launch=True)
    args = parser().parse_args(argv)
    try:
        return importlib.import_module(f"autopar.cli.{args.command}").run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `autopar show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        if args.traceback:
            raise
        sys.stderr.write(f"autopar: error: {one_line(e)}\n")
        return 2
