"""A stage goes on where it was stopped, but not from what another one has left in its folder."""

import json
from pathlib import Path

from au_llava.adapters import MADE_WITH, check_made_with


def begin(output_dir: str, **made_of) -> Path:
    """The folder of a stage, made if need be, with a note of what it is made of.

    Args:
        output_dir (`str`): The folder.
        made_of: What may not change while the stage goes on: see [`version_of`] for files.

    Raises:
        ValueError: The folder was begun with something else.
    """
    folder = Path(output_dir)
    check_made_with(folder, made_of)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MADE_WITH).write_text(json.dumps(made_of))
    return folder


def version_of(file: str | Path) -> list:
    """What tells a file from others that come to lie there: its whole path, size in bytes and time of change."""
    path = Path(file).resolve()
    return [str(path), path.stat().st_size, path.stat().st_mtime_ns]
