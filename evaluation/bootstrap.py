"""Intervals by resampling people, not pictures.

Pictures of one person are alike, so that intervals over pictures are far too narrow. Most scores are functions of sums
over pictures; the sums are taken once for each person, and a resample is a weighted sum of them. ROC-AUC and average
precision come from ranks: the pictures are ranked once, and a resample weights them.
"""

import numpy as np


RESAMPLES = 1000
# Resamples stay between the lowest and the highest person. All of five people lie on one side of the truth one time in
# sixteen, and fewer people more often, so that theirs can be no 95 % interval.
LEAST_PEOPLE = 6
_SEED = 2409
_AT_ONCE = 2**18  # weights of pictures, 2 MB: they stay in the processor's cache


def detection_sums(labels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`(samples, units, 4)`: true positive, false positive, false negative, true negative; 0 where unknown."""
    cells = [(labels == 1) & (values == 1), (labels == 0) & (values == 1)]
    cells += [(labels == 1) & (values == 0), (labels == 0) & (values == 0)]
    return np.stack(cells, -1).astype(float)


def intensity_sums(labels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`(samples, units, 9)`: count, x, y, xx, yy, xy, error, and error and count on non-zero labels (x: label)."""
    seen = ~np.isnan(labels)
    x, error, strong = np.where(seen, labels, 0), np.abs(np.where(seen, labels - values, 0)), seen & (labels != 0)
    y = np.where(seen, values, 0)
    return np.stack([seen, x, y, x * x, y * y, x * y, error, error * strong, strong], -1).astype(float)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, empty: float = 0.0) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full_like(numerator, empty), where=denominator > 0)


def detection_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The scores of `metrics/au_detection` from summed counts of shape `(..., 4)`."""
    tp, fp, fn, tn = np.moveaxis(sums, -1, 0)
    hit, correct_rejection = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
    classes = (tp + fn > 0).astype(float) + (tn + fp > 0)
    scores = {
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "precision": _ratio(tp, tp + fp),
        "recall": hit,
        "accuracy": _ratio(tp + tn, tp + fp + fn + tn),
        "balanced_accuracy": _ratio(hit + correct_rejection, classes),
    }
    return {name: np.where(classes > 0, score, np.nan) for name, score in scores.items()}


def intensity_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The scores of `metrics/au_intensity` from summed moments of shape `(..., 9)`."""
    n, x, y, xx, yy, xy, error, strong_error, strong = np.moveaxis(sums, -1, 0)
    mx, my = _ratio(x, n), _ratio(y, n)
    vx, vy, cov = (_ratio(square, n) - mean for square, mean in ((xx, mx * mx), (yy, my * my), (xy, mx * my)))
    varied = (vx > 1e-11 * _ratio(xx, n)) & (vy > 1e-11 * _ratio(yy, n))  # less is rounding of the sums
    gap = (mx - my) ** 2
    between, residual = (
        (vx + vy) / 2 + cov,
        (vx + vy) / 2 - cov,
    )  # mean squares of targets and residual, over n / (n - 1)
    judges = gap * np.maximum(n - 1, 0) / 2  # mean square of judges, on the same scale
    scores = {
        "pearson": cov / np.sqrt(np.where(varied, vx * vy, 1)),
        "ccc": _ratio(2 * cov, vx + vy + gap),
        "icc31": _ratio(between - residual, between + residual),
        "icc21": _ratio(between - residual, between + residual + 2 * _ratio(judges - residual, n)),
    }
    known = n > 0
    return {
        "mae": np.where(known, _ratio(error, n), np.nan),
        "mae_nonzero": _ratio(strong_error, strong, np.nan),
        "mse": np.where(known, _ratio(xx + yy - 2 * xy, n), np.nan),
        **{name: np.where(known, np.where(varied, score, 0.0), np.nan) for name, score in scores.items()},
    }


def per_subject(sums: np.ndarray, subjects: np.ndarray, folds: np.ndarray) -> list[np.ndarray]:
    """Sums of each person, one array `(people, units, sums)` a fold, people in order of name."""
    result = []
    for fold in np.unique(folds):
        inside = folds == fold
        names, owner = np.unique(subjects[inside], return_inverse=True)
        total = np.zeros((len(names), *sums.shape[1:]))
        np.add.at(total, owner, sums[inside])
        result.append(total)
    return result


def point(people: list[np.ndarray], scores) -> dict[str, np.ndarray]:
    """Scores `(units,)` of all people as they are, the mean over folds."""
    folds = [scores(fold.sum(0)) for fold in people]
    return {name: mean_over([fold[name] for fold in folds]) for name in folds[0]}


def draw_people(counts: list[int], resamples: int = RESAMPLES) -> list[np.ndarray]:
    """How often each resample draws each person, with replacement within a fold: `(resamples, people)` for each fold.

    The draws depend on the numbers of people alone, so that rows on the same people are resampled alike and their
    differences are paired.
    """
    random = np.random.default_rng(_SEED)
    return [random.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float) for count in counts]


def resample(people: list[np.ndarray], scores, resamples: int = RESAMPLES) -> dict[str, np.ndarray]:
    """Scores of every resample, the mean over folds; NaN where fewer than `LEAST_PEOPLE` have a label for them.

    Args:
        people: From [`per_subject`].
        scores: [`detection_scores`] or [`intensity_scores`].

    Returns:
        `dict[str, numpy.ndarray]`: For each score `(resamples, units + 1)`, the mean over units last.
    """
    drawn = draw_people([len(fold) for fold in people], resamples)
    folds = [scores(np.tensordot(weights, fold, axes=1)) for weights, fold in zip(drawn, people, strict=True)]
    few = few_people(people, scores)
    return {name: with_mean(mean_over([fold[name] for fold in folds]), few[name]) for name in folds[0]}


def with_mean(draws: np.ndarray, few: np.ndarray) -> np.ndarray:
    """A score of every resample, `(resamples, units + 1)`: the mean over units last; NaN where `few` tell of it."""
    return np.where(few, np.nan, np.column_stack([draws, mean_over(draws, axis=1)]))


def few_people(people: list[np.ndarray], scores) -> dict[str, np.ndarray]:
    """Whether fewer than `LEAST_PEOPLE` have a label that a score is made of: for each unit, then for any of them.

    Args:
        people, scores: As for [`resample`].
    """
    own = [scores(fold) for fold in people]  # NaN for a person without such a label
    having = {name: ~np.isnan(np.concatenate([fold[name] for fold in own])) for name in own[0]}
    return {name: np.append(found.sum(0), found.any(1).sum()) < LEAST_PEOPLE for name, found in having.items()}


def resample_ranks(
    labels: np.ndarray, probabilities: np.ndarray, subjects: np.ndarray, folds: np.ndarray, resamples: int = RESAMPLES
) -> dict[str, np.ndarray]:
    """ROC-AUC and average precision of every resample, drawn as in [`resample`], the mean over folds.

    Args:
        labels, probabilities (`numpy.ndarray` of shape `(samples, units)`): 0, 1 or NaN, and how probable 1 is.
        subjects, folds (`numpy.ndarray` of shape `(samples,)`): Who is in each picture, and its test fold.

    Returns:
        `dict[str, numpy.ndarray]`: `roc_auc` and `average_precision`, each `(resamples, units)`.
    """
    parts = [np.flatnonzero(folds == fold) for fold in np.unique(folds)]
    owners = [np.unique(subjects[rows], return_inverse=True)[1] for rows in parts]
    drawn = draw_people([owner.max() + 1 for owner in owners], resamples)
    found = np.array(
        [
            [
                rank_scores(*columns, owner, weights)
                for columns in zip(labels[rows].T, probabilities[rows].T, strict=True)
            ]
            for rows, owner, weights in zip(parts, owners, drawn, strict=True)
        ]
    )  # (folds, units, scores, resamples)
    scores = zip(("roc_auc", "average_precision"), mean_over(found).swapaxes(0, 1).swapaxes(1, 2), strict=True)
    return dict(scores)


def rank_scores(labels: np.ndarray, probability: np.ndarray, owner: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """ROC-AUC and average precision of one unit, `(2, resamples)`, NaN where no label is known.

    Args:
        labels, probability, owner (`numpy.ndarray` of shape `(samples,)`): The label, the probability of presence, and
            the number of the person.
        weights (`numpy.ndarray` of shape `(resamples, people)`): How often each person counts.
    """
    groups = []
    for label in (0, 1):
        rows = np.flatnonzero(labels == label)
        groups.append(rows[np.argsort(probability[rows], kind="stable")])
    absent, present = groups
    if not len(absent) + len(present):
        return np.full((2, len(weights)), np.nan)
    # For each positive: how many negatives and positives rank below it, and with equals.
    ends = [
        [np.searchsorted(probability[group], probability[present], side) for side in ("left", "right")]
        for group in groups
    ]
    parts = []
    for some in np.array_split(weights.T, max(1, len(weights) * len(labels) // _AT_ONCE), axis=1):
        weight = some[owner[present]]
        negatives, positives = (_from_zero(some[owner[group]]) for group in groups)
        below, upto = (negatives[end] for end in ends[0])
        overtaken = (weight * (below + upto)).sum(0) / 2
        hits, alarms = positives[-1] - positives[ends[1][0]], negatives[-1] - below
        precise = (weight * _ratio(hits, hits + alarms)).sum(0)
        parts.append([_ratio(overtaken, positives[-1] * negatives[-1], 0.5), _ratio(precise, positives[-1])])
    return np.concatenate(parts, 1)


def _from_zero(weight: np.ndarray) -> np.ndarray:
    """Sum of all rows before each, and before the end: one row more than there are."""
    return np.concatenate([np.zeros((1, weight.shape[1])), weight.cumsum(0)])


def mean_over(columns, axis: int = 0) -> np.ndarray:
    """Mean that leaves NaN out, and is NaN without a warning where nothing is left."""
    columns = np.asarray(columns, float)
    seen = ~np.isnan(columns)
    return _ratio(np.where(seen, columns, 0).sum(axis), seen.sum(axis).astype(float), np.nan)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of resampled values.

    >>> [round(end) for end in interval(np.arange(1001))]
    [25, 975]
    """
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
