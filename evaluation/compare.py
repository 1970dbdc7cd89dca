"""Which of two models is better, by a paired bootstrap over people on stored predictions."""

import numpy as np

from . import bootstrap
from .answers import Answers
from .scores import draw_scores, is_detection, score_row
from .table import NAMES, columns, number


COMPARED = {True: ("f1", "roc_auc"), False: ("mae", "icc31")}


def compare(first: dict[str, Answers], second: dict[str, Answers], resamples: int = bootstrap.RESAMPLES) -> dict:
    """Differences, first minus second, with 95 % intervals from resampling the same people for both.

    Args:
        first, second (`dict[str, Answers]`): By task, about the same pictures.
        resamples (`int`): Of people.

    Returns:
        `dict`: For each task that both have, and `mean` and each Action Unit: `{"metric", "first", "second",
        "difference", "low", "high"}`, of F1 and ROC-AUC for detection, of MAE and ICC(3,1) for the other tasks.

    Raises:
        ValueError: The two have no task in common, or differ in pictures, people, Action Units or labels.
    """
    shared = [task for task in first if task in second]
    if not shared:
        raise ValueError(f"Nothing to compare: the tasks are {', '.join(first)} and {', '.join(second)}.")
    return {task: compare_task(first[task], second[task], resamples) for task in shared}


def same_pictures(first: Answers, second: Answers) -> tuple[Answers, Answers]:
    """Both in the same order of pictures.

    Raises:
        ValueError: They differ in pictures, people, folds, labels or Action Units.
    """
    first, second = (answers.take(np.argsort(answers.samples, kind="stable")) for answers in (first, second))
    for what in ("samples", "subjects", "folds", "labels"):
        if not np.array_equal(one := first.__dict__[what], other := second.__dict__[what], equal_nan=what == "labels"):
            raise ValueError(
                f"{first.task}: the {what} of the two predictions differ ({len(one)} and {len(other)} pictures); "
                "compare predictions about the same pictures, data set and protocol."
            )
    if first.action_units != second.action_units:
        raise ValueError(f"{first.task}: the Action Units of the two predictions differ.")
    return first, second


def compare_task(first: Answers, second: Answers, resamples: int = bootstrap.RESAMPLES) -> list[dict]:
    """[`compare`] for one task."""
    first, second = same_pictures(first, second)
    points, draws = [], []
    for answers in (first, second):
        shown = (answers, answers.values, answers.expected_values)
        units = score_row(*shown, resamples=1)["action_units"]  # the points; the draws below are for both alike
        points.append(
            {metric: [units[unit][metric]["value"] for unit in units] for metric in units[first.action_units[0]]}
        )
        draws.append(draw_scores(*shown, resamples))
    rows = []
    for metric in COMPARED[is_detection(first.task)]:
        one, other = (point[metric] for point in points)
        difference = draws[0][metric] - draws[1][metric]
        columns = list(zip(first.action_units, one, other, difference[:, :-1].T, strict=True))
        columns.insert(0, ("mean", bootstrap.mean_over(one), bootstrap.mean_over(other), difference[:, -1]))
        for unit, a, b, spread in columns:
            low, high = bootstrap.interval(spread)
            rows.append(
                {"action_unit": unit, "metric": metric, "first": float(a), "second": float(b),
                 "difference": float(a - b), "low": low, "high": high}
            )  # fmt: skip
    return rows


def comparison_table(comparison: dict) -> str:
    """The comparison as text; `*` marks intervals without 0."""
    parts = []
    for task, rows in comparison.items():
        lines = [["", "", "A", "B", "A - B", "95 % interval", ""]]
        for row in rows:
            clear = "*" if row["low"] > 0 or row["high"] < 0 else ""
            span = f"[{number(row['low'])}, {number(row['high'])}]"
            values = (number(row[name]) for name in ("first", "second", "difference"))
            lines.append([row["action_unit"], NAMES[row["metric"]], *values, span, clear])
        parts.append(f"{task}\n{columns(lines)}")
    return "\n\n".join(parts) + "\n\n* the interval does not hold 0; of many units some do so by chance."
