"""README and docs: every Python snippet and command runs, and prints what the page says.
Must not know what the pages are about.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(str(p.relative_to(ROOT)) for p in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.procs
@pytest.mark.parametrize("page", PAGES)
def test_page(page):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "tests/docs_runner.py", ROOT / page]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """Relative links lead somewhere."""
    text = (ROOT / page).read_text()
    missing = [to for to in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) if not ((ROOT / page).parent / to).exists()]
    assert not missing


def test_readme_is_short():
    assert 80 <= len((ROOT / "README.md").read_text().splitlines()) <= 150
