"""autopar train, and `torchrun ... -m autopar.cli.train`: a run from YAML files and the command line.
Must not know how a run is trained; imports torch only to launch processes or to train.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from autopar.errors import AutoparError, ConfigError, one_line
from autopar.train.args import TrainerArgs

USAGE = """\
usage: autopar train -f CONFIG.yaml [-f MORE.yaml ...] [--key value ...]
       torchrun --nproc_per_node N -m autopar.cli.train -f CONFIG.yaml [--key value ...]

Train a model in parallel from a YAML file. `autopar train` starts the processes of one machine itself, as many as
compute_config.runtime_ngpus says. Every key is described in docs/configuration.md.

  -f, --file FILE       settings; of several files a later one wins
  --a.b.c VALUE         set a key; also --a.b.c=VALUE, and --a.b.c alone for true
  --a.0.b VALUE         in a list by index; the index after the last one adds an entry
  --a.b!                remove a key
                        in values: $(a.b) is the value of another key, ${NAME} an environment variable, $$ a dollar sign
  --print-config        show every setting and where it came from, and end
  --max-restarts N      autopar train only: start all processes again, up to N times, if one dies (default 0)
  --traceback           show where an error came from
  -h, --help            this text
"""
_HERE = {"--print-config": 0, "--traceback": 0, "--max-restarts": 1, "-h": 0, "--help": 0}  # option -> words it takes


def main(argv: list[str] | None = None, *, launch: bool = False) -> int:
    """Train, and return the exit code: 2 for an error of autopar, 1 for any other.

    launch: start the processes that the configuration asks for, unless this is one of them.
    """
    words, options = _split(sys.argv[1:] if argv is None else argv)
    if (not words and not options) or {"-h", "--help"} & set(options):
        print(USAGE, end="")
        return 0
    try:
        args, origins = TrainerArgs.read(words)
        if "--print-config" in options:
            print(describe(args, origins), end="")
        processes = args.compute_config.runtime_ngpus if args.compute_config else 1
        launch = launch and args.run_mode == "run" and processes > 1 and "RANK" not in os.environ
        args.spec(launched=not launch and "--print-config" not in options)
        if "--print-config" in options:
            return 0
        if launch:
            return _launch(words, processes, options)
        return _train(args)
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        if "--traceback" in options or not isinstance(e, AutoparError):
            traceback.print_exc()
        sys.stderr.write(f"autopar: error: {rank}{one_line(e)}\n")
        return 2 if isinstance(e, AutoparError) else 1


def _split(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words that are settings, and this command's own options."""
    words, options = [], {}
    argv = list(argv)
    while argv:
        word = argv.pop(0)
        if word not in _HERE:
            words.append(word)
        else:
            options[word] = argv.pop(0) if _HERE[word] and argv else ""
    return words, options


def _train(args: TrainerArgs) -> int:
    from autopar.train.trainer import Trainer

    Trainer(args).run()
    return 0


def _launch(words: list[str], processes: int, options: Mapping[str, str]) -> int:
    """The same command in as many processes, under torchrun."""
    restarts = options.get("--max-restarts", "0")
    if not restarts.isdigit():
        raise ConfigError(f"--max-restarts {restarts!r} is no whole number")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # NB: torchrun's own default is 1 thread, and a warning
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    traceback_option = ["--traceback"] if "--traceback" in options else []
    command = ["--standalone", "--nproc-per-node", str(processes), "--max-restarts", restarts, "-m", "autopar.cli.train"]
    try:
        torchrun([*command, *words, *traceback_option])
    except ChildFailedError as e:  # the process has said why
        return max(1, e.get_first_failure()[1].exitcode)
    except SignalException as e:
        return 128 + int(e.sigval)
    return 0


# ---- --print-config -------------------------------------------------------------------------------------------


def describe(args: TrainerArgs, origins: Mapping[str, str]) -> str:
    """The resolved settings as YAML, each with where it came from as a comment."""
    lines = list(_tree(args.to_dict(), "", origins, 0))
    width = min(60, max(len(line) for line, _ in lines))
    return "".join(f"{line:<{width}}  # {origin}\n" if origin else f"{line}\n" for line, origin in lines)


def _tree(value: Mapping[str, Any], key: str, origins: Mapping[str, str], depth: int) -> Iterator[tuple[str, str]]:
    for name, v in value.items():
        yield from _entry(f"{'  ' * depth}{_leaf(name)}:", v, f"{key}.{name}".lstrip("."), origins, depth)


def _entry(head: str, v: Any, key: str, origins: Mapping[str, str], depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(v, Mapping) and v:
        yield head, ""
        yield from _tree(v, key, origins, depth + 1)
    elif isinstance(v, list) and v:
        yield head, ""
        for i, item in enumerate(v):
            rows = list(_entry(f"{'  ' * (depth + 1)}-", item, f"{key}.{i}", origins, depth + 1))
            if isinstance(item, Mapping) and item:  # the first key stands behind the dash
                first, origin = rows[1]
                rows[:2] = [(f"{rows[0][0]} {first.lstrip()}", origin)]
            yield from rows
    else:
        yield f"{head} {_leaf(v)}", _origin(key, origins)


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """Of the key, or of what it was set with."""
    parts = key.split(".")
    set_with = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((origins[k] for k in set_with if k in origins and (k == key or not _splits(k, origins))), "default")


def _splits(key: str, origins: Mapping[str, str]) -> bool:
    """Whether settings inside of this one have origins of their own: what is not among them is a default."""
    return any(k.startswith(f"{key}.") for k in origins)


def _leaf(value: Any) -> str:
    import yaml

    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=float("inf")).strip()
    except yaml.YAMLError:  # an object that Python code has put there
        return repr(value)
    return text.removesuffix("\n...")


if __name__ == "__main__":
    sys.exit(main())
