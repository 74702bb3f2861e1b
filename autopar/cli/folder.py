"""The folder of generated code that a path on the command line means.
Must not know what is done with it.
"""

from __future__ import annotations

from pathlib import Path

from autopar.codegen.savedir import read_manifest
from autopar.errors import SavedirError


def find_folder(text: str) -> Path:
    """The folder of complete generated code that a path means: itself, or the only one below it. Raises SavedirError."""
    folder = Path(text)
    if not folder.is_dir():
        raise SavedirError(f"there is no folder {folder}; compile into it with `autopar compile ... --gen-savedir`")
    if read_manifest(folder) is None:
        below = sorted(p.parent for p in folder.glob("**/manifest.json"))
        if len(below) != 1:
            found = f"several: {', '.join(map(str, below))}; name one" if below else "no manifest.json here or below; compile first"
            raise SavedirError(f"{folder} holds no complete generated code, {found}")
        folder = below[0]
        read_manifest(folder)
    return folder
