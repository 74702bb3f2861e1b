"""The table of the reference document's statements: every test it names exists, and every row without one says why.
Must not know what the tests do.
"""

import ast
import functools
from pathlib import Path

import pytest

from tests.train_statements import FILES, STATEMENTS

HERE = Path(__file__).parent


@functools.cache
def names_in(file):
    path = HERE / f"{file}.py"
    tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}


@pytest.mark.parametrize("row", STATEMENTS, ids=lambda r: r[0])
def test_statement(row):
    _, says, tests, note = row
    assert says and (tests or note), "a statement without a test needs a reason"
    for name in tests.split():
        file, _, test = name.partition(":")
        assert test in names_in(FILES[file]), f"{FILES[file]}.py has no {test}"


def test_ids_are_unique():
    ids = [row[0] for row in STATEMENTS]
    assert len(ids) == len(set(ids)) and len(ids) > 150


def test_all_hooks_are_listed():
    from autopar.train.args import HookMapConfig

    said = " ".join(row[1] for row in STATEMENTS)
    assert not [name for name in HookMapConfig.__dataclass_fields__ if name not in said]
