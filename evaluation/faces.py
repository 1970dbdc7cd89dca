"""The faces that a model answered best and worst, for people to look at."""

import base64
from io import BytesIO

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from au_llava.action_units import get_task

from .answers import Answers
from .data import EvaluationSet
from .scores import is_detection


_EACH = 3  # faces at either end


def extremes(labels: np.ndarray, expected: np.ndarray) -> tuple[list[int], list[int]]:
    """Rows of the best and the worst answers about one Action Unit, best and worst first.

    Best are small errors on faces that show the unit: a face without it is easy to be right about.

    >>> extremes(np.array([0.0, 1.0, 1.0]), np.array([0.9, 0.8, 0.3]))
    ([1, 2], [0, 2, 1])
    """
    error = np.abs(labels - expected)
    known = np.flatnonzero(~np.isnan(labels))
    shown = known[labels[known] > 0]
    best = shown[np.argsort(error[shown], kind="stable")][:_EACH]
    worst = known[np.argsort(-error[known], kind="stable")][:_EACH]
    return best.tolist(), worst.tolist()


def sheet(answers: Answers, evaluation_set: EvaluationSet) -> str:
    """A JPEG data URI: for each Action Unit three of the best and the worst answers, each with its label."""
    place_of = {sample: place for place, sample in enumerate(evaluation_set.samples)}
    task = get_task(answers.task)
    names = {True: "P", False: "mean"}[is_detection(answers.task)]
    units = answers.action_units
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(7.4, 1.3 * len(units) + 0.4), layout="constrained")
        grid = figure.subplots(len(units), 2 * _EACH, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for column, unit in enumerate(units):
            labels, expected = answers.labels[:, column], answers.expected_values[:, column]
            best, worst = extremes(labels, expected)
            for start, rows in ((0, best), (_EACH, worst)):
                for axes, row in zip(grid[column, start:], rows, strict=False):
                    picture = evaluation_set.pictures([place_of[answers.samples[row]]])[0]
                    axes.imshow(picture.convert("RGB").resize((112, 112)))
                    value = task.number(answers.values[row, column])
                    axes.set_title(
                        f"{unit}: true {labels[row]:.4g}\nanswer {value} ({names} {expected[row]:.2f})",
                        fontsize=6.5, pad=2,
                    )  # fmt: skip
        for start, text in ((0, "best answers, unit present"), (_EACH, "worst answers")):
            grid[0, start + 1].annotate(
                text, (0.5, 1.32), xycoords="axes fraction", ha="center", fontsize=9, fontweight="bold"
            )
        file = BytesIO()
        figure.savefig(file, format="jpeg", dpi=100, pil_kwargs={"quality": 75})
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
