"""Videos frame by frame, in constant memory: decoding, faces, answers and ids."""

import math
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import monotonic

import cv2
from PIL import Image

from .inputs import is_camera
from .photos import Photo, Question, recognize
from .tables import rows
from .tracking import Tracker


GROUP = 64  # frames whose rows are given, and kept, together


@dataclass(frozen=True)
class Frame:
    """One frame of a video: its number from 0, when it is shown in seconds, the upright picture in square pixels."""

    number: int
    time: float
    image: Image.Image


@dataclass(frozen=True)
class Video:
    """What a video says of itself.

    Args:
        path: Its file, or the number of a camera.
        rate: Frames a second, on average; 25 where the file does not say.
        count: How many frames it should have, of Matroska guessed from its length; 0 where the file does not say.
    """

    path: str
    rate: float
    count: int

    @classmethod
    def open(cls, path: str) -> "Video":
        """Look at a video file or a camera.

        Raises:
            FileNotFoundError: There is no such file or camera.
            ValueError: It holds no video that can be read.
        """
        with closing_capture(path) as capture:
            rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        if not 0 < rate < 1000:  # no rate, or the clock's, from which a count that the file does not tell was guessed
            rate, count = 25.0, 0
        return cls(path, rate, max(0, int(count)))

    def frames(
        self, per_second: float | None = None, start: int = 0
    ) -> Generator[Frame, None, tuple[int, float, bool]]:
        """The frames in order, turned upright; those before number `start` are passed over.

        Those of a camera are timed by the clock, from 0, and never end. In the end the generator returns the number
        of the last frame that there is, whether it was kept or not, and how many seconds into the file it is shown:
        its time, and more where the picture begins after the sound; and whether others come after one that is damaged.

        Args:
            per_second (`float`, *optional*): Keep so many frames of each second; all by default.
            start (`int`, defaults to 0): The number of the first frame that may be kept.
        """
        number, time, last, due, reached, begins = -1, -1.0, -1.0, 0.0, -1.0, 0.0
        live = is_camera(self.path)
        with closing_capture(self.path) as capture:
            # How many times wider than high a pixel is shown: camcorders and discs store pictures squeezed.
            wide, high = capture.get(cv2.CAP_PROP_SAR_NUM), capture.get(cv2.CAP_PROP_SAR_DEN)
            if capture.get(cv2.CAP_PROP_ORIENTATION_META) in (90, 270):  # OpenCV turns pictures, but not this
                wide, high = high, wide
            begun = monotonic()
            while capture.grab():
                number += 1
                stamp = monotonic() - begun if live else capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                begins = begins if number else stamp  # above 0 in AVI files whose frames are stored in another order
                stamp -= begins
                # Some files have no time stamps, and some have one twice, whose frames stay before the next one.
                time = stamp if stamp > time else time + (0.001 if 0 < stamp == last else 1 / self.rate)
                last = stamp
                reached = max(time, capture.get(cv2.CAP_PROP_PTS) / self.rate)
                if per_second and time < due - 1e-6:
                    continue
                if per_second:
                    due = (math.floor(time * per_second + 1e-6) + 1) / per_second
                if number >= start:
                    read, pixels = capture.retrieve()
                    if not read:
                        break
                    image = Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
                    if min(wide, high) > 0 and wide != high:
                        image = image.resize((max(1, round(image.width * wide / high)), image.height))
                    yield Frame(number, time, image)
            # After a damaged frame others come; at the end of a file none does.
            broken = any(capture.grab() for _ in range(number + 1, self.count))
        return number, reached, broken

    def whole(self) -> bool:
        """Whether the file holds all frames that it should, those among them that it says not to show, too."""
        with closing_capture(self.path, encoded=True) as packets:
            return sum(1 for _ in iter(packets.grab, False)) >= self.count


class closing_capture(closing):  # noqa: N801
    """An opened video, closed at the end of the block; where it is asked for `encoded`, its frames are not decoded."""

    def __init__(self, path: str, encoded: bool = False):
        if not Path(path).is_file() and not is_camera(path):
            raise FileNotFoundError(f"{path}: no such file; check the path (the current folder is {Path.cwd()}).")
        # Absolute, for of `10:30.mp4` OpenCV would take `10` for a protocol; and bytes, for text that is not UTF-8
        # would end the process.
        place = int(path) if is_camera(path) else os.fsencode(Path(path).absolute())
        how = [cv2.CAP_PROP_FORMAT, -1] if encoded else []
        capture = cv2.VideoCapture(place, cv2.CAP_ANY, how)  # type: ignore[arg-type]
        if is_camera(path) and not capture.isOpened():
            raise FileNotFoundError(f"{path}: no camera of this number can be opened; try another, from 0.")
        if is_camera(path):
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the next frame shall be a new one, not one that has waited
        if not capture.isOpened() or capture.get(cv2.CAP_PROP_FRAME_WIDTH) <= 0:
            raise ValueError(f"{path}: no video stream that can be read; convert it, or check that it is whole.")
        super().__init__(capture)

    def __exit__(self, *reason):
        self.thing.release()


def recognize_video(
    pipe,
    video: Video,
    asked: list[Question],
    per_second: float | None = None,
    earlier: Iterable[dict] = (),
    group: int = GROUP,
    **settings,
) -> Generator[list[dict], None, None]:
    """The rows of a video, some frames at a time.

    Args:
        per_second (`float`, *optional*): Look at so many frames of each second; all by default.
        earlier (`Iterable[dict]`): Groups of an earlier run, which are not given again; the work goes on after them.
        group (`int`, defaults to 64): How many frames.
        settings: `detector`, `max_faces`, `batch_size`, `readout`, `mirror` of [`recognize`].

    Raises:
        ValueError: The video ends before its time; the rows until there have been given.
    """
    tracker = Tracker(max(1.0, 3 / min(per_second or video.rate, video.rate)))
    start, seen = 0, -1
    for row in earlier:
        start, seen = row["frame"] + 1, row["frame"]
        tracker.note(row["time"], [(row["face"], _box(row))] if row["status"] == "ok" else [])
    last, until, broken = -1, -1.0, False

    def kept() -> Iterator[Frame]:
        nonlocal last, until, broken
        last, until, broken = yield from video.frames(per_second, start)

    frames = kept()
    ready: list[dict] | None = None
    while ready != []:  # batches start anew with each group, so that a job that goes on makes the same batches
        ready = []
        some = recognize(pipe, islice(frames, group), asked, opened=lambda frame: frame.image, **settings)
        with closing(some):
            for photo in some:
                seen = photo.source.number
                ready += _rows(photo, video.path, tracker)
        if ready:
            yield ready
    if seen < 0:
        raise ValueError(f"{video.path}: not one frame can be read; convert it, or check that it is whole.")
    # Else it must lack frames and time: a count that was guessed is too high where the rate varies, and the time too
    # long where the last frame stays. Containers may count a few frames too many; and of a video that was cut without
    # being encoded anew those frames, too, that are there for the others' sake and never shown.
    lacks = video.count - max(last, until * video.rate) > 3 + 0.05 * video.count
    if broken or (lacks and not video.whole()):
        length = f"{until:.1f} of {video.count / video.rate:.1f} seconds"
        raise ValueError(f"{video.path}: damaged after frame {last}, {length}; the rows until there are kept.")


def _box(row: dict) -> tuple[float, float, float, float]:
    # A picture that is a face crop has no box: it is the same face all along.
    return tuple(row.get(f"box_{side}") or 0.0 for side in ("x0", "y0", "x1", "y1"))  # type: ignore[return-value]


def _rows(photo: Photo, name: str, tracker: Tracker) -> list[dict]:
    found, when = rows(photo, name), round(photo.source.time, 6)
    faces = [row for row in found if row["status"] == "ok"]
    for row, number in zip(faces, tracker.update(when, [_box(row) for row in faces]), strict=True):
        row["face"] = number
    return [row | {"frame": photo.source.number, "time": when} for row in found]
