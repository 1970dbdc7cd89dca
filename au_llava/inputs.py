"""Which pictures and videos a command is about, and what a file made from one of them is called."""

import glob
import re
import sys
from collections.abc import Iterable
from pathlib import Path


PICTURES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".jp2",
    ".ppm",
)
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".mts")


def is_video(name: str) -> bool:
    """Whether a name is a video's, judged by its ending."""
    return name.lower().endswith(VIDEOS)


def is_camera(name: str) -> bool:
    """Whether a name is a camera's number; a file or folder of that name comes first."""
    return name.isdecimal() and not Path(name).exists()


def expand(inputs: Iterable[str], leave_out: Path | None = None) -> list[str]:
    """Every picture and video that the inputs name, each once, in order.

    Args:
        inputs: Files, http(s) addresses, folders (searched with all below them), patterns such as `"day?/*.jpg"`, or
            `"-"` for a list of those on standard input, one a line. What names no picture is kept, to be reported.
        leave_out (`Path`, *optional*): A folder whose files are not inputs.
    """
    found: list[str] = []
    spared = leave_out and leave_out.absolute()  # it and the folder that holds it may be named differently
    for text in inputs:
        if text == "-":
            found += expand((line.strip() for line in sys.stdin if line.strip()), leave_out)
        elif Path(text).is_dir():
            files = [path for path in Path(text).rglob("*") if path.suffix.lower() in PICTURES + VIDEOS]
            files = [path for path in files if not path.name.startswith(".") and spared not in path.absolute().parents]
            found += [str(path) for path in sorted(files)] or [text]
        elif glob.has_magic(text) and not Path(text).exists():
            found += sorted(glob.glob(text, recursive=True)) or [text]
        else:
            found.append(text)
    return list(dict.fromkeys(found))


def identity(name: str) -> str:
    """What tells an input from others, even of its name: of a file also its whole path, size and time of change."""
    try:
        state = Path(name).stat()
    except (OSError, ValueError):  # an address, or no file
        return name
    return f"{name} ({Path(name).absolute()}, {state.st_size} bytes, {state.st_mtime_ns})"


def place_below(name: str, inputs: Iterable[str]) -> Path:
    """A relative path that no two inputs share: the one below the folder that holds them all.

    >>> str(place_below("photos/day/a.jpg", ["photos/day/a.jpg", "photos/a.jpg"]))
    'day/a.jpg'
    """
    if _is_address(name):
        return Path(re.sub(r"[^\w.-]+", "_", name))
    folders = [Path(text).absolute().parent for text in inputs if not _is_address(text)]
    top = next(path for path in (folders[0], *folders[0].parents) if all(path in (p, *p.parents) for p in folders))
    return Path(name).absolute().relative_to(top)


def _is_address(name: str) -> bool:
    return name.startswith(("http://", "https://"))
