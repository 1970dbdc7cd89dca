"""Which face of a video is whose: an id stays with a face from frame to frame."""

import numpy as np
from scipy.optimize import linear_sum_assignment


Box = tuple[float, float, float, float]


class Tracker:
    """Gives faces ids by where they are: a face belongs to the id whose last box it overlaps or lies closest to.

    It looks at places, not at people: who leaves the picture and comes back later gets a new id, and two people who
    swap places between two frames swap ids.

    Args:
        patience (`float`, defaults to 1.0): Seconds that an id waits for a face that was lost; until the next frame at
            least, however far that is.

    Example:

    >>> tracker = Tracker()
    >>> tracker.update(0.0, [(0, 0, 50, 50), (100, 0, 150, 50)])
    [1, 2]
    >>> tracker.update(0.04, [(103, 0, 153, 50), (400, 0, 450, 50), (2, 0, 52, 50)])
    [2, 3, 1]
    """

    def __init__(self, patience: float = 1.0):
        self.patience, self.count, self.time = patience, 0, 0.0
        self.last: dict[int, tuple[float, Box]] = {}

    def update(self, time: float, boxes: list[Box]) -> list[int]:
        """The ids of the faces of the next frame.

        Args:
            time (`float`): When the frame is shown, in seconds; not before the last one.
            boxes (`list`): The faces' boxes, (x0, y0, x1, y1) in pixels.
        """
        self.last = {
            number: (when, box)
            for number, (when, box) in self.last.items()
            if time - when <= self.patience or when == self.time
        }
        known, ids = list(self.last), [0] * len(boxes)
        if known and boxes:
            # Cut off at 1, so that pairs that cannot be are all alike and none is worth giving up a good pair for.
            cost = _cost(np.array([self.last[number][1] for number in known]), np.array(boxes)).clip(max=1)
            for row, column in zip(*linear_sum_assignment(cost), strict=True):
                if cost[row, column] < 1:
                    ids[column] = known[row]
        for index, number in enumerate(ids):
            if not number:
                self.count += 1
                ids[index] = self.count
        self.note(time, zip(ids, boxes, strict=True))
        return ids

    def note(self, time: float, faces) -> None:
        """Remember a frame's `(id, box)` pairs that are known already, as when a job goes on."""
        self.time = time
        for number, box in faces:
            self.last[number] = (time, box)
            self.count = max(self.count, number)


def _cost(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """`(old, new)`: distance of the centres in face sizes, less the overlap; 1 and more cannot be the same face."""
    corners = np.minimum(old[:, None, 2:], new[None, :, 2:]) - np.maximum(old[:, None, :2], new[None, :, :2])
    common = corners.clip(0).prod(-1)
    area_old, area_new = ((boxes[:, 2:] - boxes[:, :2]).prod(-1).clip(1e-6) for boxes in (old, new))
    overlap = common / (area_old[:, None] + area_new[None] - common)
    centres = (old[:, None, :2] + old[:, None, 2:] - new[None, :, :2] - new[None, :, 2:]) / 2
    size = np.sqrt(np.sqrt(area_old[:, None] * area_new[None]))
    ratio = np.sqrt(area_old[:, None] / area_new[None])
    cost = np.linalg.norm(centres, axis=-1) / size - overlap
    return np.where((ratio > 2.5) | (ratio < 0.4), 10.0, cost)
