"""Intensity of facial Action Units: errors, correlations and agreement, for each unit and on average."""

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr
from sklearn.metrics import mean_absolute_error, mean_squared_error


_DESCRIPTION = """
Scores the intensities of facial Action Units (AUs), levels or continuous, one column a unit: mean absolute error (also
on non-zero targets alone), mean squared error, Pearson's correlation, Lin's concordance correlation (CCC) and the
intraclass correlations ICC(3,1) and ICC(2,1), for each unit and as the plain mean over units. Labels that are unknown
(NaN) are left out and counted.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `list` of `float`, shape `(samples, units)`): Predicted intensities.
    references (`list` of `list` of `float`, shape `(samples, units)`): True intensities; NaN where unknown.
    action_units (`list` of `str`, *optional*): Names of the columns; `"0"`, `"1"`, ... when left out.

Returns:
    `dict`: `mae`, `mae_nonzero` (over targets that are not 0), `mse`, `pearson`, `ccc`, `icc31` and `icc21`, each the
    mean over the units that have it; `unknown`, how many labels were left out; `degenerate`, a sentence for each unit
    whose scores are set by convention; and `action_units`, the same scores for each unit with its `support` (known
    labels), `nonzero`, `base_rate` (share of non-zero labels) and `unknown`.

    By convention correlations and agreements are 0 where predictions or labels are constant: nothing varies that
    could agree. A unit without any known label scores NaN, and so does `mae_nonzero` without a non-zero label; NaN is
    left out of the means.

Raises:
    ValueError: The shapes differ, or a prediction is not finite.

Examples:

    >>> metric = evaluate.load("metrics/au_intensity")
    >>> result = metric.compute(
    ...     predictions=[[0.0, 1.0], [1.0, 1.0], [3.0, 1.0]],
    ...     references=[[0.0, 0.0], [2.0, 1.0], [3.0, float("nan")]],
    ...     action_units=["AU6", "AU12"],
    ... )
    >>> round(result["mae"], 4), result["unknown"]
    (0.4167, 1)
    >>> round(result["action_units"]["AU6"]["icc31"], 4)
    0.9286
    >>> result["degenerate"]
    {'AU12': 'constant predictions: correlations and agreements are 0 by convention'}
"""

_CITATION = """
@article{shrout1979intraclass,
  title={Intraclass correlations: uses in assessing rater reliability},
  author={Shrout, Patrick E. and Fleiss, Joseph L.},
  journal={Psychological Bulletin}, volume={86}, number={2}, pages={420--428}, year={1979}
}
@article{lin1989concordance,
  title={A concordance correlation coefficient to evaluate reproducibility},
  author={Lin, Lawrence I-Kuei},
  journal={Biometrics}, volume={45}, number={1}, pages={255--268}, year={1989}
}
"""

_MEANS = ("mae", "mae_nonzero", "mse", "pearson", "ccc", "icc31", "icc21")


def intraclass_correlation(ratings) -> tuple[float, float]:
    """ICC(3,1), consistency, and ICC(2,1), absolute agreement, of single ratings (Shrout and Fleiss, 1979).

    Args:
        ratings: Array of shape `(targets, judges)` with at least two of each.

    Returns:
        The two coefficients, each 0 where all ratings are equal.

    The worked example of the article (Tables 2 and 4) gives .71 and .29:

    >>> ratings = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    >>> [round(icc, 2) for icc in intraclass_correlation(ratings)]
    [0.71, 0.29]
    """
    ratings = np.asarray(ratings, float)
    targets, judges = ratings.shape
    grand, rows, columns = ratings.mean(), ratings.mean(1), ratings.mean(0)
    between_targets = judges * ((rows - grand) ** 2).sum() / (targets - 1)
    between_judges = targets * ((columns - grand) ** 2).sum() / (judges - 1)
    residual = ((ratings - rows[:, None] - columns + grand) ** 2).sum() / ((targets - 1) * (judges - 1))
    consistent = between_targets + (judges - 1) * residual
    absolute = consistent + judges * (between_judges - residual) / targets
    difference = between_targets - residual
    return tuple(float(difference / whole) if whole else 0.0 for whole in (consistent, absolute))


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AuIntensity(evaluate.Metric):
    """See the module's description."""

    def _info(self):
        column = datasets.List(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": column, "references": column}),
            reference_urls=["https://doi.org/10.1037/0033-2909.86.2.420", "https://doi.org/10.2307/2532051"],
        )

    def _compute(self, predictions, references, action_units=None):
        predictions, references = np.asarray(predictions, float), np.asarray(references, float)
        if predictions.ndim != 2 or not predictions.size:
            raise ValueError(
                f"predictions have the shape {predictions.shape}; give one row a sample and one column a unit, at "
                "least one of each."
            )
        action_units = action_units or [str(column) for column in range(predictions.shape[1])]
        if not predictions.shape == references.shape == (len(predictions), len(action_units)):
            raise ValueError(
                f"predictions {predictions.shape}, references {references.shape} and {len(action_units)} action_units "
                "do not fit; give one row a sample and one column a unit in each."
            )
        if len(set(action_units)) < len(action_units):
            raise ValueError(
                f"action_units {', '.join(map(str, action_units))}: scores are told by name; give each name once."
            )
        if not np.isfinite(predictions).all():
            raise ValueError("predictions hold NaN or infinite values; give a number for every sample and unit.")
        if np.isinf(references).any():
            raise ValueError("references hold infinite values; give a number, or NaN where it is unknown.")

        units, degenerate = {}, {}
        for column, unit in enumerate(action_units):
            seen = ~np.isnan(references[:, column])
            truth, answer = references[seen, column], predictions[seen, column]
            units[unit] = _scores(truth, answer) | {"unknown": int((~seen).sum())}
            note = _note(truth, answer)
            if note:
                degenerate[unit] = note
        table = {name: np.array([scores[name] for scores in units.values()]) for name in _MEANS}
        means = {
            name: float("nan") if np.isnan(column).all() else float(np.nanmean(column))
            for name, column in table.items()
        }
        unknown = sum(scores["unknown"] for scores in units.values())
        return means | {"unknown": unknown, "degenerate": degenerate, "action_units": units}


def _scores(truth: np.ndarray, answer: np.ndarray) -> dict[str, float]:
    """Scores of one unit on its known labels."""
    if not len(truth):
        return dict.fromkeys(_MEANS, float("nan")) | {"support": 0, "nonzero": 0, "base_rate": float("nan")}
    strong = truth != 0
    varied = not (_constant(truth) or _constant(answer))
    scores = {
        "mae": float(mean_absolute_error(truth, answer)),
        "mae_nonzero": float(mean_absolute_error(truth[strong], answer[strong])) if strong.any() else float("nan"),
        "mse": float(mean_squared_error(truth, answer)),
        "pearson": 0.0,
        "ccc": 0.0,
        "icc31": 0.0,
        "icc21": 0.0,
    }
    if varied:
        scores["pearson"] = float(pearsonr(truth, answer).statistic)
        covariance = np.cov(truth, answer, ddof=0)
        distance = np.trace(covariance) + (truth.mean() - answer.mean()) ** 2
        scores["ccc"] = float(2 * covariance[0, 1] / distance)
        scores["icc31"], scores["icc21"] = intraclass_correlation(np.stack([truth, answer], 1))
    return scores | {"support": len(truth), "nonzero": int(strong.sum()), "base_rate": float(strong.mean())}


def _constant(values: np.ndarray) -> bool:
    """Whether nothing but rounding sets the values apart."""
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def _note(truth: np.ndarray, answer: np.ndarray) -> str:
    """What a reader must know before trusting the scores of one unit; empty when nothing."""
    if not len(truth):
        return "no known label: not scored, and left out of the means"
    notes = []
    constant = [name for name, values in (("predictions", answer), ("labels", truth)) if _constant(values)]
    if constant:
        notes.append(f"constant {' and '.join(constant)}: correlations and agreements are 0 by convention")
    if not truth.any():
        notes.append("no non-zero label: mae_nonzero is left out of the mean")
    return "; ".join(notes)
