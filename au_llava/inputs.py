"""Which pictures and videos a command is about, and what a file made from one of them is called."""

import glob
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from .action_units import TASKS


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
HEIC = (".heic", ".heif")  # pictures of phones, which Pillow cannot read: inputs all the same, to be reported
VIDEOS = (
    ".mp4",
    ".m4v",
    ".mov",
    ".avi",
    ".mkv",
    ".webm",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".flv",
    ".3gp",
    ".ts",
    ".mts",
    ".m2ts",
)
# What a picture or a film with boxes is called that was made of an input, as in smile.jpg.png
_OVERLAY = re.compile(rf"({'|'.join(map(re.escape, PICTURES + VIDEOS))})\.(png|mp4)$", re.IGNORECASE)
_TIMELINE = re.compile(rf"\.(csv|jsonl|parquet)\..+\.({'|'.join(TASKS)})\.png$")


def is_video(name: str) -> bool:
    """Whether a name is a video's, judged by its ending."""
    return name.lower().endswith(VIDEOS)


def is_camera(name: str) -> bool:
    """Whether a name is a camera's number, 0 to 99; a file or folder of that name comes first."""
    return name in map(str, range(100)) and not Path(name).exists()


def expand(inputs: Iterable[str], leave_out: Path | None = None) -> list[str]:
    """Every picture and video that the inputs name, each once, in order.

    How many files in folders have other endings, or are named like overlays, is told on standard error, and so are the
    folders that cannot be read.

    Args:
        inputs: Files, http(s) addresses, folders (searched with all below them), patterns such as `"day?/*.jpg"`, or
            `"-"` for a list of those on standard input, one a line. What names no picture is kept, to be reported.
            Hidden files and folders, and time lines and overlays, which this program writes, are no inputs unless
            they are named.
        leave_out (`Path`, *optional*): The overlays' folder, whose files are no inputs either.

    Raises:
        ValueError: An empty text, an address of a video, or a folder or pattern all of whose files lie in `leave_out`.
    """
    passed: set[Path] = set()
    drawn: set[str] = set()
    found = _search(inputs, leave_out, passed, drawn)
    if passed:
        counts = Counter(path.suffix.lower() or "without an ending" for path in passed).most_common()
        told = ", ".join(f"{count} {ending}" for ending, count in counts[:8]) + (" and others" if counts[8:] else "")
        print(f"Passed over, for their endings are not those of pictures or videos: {told}.", file=sys.stderr)
    if drawn:
        print(f"Passed over, for they are named like overlays, as {min(drawn)}: {len(drawn)}.", file=sys.stderr)
    return list(dict.fromkeys(found))


def _search(inputs: Iterable[str], leave_out: Path | None, passed: set[Path], drawn: set[str]) -> list[str]:
    found: list[str] = []
    spared = leave_out and Path(os.path.abspath(leave_out))  # it and what holds it may be named differently
    for text in inputs:
        if text == "-":
            lines = (os.fsdecode(line).strip() for line in sys.stdin.buffer)  # names need not be UTF-8
            found += _search((line for line in lines if line), leave_out, passed, drawn)
        elif not text:
            raise ValueError("An input is an empty text, as from a variable that is not set; name a file or a folder.")
        elif _is_address(text) and is_video(text):
            raise ValueError(f"{text}: videos are not fetched; download it, and give the file.")
        elif Path(text).is_dir() or (glob.has_magic(text) and not Path(text).exists()):
            matches = [text] if Path(text).is_dir() else sorted(glob.glob(text, recursive=True))
            files = [file for match in matches for file in _files(match, passed) if not _TIMELINE.search(file)]
            files = _without_overlays(files, drawn)
            kept = [file for file in files if spared not in (path := Path(os.path.abspath(file)), *path.parents)]
            if files and not kept:
                raise ValueError(f"--overlay {leave_out} holds all of {text}; name another folder.")
            found += kept or [text]
        else:
            found.append(text)
    return found


def tell_unread(error: OSError) -> None:
    """Say that a folder could not be read; for `os.walk`, which else leaves it out without a word."""
    print(f"Passed over, for it cannot be read: {error.filename} ({error.strerror}).", file=sys.stderr)


def _files(match: str, passed: set[Path]) -> list[str]:
    """A file itself; of a folder the pictures and videos below it. Other files there that can be seen are noted.

    Linked folders are entered, each once, and none that holds or is a part of this one; a picture's link that leads
    nowhere is taken, to be reported.
    """
    if not Path(match).is_dir():
        return [match]
    root, taken = os.path.realpath(match), []
    been = {os.path.realpath(folder) for folder, _, _ in os.walk(match)}

    def adds(path: str) -> bool:
        """Whether a folder holds what is not taken anyway."""
        place = os.path.realpath(path)
        if place == os.path.join(root, os.path.relpath(path, match)):  # no link led there
            return True
        new = place not in been and not root.startswith(place + os.sep)
        been.add(place)
        return new

    for folder, folders, names in os.walk(match, onerror=tell_unread, followlinks=True):
        seen = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in seen if adds(os.path.join(folder, name))]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in PICTURES + HEIC + VIDEOS:
                taken += [path] if path.is_file() or path.is_symlink() else []
            elif path.is_file():
                passed.add(path)
    return [str(path) for path in sorted(taken)]


def _without_overlays(files: list[str], drawn: set[str]) -> list[str]:
    """Files that are not named like overlays, which are noted; all, if there is nothing else."""
    kept = [file for file in files if not _OVERLAY.search(file)]
    drawn |= set(files) - set(kept) if kept else set()
    return kept or files


@dataclass(frozen=True)
class Input:
    """What one of the inputs is called elsewhere.

    Args:
        part: In the journal. It tells a file from others of the same name: by its whole path, size and time of change.
        place: In names of files that are made from it: its path below the folder that holds all inputs, which no two
            of them share.
    """

    part: str
    place: str


def described(names: list[str]) -> dict[str, Input]:
    """Each input by its name.

    >>> described(["photos/day/a.jpg", "photos/a.jpg"])["photos/day/a.jpg"].place
    'day/a.jpg'
    """
    folders = {os.path.dirname(os.path.abspath(name)) for name in names if not _is_address(name)}
    top = os.path.commonpath(folders) if folders else ""
    return {
        name: Input(_part(name), _place(name) if _is_address(name) else os.path.relpath(os.path.abspath(name), top))
        for name in names
    }


def _place(address: str) -> str:
    """An address as a name of a file; systems take 255 bytes, and signed addresses are longer."""
    place = quote(address, safe="")
    return place if len(place) < 200 else f"{place[:180]}-{hashlib.sha256(place.encode()).hexdigest()[:12]}"


def _part(name: str) -> str:
    try:
        state = Path(name).stat()
    except (OSError, ValueError):  # an address, or no file
        return name
    return f"{name} ({Path(name).absolute()}, {state.st_size} bytes, {state.st_mtime_ns})"


def _is_address(name: str) -> bool:
    return name.startswith(("http://", "https://"))
