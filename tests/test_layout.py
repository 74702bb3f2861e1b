"""The house rules that a machine can hold: import direction, file headers, file sizes.
Must not import the package.
"""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "autopar").rglob("*.py"))
BASE = {"errors", "config", "importing", "progress", "weights"}
MAY = {  # part -> the parts of the package it may import
    "errors": set(),
    "config": {"errors"},
    "importing": {"errors"},
    "progress": set(),
    "weights": {"errors"},
    "ir": {"errors"},
    "rules": {"ir"},
    "trace": {"ir", "rules"},
    "pas": {"ir", "rules"},
    "lower": {"ir", "rules", "pas"},
    "codegen": {"ir", "rules", "lower"},
    "runtime": set(),
    "train": {"ir", "rules", "pas", "codegen", "runtime", "driver"},
    "cli": {"ir", "rules", "pas", "lower", "codegen", "driver", "verification", "train"},
    "driver": {"ir", "trace", "pas", "lower", "codegen", "runtime"},
    "verification": {"ir", "codegen", "runtime", "driver"},
    "__main__": {"cli"},
}
EXCEPTIONS = {
    ("rules/prove.py", "autopar.runtime"),  # the prover runs local forms on in-process ranks
    ("rules/register.py", "autopar.trace"),  # registering an op makes it a leaf of the tracer
    ("runtime/launch.py", "autopar.codegen"),  # load.py executes generated files, savedir.py reads the manifest
}


def imported(file):
    """(full module name) of every import of the package, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "autopar":
            yield from (f"autopar.{a.name}" for a in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("autopar."):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("autopar"))


def test_imports_point_one_way():
    wrong = []
    for file in FILES:
        inside = file.relative_to(ROOT / "autopar")
        part = inside.parts[0].removesuffix(".py")
        for name in imported(file):
            if name in ("autopar", "autopar.__version__") or part == "__init__":
                continue
            other = name.split(".")[1]
            excused = any(str(inside) == f and name.startswith(m) for f, m in EXCEPTIONS)
            if other not in {part} | BASE | MAY[part] and not excused:
                wrong.append(f"{inside} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_base_imports_only_itself():
    for part in BASE:
        assert {n.split(".")[1] for n in imported(ROOT / f"autopar/{part}.py")} <= MAY[part]


def test_no_part_imports_in_a_circle():
    edges = defaultdict(set, {a: b & MAY.keys() for a, b in MAY.items()})
    done = set()

    def visit(part, above):
        assert part not in above, f"circle: {' -> '.join([*above, part])}"
        if part not in done:
            for other in edges[part]:
                visit(other, (*above, part))
            done.add(part)

    for part in MAY:
        visit(part, ())


@pytest.mark.parametrize("file", [f for f in FILES if f.read_text().strip()], ids=lambda f: str(f.relative_to(ROOT)))
def test_header_and_size(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 600
    doc = ast.get_docstring(ast.parse(text)) or ""
    assert len(doc.splitlines()) >= 2, "the first line says what the file does, the second what it must not know"
