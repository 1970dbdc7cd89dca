"""Scores of a model and of baselines that know no picture, on the same labels, with intervals over people."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import evaluate
import numpy as np

from au_llava.action_units import get_task

from . import bootstrap
from .answers import Answers


_METRICS = Path(__file__).resolve().parent.parent / "metrics"
MODEL = "AU-LLaVA"
CALIBRATED = f"{MODEL}, calibrated"
OURS = (MODEL, CALIBRATED, f"{MODEL}, expected value")
BASELINES = ("always positive", "majority", "predict the mean", "always zero")  # as the rows below name them


def answered_row(rows: dict[str, dict]) -> str:
    """Which of a task's rows users are answered: the calibrated one, where there is a calibration."""
    return CALIBRATED if CALIBRATED in rows else MODEL


@cache
def _metric(name: str):
    return evaluate.load(str(_METRICS / name))


def is_detection(task: str) -> bool:
    """Whether a task's answers are yes or no."""
    return len(get_task(task).texts) == 2


def score(
    answers: Answers,
    calibrated: Answers | None = None,
    beside: dict[str, Answers] | None = None,
    resamples: int = bootstrap.RESAMPLES,
) -> dict:
    """Everything that `results.json` says about one task.

    Args:
        answers ([`Answers`]): As the model gave them.
        calibrated ([`Answers`], *optional*): As the calibrated model gives them: one more row.
        beside (`dict[str, Answers]`, *optional*): Other models' answers about the same pictures: a row each.
        resamples (`int`): Of people, for the intervals.

    Returns:
        `dict`: `action_units`, `samples`, `subjects`, `folds`, `unknown`, `base_rate` by unit, `rows`: for the
        model's answer, its expected value, and each baseline what [`score_row`] gives, and `groups`, of the calibrated
        answers where there are any.
    """
    # A baseline is quite sure of what it says, and says the same of every picture.
    rows = {
        name: score_row(answers, values, answers.expected_values if name == MODEL else values, resamples)
        for name, values in _rows(answers).items()
    }
    if calibrated is not None:
        row = score_row(answers, calibrated.values, calibrated.expected_values, resamples)
        rows = {MODEL: rows.pop(MODEL), CALIBRATED: row} | rows
    for name, other in (beside or {}).items():
        rows[name] = score_row(other, other.values, other.expected_values, resamples)
    seen = ~np.isnan(answers.labels)
    present = np.where(seen, answers.labels > 0, False).sum(0) / np.maximum(seen.sum(0), 1)
    return {
        "action_units": answers.action_units,
        "samples": len(answers.samples),
        "subjects": len(np.unique(answers.subjects)),
        "folds": [int(fold) for fold in np.unique(answers.folds)],
        "unknown": int((~seen).sum()),
        "base_rate": dict(zip(answers.action_units, present.round(6).tolist(), strict=True)),
        "rows": rows,
        "groups": group_scores(answers if calibrated is None else calibrated, resamples),
    }


def group_scores(answers: Answers, resamples: int = bootstrap.RESAMPLES) -> dict[str, dict[str, dict]]:
    """A model's scores on each group of pictures: by what is known of them, then by group.

    Returns:
        `dict`: E.g. `["skin"]["dark"]`, with `samples`, and `mean` and `degenerate` as in [`score_row`].
    """
    found = {}
    for name, column in answers.groups.items():
        found[name] = {}
        for group in np.unique(column):
            part = answers.take(column == group)
            row = score_row(part, part.values, part.expected_values, resamples)
            told = {key: row[key] for key in ("mean", "degenerate")}
            found[name][str(group)] = {"samples": len(part.samples)} | told
    return found


def _rows(answers: Answers) -> dict[str, np.ndarray]:
    """The model's answers, and baselines made of the very labels that they are scored on, to their advantage."""
    labels, shape = answers.labels, answers.labels.shape
    mean = bootstrap.mean_over(labels)
    if is_detection(answers.task):
        return {
            MODEL: answers.values,
            "always positive": np.ones(shape),
            "majority": np.broadcast_to((mean > 0.5).astype(float), shape),
        }
    return {
        MODEL: answers.values,
        f"{MODEL}, expected value": answers.expected_values,
        "predict the mean": np.broadcast_to(np.nan_to_num(mean), shape),
        "always zero": np.zeros(shape),
    }


def score_row(
    answers: Answers, values: np.ndarray, probabilities: np.ndarray, resamples: int = bootstrap.RESAMPLES
) -> dict:
    """Score one row of a table: the mean over folds for each unit, then the mean over units.

    Args:
        answers ([`Answers`]): Labels, people and folds.
        values (`numpy.ndarray` of shape `(samples, units)`): What is scored.
        probabilities (`numpy.ndarray`, same shape): Of presence, for ROC-AUC and average precision; only `detection`
            has these.

    Returns:
        `dict`: `mean` and `action_units` (by unit), each score as `{"value", "low", "high"}` with a 95 % interval over
        people; `spread`, the standard deviation of the folds' means; `pooled`, the means with all folds taken
        together; `degenerate`, by unit, remarks of the metric on any fold.
    """
    numbers = np.unique(answers.folds).tolist()
    folds = [_compute(answers, values, probabilities, answers.folds == fold) for fold in numbers]
    pooled = _compute(answers, values, probabilities, slice(None)) if len(folds) > 1 else folds[0]
    draws = draw_scores(answers, values, probabilities, resamples)
    names = [name for name in pooled if name not in ("unknown", "degenerate", "action_units")]

    def entry(value: float, draw: np.ndarray) -> dict[str, float]:
        low, high = bootstrap.interval(draw)
        return {"value": float(value), "low": low, "high": high}

    per_unit, mean = {}, {}
    for column, unit in enumerate(answers.action_units):
        per_unit[unit] = {
            name: entry(
                bootstrap.mean_over([fold["action_units"][unit][name] for fold in folds]),
                draws[name][:, column],
            )
            for name in names
        }
    for name in names:
        value = bootstrap.mean_over([unit[name]["value"] for unit in per_unit.values()])
        mean[name] = entry(value, draws[name][:, -1])
    return {
        "mean": mean,
        "action_units": per_unit,
        "spread": {name: float(np.std([fold[name] for fold in folds])) for name in names},
        "pooled": {name: pooled[name] for name in names},
        "degenerate": _remarks(dict(zip(numbers, folds, strict=True))),
    }


def _remarks(folds: dict[int, dict]) -> dict[str, str]:
    """The metric's remark about each unit; what is true of some folds only, with their numbers."""
    where: dict[str, dict[str, list[str]]] = {}
    for fold, found in folds.items():
        for unit, note in found["degenerate"].items():
            where.setdefault(unit, {}).setdefault(note, []).append(str(fold))
    return {
        unit: "; ".join(
            note if len(some) == len(folds) else f"in fold {', '.join(some)} {note}" for note, some in notes.items()
        )
        for unit, notes in where.items()
    }


def sums(answers: Answers, values: np.ndarray) -> tuple:
    """Each person's sums, and the function that makes scores of them, as [`bootstrap.resample`] takes them."""
    if is_detection(answers.task):
        found, scores = bootstrap.detection_sums(answers.labels, values), bootstrap.detection_scores
    else:
        found, scores = bootstrap.intensity_sums(answers.labels, values), bootstrap.intensity_scores
    return bootstrap.per_subject(found, answers.subjects, answers.folds), scores


def draw_scores(
    answers: Answers, values: np.ndarray, probabilities: np.ndarray, resamples: int
) -> dict[str, np.ndarray]:
    """Each score of every resample of people: `(resamples, units + 1)`, the mean over units last.

    NaN where fewer than `LEAST_PEOPLE` have a label that the score is made of.
    """
    people, scores = sums(answers, values)
    draws = bootstrap.resample(people, scores, resamples)
    if is_detection(answers.task):
        who = (answers.subjects, answers.folds)
        ranks = bootstrap.resample_ranks(answers.labels, probabilities, *who, resamples)
        few = bootstrap.few_people(people, scores)["f1"]
        draws |= {name: bootstrap.with_mean(draw, few) for name, draw in ranks.items()}
    return draws


def _compute(answers: Answers, values: np.ndarray, probabilities: np.ndarray, rows: Sequence | slice) -> dict:
    """One call of the Evaluate module that fits the task."""
    shared = {
        "predictions": values[rows],
        "references": answers.labels[rows],
        "action_units": answers.action_units,
    }
    if not is_detection(answers.task):
        return _metric("au_intensity").compute(**shared)
    return _metric("au_detection").compute(**shared, probabilities=probabilities[rows])
