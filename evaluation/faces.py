"""The faces that a model answered best and worst, for people to look at."""

import base64
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from au_llava.action_units import get_task

from .answers import Answers
from .data import EvaluationSet
from .scores import is_detection


_EACH = 3  # faces at either end
# Pixels: a face, the width and height of a cell with its words, between best and worst, and beside and above them all.
_FACE, _CELL, _LINE, _GAP, _LEFT, _TOP = 112, 122, 148, 24, 78, 28


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
    task, mean = get_task(answers.task), "P" if is_detection(answers.task) else "mean"
    page = Image.new("RGB", (_LEFT + 2 * _EACH * _CELL + _GAP, _TOP + len(answers.action_units) * _LINE), "white")
    draw, small, large = ImageDraw.Draw(page), ImageFont.load_default(11), ImageFont.load_default(14)
    starts = (_LEFT, _LEFT + _EACH * _CELL + _GAP)
    for start, text in zip(starts, ("best answers, label above 0", "worst answers"), strict=True):
        draw.text((start, 4), text, "black", large)
    for column, unit in enumerate(answers.action_units):
        top = _TOP + column * _LINE
        draw.text((4, top + _LINE // 2), unit, "black", large)
        labels, expected = answers.labels[:, column], answers.expected_values[:, column]
        for start, rows in zip(starts, extremes(labels, expected), strict=True):
            for place, row in enumerate(rows):
                left = start + place * _CELL
                face = evaluation_set.pictures([place_of[answers.samples[row]]])[0].convert("RGB")
                page.paste(face.resize((_FACE, _FACE)), (left, top))
                answer = task.number(answers.values[row, column])
                text = f"true {labels[row]:.2g}, answer {answer:.2g}\n({mean} {expected[row]:.2f})"
                draw.text((left, top + _FACE + 1), text, "black", small, spacing=1)
    file = BytesIO()
    page.save(file, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
