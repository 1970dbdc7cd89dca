"""Answers of a video smoothed over time, face by face."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby
from math import inf
from statistics import median_low

from .photos import Question


def smoothed(rows: Iterable[dict], asked: list[Question], seconds: float, step: float = 0.0) -> Iterator[dict]:
    """Rows with each answer of a video's face, expected value and interval replaced by their medians over time.

    The median is taken over the frames of the same face from half a window before to half a window after, by their
    times and not by their count, so that a variable frame rate does no harm. A median drops what lasts less than half
    a window, such as a single wrong frame, and leaves sharp beginnings and ends where they are; of an even number of
    values the lower middle one is taken, so that an answer stays one that the task allows. A probability stays that
    of the answer: of 0 or 1 it follows from the expected value, else it is the median over the frames so answered.
    Only a window's rows are in memory at a time. Rows without a time, such as photographs', pass as they are.

    Args:
        rows (`Iterable[dict]`): As [`tables.rows`] gives them, each file's together and in the order of time.
        asked (`list[Question]`): Whose columns to smooth.
        seconds (`float`): The whole window's length.
        step (`float`, defaults to 0): Seconds from one frame that is looked at to the next. As each is the first
            one due, they come a little early or late; the window reaches a quarter of a step further, to miss none.

    Example:

    >>> from au_llava.action_units import select
    >>> answers, key = [0.1, 0.1, 0.9, 0.1, 0.8, 0.8, 0.8], "AU1_detection_expected"
    >>> rows = [{"file": "a.mp4", "time": place / 10, "face": 1, key: x} for place, x in enumerate(answers)]
    >>> [row[key] for row in smoothed(rows, [("detection", select("AU1"))], 0.2)]
    [0.1, 0.1, 0.1, 0.8, 0.8, 0.8, 0.8]
    """
    for _, group in groupby(rows, lambda row: row["file"]):
        yield from _of_one_file(group, asked, seconds / 2 + step / 4 + 1e-6)


def _of_one_file(rows: Iterable[dict], asked: list[Question], half: float) -> Iterator[dict]:
    before: deque[dict] = deque()  # given already, but still within the windows of those to come
    waiting: deque[dict] = deque()  # whose windows are not full yet

    def ready(until: float) -> Iterator[dict]:
        while waiting and waiting[0]["time"] + half < until:
            row = waiting[0]
            while before and before[0]["time"] < row["time"] - half:
                before.popleft()
            near = [one for one in (*before, *waiting) if one["time"] <= row["time"] + half]
            same = [one for one in near if one.get("face") == row.get("face")]
            yield row | _medians(same, asked)
            before.append(waiting.popleft())

    for row in rows:
        if "time" in row:
            yield from ready(row["time"])
            waiting.append(row)
        else:
            yield from ready(inf)
            yield row
    yield from ready(inf)


def _medians(same: list[dict], asked: list[Question]) -> dict:
    """The answers of some rows of one face, and what goes with them."""
    found: dict = {}
    for task, units in asked:
        for key in (f"{unit.code}_{task}" for unit in units):
            names = [f"{key}{kind}" for kind in ("", "_expected", "_low", "_high")]
            found |= {name: median_low(one[name] for one in same) for name in names if name in same[0]}
            if (likely := f"{key}_probability") not in same[0]:
                continue
            if task == "detection":
                present = found[f"{key}_expected"]
                found[likely] = present if found[key] >= 0.5 else round(1 - present, 6)  # a mean, too
            else:
                found[likely] = median_low(one[likely] for one in same if one[key] == found[key])
    return found
