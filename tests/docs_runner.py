"""Runs the fenced blocks of one Markdown file in order, in an empty folder, and compares what they print with the text blocks.
Must not know what the documents are about.

    python tests/docs_runner.py docs/plans.md [--update]

```python blocks share one namespace; one that begins with `# name.py` is that file, to be imported or compiled by later blocks.
```bash blocks run line by line; `make` targets and scripts of benchmarks/ are only looked for. A ```text block right after
one of these is its whole output, seconds, digests and rounding errors aside; --update writes it anew.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VARYING = re.compile(r"\s*\d+\.\d+ s\b|\b[0-9a-f]{16,64}\b|worst: .*|\b\d\.\d+e[+-]\d+\b")  # seconds, digests, rounding errors
SLOW = re.compile(r"make (\w+)|python (?:-m pytest )?((?:benchmarks|tests|examples)/\S+\.py)")


@dataclass(frozen=True)
class Block:
    kind: str
    text: str
    start: int  # of the text in the document
    line: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


def blocks(document: str) -> list[Block]:
    return [Block(m[1], m[2], m.start(2), document.count("\n", 0, m.start(2)) + 1) for m in FENCE.finditer(document)]


def run_python(block: Block, doc: Path, namespace: dict[str, Any]) -> str:
    """What the block prints."""
    name = re.match(r"# (\w+\.py)\n", block.text)
    if name:
        Path(name[1]).write_text(block.text)
        __import__(name[1].removesuffix(".py"))
        return ""
    # NB: known to linecache, so that source lines in graphs and errors are those of the document.
    file = f"{doc.name}:{block.line}"
    linecache.cache[file] = (len(block.text), None, block.text.splitlines(True), file)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.text, file, "exec"), namespace)
    return printed.getvalue()


def run_bash(block: Block) -> str:
    """What the commands print. Raises AssertionError for one that fails or names nothing."""
    from autopar.cli.main import main

    printed = ""
    for command in filter(None, block.text.replace("\\\n", " ").splitlines()):
        slow = SLOW.match(command)
        if slow and slow[1]:
            assert re.search(rf"^{slow[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"there is no target for {command!r}"
        elif slow:
            assert (ROOT / slow[2]).exists(), f"there is no script for {command!r}"
        elif command.startswith("autopar ") and not set("|>") & set(command):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                code = main(shlex.split(command, comments=True)[1:])
            assert code == 0, f"{command!r} ended with {code}"
            printed += out.getvalue()
        else:
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
            done = subprocess.run(["bash", "-ec", command], env=env, capture_output=True, text=True)
            assert done.returncode == 0, f"{command!r} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            printed += done.stdout
    return printed


def outputs(doc: Path) -> Iterator[tuple[Block, Block | None, str]]:
    """(block, text block after it, what it printed) for every block that runs. Leaves the working folder in a fresh one."""
    document = doc.read_text()
    found, namespace = blocks(document), {"__name__": doc.stem}
    with tempfile.TemporaryDirectory() as tmp:
        for shared in ("examples", "benchmarks"):
            Path(tmp, shared).symlink_to(ROOT / shared)
        os.chdir(tmp)
        sys.path.insert(0, tmp)
        for block, after in zip(found, [*found[1:], None], strict=True):
            if block.kind in ("python", "bash"):
                printed = run_python(block, doc, namespace) if block.kind == "python" else run_bash(block)
                follows = after is not None and after.kind == "text" and not document[block.end + 4 : after.start - 8].strip()
                yield block, after if follows else None, printed.replace(tmp + "/", "")
        os.chdir(ROOT)


def plain(text: str) -> list[str]:
    return [re.sub(r" +", " ", VARYING.sub(" …", line)).rstrip() for line in text.strip("\n").splitlines()]


def main() -> int:
    doc, update = Path(sys.argv[1]).resolve(), "--update" in sys.argv
    wrong, document, shift = 0, doc.read_text(), 0
    for block, text, printed in outputs(doc):
        if text is None or plain(text.text) == plain(printed):
            continue
        if update:
            new = "\n".join(line.rstrip() for line in printed.strip("\n").splitlines()) + "\n"
            document = document[: text.start + shift] + new + document[text.end + shift :]
            shift += len(new) - len(text.text)
        else:
            wrong += 1
            print(f"{doc.name}:{block.line} prints something else than {doc.name}:{text.line} says:\n{printed}")
    if update:
        doc.write_text(document)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
