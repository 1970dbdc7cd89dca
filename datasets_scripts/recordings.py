"""What the label readers of all data sets share: labelled recordings, lines of label files, numbered pictures.

Readers never guess. Whatever in a label file is not as it should be becomes a line `file:line: what is wrong` in a
list of problems; [`settle`] raises them all at once, or lets the caller leave out what is damaged, knowingly.
"""

import csv
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..face_alignment import open_image


PICTURES = (".jpg", ".jpeg", ".png", ".bmp")


@dataclass(frozen=True)
class Recording:
    """The labelled frames of one sequence.

    Args:
        dataset (`str`): `bp4d`, `disfa`, `feafa`, ...
        task (`str`): What the labels answer: `detection`, `intensity_level` or `intensity`.
        action_units (`tuple[str, ...]`): The labels' columns.
        subject (`str`): Who is seen.
        sequence (`str`): The recording's name.
        numbers (`tuple[int, ...]`): The frames' numbers, as the labels count them.
        labels (`np.ndarray` of shape `(frames, units)`): In the task's range, NaN for unknown.
        images (`tuple[Path, ...]`): A file per frame; empty for a video.
        video (`Path`, *optional*): A video in which frame number n is the n-th picture, counted from 1.
        camera (`str`, *optional*): Which of several cameras filmed it.
        left_out (`tuple[tuple[int, str], ...]`): Frames that are not in `numbers`, and why.
    """

    dataset: str
    task: str
    action_units: tuple[str, ...]
    subject: str
    sequence: str
    numbers: tuple[int, ...]
    labels: np.ndarray = field(repr=False)
    images: tuple[Path, ...] = field(default=(), repr=False)
    video: Path | None = None
    camera: str = ""
    left_out: tuple[tuple[int, str], ...] = field(default=(), repr=False)

    def part(self, start: int, stop: int) -> "Recording":
        """Frames `start` to `stop` (excluded) by position; what was left out goes with the first part."""
        return replace(
            self,
            numbers=self.numbers[start:stop],
            labels=self.labels[start:stop],
            images=self.images[start:stop],
            left_out=self.left_out if start == 0 else (),
        )

    def pictures(self) -> Iterator[tuple[int, Image.Image | None, str]]:
        """Read the pictures one by one.

        Yields:
            Position, the picture (RGB) or `None`, and why there is none.
        """
        if self.video is not None:
            yield from _video_pictures(self.video, self.numbers)
            return
        for position, path in enumerate(self.images):
            try:
                yield position, open_image(path), ""
            except (ValueError, OSError) as error:
                yield position, None, f"unreadable image: {error}"


def _video_pictures(path: Path, numbers: tuple[int, ...]) -> Iterator[tuple[int, Image.Image | None, str]]:
    """Pictures of a video, in rising order: seeking is not exact in all codecs, so frames between are passed over.

    None is read beyond a damaged one: OpenCV would go on with the next, and count it by the damaged one's number.
    """
    import cv2

    video, read, whole = cv2.VideoCapture(str(path)), 0, True
    for position in np.argsort(numbers, kind="stable").tolist():
        # Frame n has been passed when n pictures have been grabbed.
        while read < numbers[position] and (whole := whole and video.grab()):
            read += 1
        picture = video.retrieve()[1] if read == numbers[position] else None
        if picture is not None:
            yield position, Image.fromarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)), ""
        else:
            yield position, None, f"{path.name} cannot be read beyond frame {read}"
    video.release()


def with_images(numbers: list[int], folder: Path) -> tuple[dict[int, Path], dict[int, str]]:
    """Find the pictures of numbered frames, however many zeros stand before the number.

    Returns:
        `tuple`: The picture of each frame, and why the other frames have none.
    """
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in PICTURES and path.stem.isdecimal():
            found.setdefault(int(path.stem), []).append(path)
    pictures, missing = {}, {}
    for number in numbers:
        if number not in found:
            missing[number] = f"no picture in {folder.name}" if found else f"no folder with pictures at {folder}"
        elif len(found[number]) > 1:
            missing[number] = f"{len(found[number])} pictures: {', '.join(path.name for path in found[number])}"
        else:
            pictures[number] = found[number][0]
    return pictures, missing


def read_lines(path: Path, problems: list[str], separator: str | None = ",") -> list[tuple[int, list[str]]]:
    """The cells of each line that is not blank, with its number in the file, counted from 1.

    Byte-order marks, Windows line ends, blanks around cells and quotation marks around them do not matter. A file
    without such a line is a problem: it is what a copy leaves that was cut short.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error})")
        return []
    except UnicodeDecodeError as error:
        problems.append(f"{path}: is not written in UTF-8 ({error}); save it so")
        return []
    lines = [
        (number, [cell.strip() for cell in _cells(line, separator)])
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip(" \t,")
    ]
    if not lines:
        problems.append(f"{path}: no lines")
    return lines


def _cells(line: str, separator: str | None) -> list[str]:
    if '"' not in line or separator is None:
        return line.split(separator)
    try:
        return next(csv.reader([line], delimiter=separator, skipinitialspace=True))
    except csv.Error:  # a cell as long as a book
        return line.split(separator)


def read_number(cell: str, accepted: tuple[float, ...]) -> float:
    """A label that may hold only certain values; 9, where it is accepted, means unknown and becomes NaN.

    Raises:
        ValueError: Anything else stands there.

    Example:

    >>> read_number("1", (0, 1, 9)), read_number("9", (0, 1, 9))
    (1.0, nan)
    """
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if value not in accepted:
        raise ValueError(f"{cell!r} is none of {', '.join(f'{one:g}' for one in accepted)}")
    return math.nan if value == 9 else value


def read_frame(cell: str) -> int:
    """A frame number, counted from 1; stored with 32 bits.

    Raises:
        ValueError: No whole number above 0 and below 2**31 stands there.
    """
    if not cell.isdecimal() or not 1 <= int(cell) < 2**31:
        raise ValueError(f"{cell!r} is no frame number; frames are counted from 1")
    return int(cell)


def settle(problems: list[str], skip_bad_labels: bool) -> None:
    """Raise what the readers complained about; or tell it, if the caller chose to leave out what is damaged.

    Raises:
        ValueError: There are problems. The first 20 are listed.
    """
    if not problems:
        return
    if skip_bad_labels:
        told = "\n".join(problems)
        print(f"{len(problems)} problem(s) in the labels; what they are about is left out:\n{told}", file=sys.stderr)
        return
    more = f"\n... and {len(problems) - 20} more" if len(problems) > 20 else ""
    raise ValueError(
        f"{len(problems)} problem(s) in the labels; mend the files, or leave out what is damaged with "
        "skip_bad_labels=True (--skip_bad_labels):\n" + "\n".join(problems[:20]) + more
    )
