"""Presence of facial Action Units: F1 and its companions, for each unit and on average."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score


_DESCRIPTION = """
Scores yes/no answers about facial Action Units (AUs), one column a unit: F1, precision, recall, accuracy, balanced
accuracy and, where probabilities are given, ROC-AUC and average precision, for each unit and as the plain mean over
units. Labels that are unknown (NaN) are left out and counted.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `list` of `float`, shape `(samples, units)`): 0 (absent) or 1 (present).
    references (`list` of `list` of `float`, shape `(samples, units)`): 0, 1, or NaN where the label is unknown.
    probabilities (`list` of `list` of `float`, same shape, *optional*): Probability, 0 to 1, that the unit is present.
    action_units (`list` of `str`, *optional*): Names of the columns; `"0"`, `"1"`, ... when left out.

Returns:
    `dict`: `f1`, `precision`, `recall`, `accuracy`, `balanced_accuracy` and, with probabilities, `roc_auc` and
    `average_precision`, each the mean over the units that have a known label; `unknown`, how many labels were left
    out; `degenerate`, a sentence for each unit whose scores are set by convention; and `action_units`, the same scores
    for each unit with its `support` (known labels), `positives`, `base_rate` and `unknown`.

    By convention precision, recall, F1 and average precision are 0 where nothing could be found, ROC-AUC is 0.5 where
    only one class is present, and balanced accuracy is the recall of the classes that are present. A unit without any
    known label scores NaN and is left out of the means.

Raises:
    ValueError: The shapes differ, a prediction is not 0 or 1, a reference is not 0, 1 or NaN, or a probability is not
        in 0 to 1.

Examples:

    >>> metric = evaluate.load("metrics/au_detection")
    >>> result = metric.compute(
    ...     predictions=[[1, 0], [1, 1], [0, 1], [0, 0]],
    ...     references=[[1, 0], [0, 1], [0, 1], [float("nan"), 1]],
    ...     action_units=["AU6", "AU12"],
    ... )
    >>> round(result["f1"], 4), result["unknown"]
    (0.7333, 1)
    >>> {unit: round(scores["f1"], 4) for unit, scores in result["action_units"].items()}
    {'AU6': 0.6667, 'AU12': 0.8}
    >>> metric.compute(predictions=[[0], [1]], references=[[0], [0]], action_units=["AU9"])["degenerate"]
    {'AU9': 'no positive label: recall, F1 and average precision are 0, ROC-AUC is 0.5 by convention'}
"""

_CITATION = """
@article{scikit-learn,
  title={Scikit-learn: Machine Learning in Python},
  author={Pedregosa, F. and Varoquaux, G. and Gramfort, A. and Michel, V. and Thirion, B. and others},
  journal={Journal of Machine Learning Research}, volume={12}, pages={2825--2830}, year={2011}
}
"""

_MEANS = ("f1", "precision", "recall", "accuracy", "balanced_accuracy", "roc_auc", "average_precision")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AuDetection(evaluate.Metric):
    """See the module's description."""

    def _info(self):
        column = datasets.List(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": column, "references": column}),
            reference_urls=["https://scikit-learn.org/stable/modules/model_evaluation.html"],
        )

    def _compute(self, predictions, references, probabilities=None, action_units=None):
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
        if not np.isin(predictions, (0, 1)).all():
            raise ValueError("predictions hold values other than 0 and 1; threshold probabilities first.")
        if not (np.isin(references, (0, 1)) | np.isnan(references)).all():
            raise ValueError("references hold values other than 0, 1 and NaN (unknown).")
        if probabilities is not None:
            probabilities = np.asarray(probabilities, float)
            if probabilities.shape != predictions.shape or not ((probabilities >= 0) & (probabilities <= 1)).all():
                raise ValueError(
                    f"probabilities {probabilities.shape} must have the shape {predictions.shape} of the predictions "
                    "and lie in 0 to 1."
                )

        units, degenerate = {}, {}
        for column, unit in enumerate(action_units):
            seen = ~np.isnan(references[:, column])
            truth, answer = references[seen, column].astype(int), predictions[seen, column].astype(int)
            scores = _scores(truth, answer, None if probabilities is None else probabilities[seen, column])
            units[unit] = scores | {"unknown": int((~seen).sum())}
            note = _note(truth, answer)
            if note:
                degenerate[unit] = note
        scored = [scores for scores in units.values() if scores["support"]]
        means = {
            name: float(np.mean([scores[name] for scores in scored])) if scored else float("nan")
            for name in _MEANS
            if name in units[action_units[0]]
        }
        unknown = sum(scores["unknown"] for scores in units.values())
        return means | {"unknown": unknown, "degenerate": degenerate, "action_units": units}


def _scores(truth: np.ndarray, answer: np.ndarray, probability: np.ndarray | None) -> dict[str, float]:
    """Scores of one unit on its known labels."""
    positives, support = int(truth.sum()), len(truth)
    if not support:
        empty = dict.fromkeys(_MEANS[: 5 if probability is None else 7], float("nan"))
        return empty | {"support": 0, "positives": 0, "base_rate": float("nan")}
    precision, recall, f1, count = precision_recall_fscore_support(truth, answer, labels=[0, 1], zero_division=0)
    scores = {
        "f1": float(f1[1]),
        "precision": float(precision[1]),
        "recall": float(recall[1]),
        "accuracy": float((truth == answer).mean()),
        "balanced_accuracy": float(recall[count > 0].mean()),
    }
    if probability is not None:
        both = 0 < positives < support
        scores["roc_auc"] = float(roc_auc_score(truth, probability)) if both else 0.5
        scores["average_precision"] = float(average_precision_score(truth, probability)) if positives else 0.0
    return scores | {"support": support, "positives": positives, "base_rate": positives / support}


def _note(truth: np.ndarray, answer: np.ndarray) -> str:
    """What a reader must know before trusting the scores of one unit; empty when nothing."""
    if not len(truth):
        return "no known label: not scored, and left out of the means"
    notes = []
    if not truth.any():
        notes.append("no positive label: recall, F1 and average precision are 0, ROC-AUC is 0.5 by convention")
    elif truth.all():
        notes.append("no negative label: ROC-AUC is 0.5 by convention")
    elif not answer.any():
        notes.append("never predicted: precision and F1 are 0 by convention")
    elif answer.all():
        notes.append("always predicted")
    return "; ".join(notes)
