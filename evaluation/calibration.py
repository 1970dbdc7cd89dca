"""Make a model's probabilities mean what they say, and its values as good as its distributions allow.

All is fitted on the validation split and nothing else, and is stored with the model's processor, for each task with
`fitted_on`, the data sets, protocols, options and test folds whose validation people were used;
[`Recognition.calibrated`] applies it. `{"detection": {"temperature": 1.4, "temperatures": {"AU1": 1.4, ...},
"thresholds": {"AU1": 0.31, ...}}, "intensity_level": {"temperature": 1.1, "decision": "median", "mass": 0.82},
"intensity": {"temperature": 0.6, "temperatures": {"FEAFA1": 0.6, ...}, "lines": {"FEAFA1": [0.1, 1.2], ...},
"margins": {"FEAFA1": [0.08, 0.21], ...}}}`. What is there for each unit is of the list that it was last fitted with.

- A temperature T turns a distribution p into p^(1/T), scaled to sum 1 (Guo et al., 2017): T above 1 makes it humbler.
- A threshold on the probability of presence, for each Action Unit, with the best F1: the mean over resampled pictures,
  for where F1 peaks hangs on a few of them.
- Of a task whose values are one symbol each, the median, which should have the smallest absolute error, or the most
  probable value, whichever has it: the distributions of some models are no more than two points.
- Of one whose values have several digits, a line for each Action Unit from the expected value to the value: of all
  digits after the first the model tells only those that follow its own choice, so that its median says little.
- Intervals that hold the label nine times in ten (split conformal prediction; Vovk, Gammerman and Shafer, 2005): of
  levels, how much of the distribution they have to hold for that; of intensities, for each Action Unit how far the
  label lay from the answer, by itself for the lowest answer and for all others.
"""

import json
import math
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from au_llava import AuLlavaProcessor
from au_llava.action_units import get_task
from au_llava.recognition_au_llava import temperatures_of
from au_llava.templates_au_llava import write_decision_files

from . import bootstrap
from .answers import Answers, as_recognition, decide, read_answers, read_origin, recognised
from .data import RENDERED, leaks, whose
from .scores import is_detection


BINS, RESAMPLES = 15, 200
BY_UNIT = ("temperatures", "thresholds", "lines", "margins")
# Lines that are tried: slopes, and shares of the validation pictures that are to come out as the lowest value.
SLOPES = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.4, 1.6, 2, 2.5])
SHARES = np.linspace(0, 0.975, 40)
HELD = 0.9  # of the labels are to lie in their intervals


def fit(answers: dict[str, Answers]) -> dict[str, dict]:
    """Fit temperatures, and what makes values of the distributions.

    Args:
        answers (`dict[str, Answers]`): By task, about the validation split.

    Raises:
        ValueError: The answers are about another split: thresholds chosen on test data would flatter the model.
    """
    fitted = {}
    for task, answer in answers.items():
        if answer.split != "validation":
            raise ValueError(
                f"Calibration needs the split 'validation', but these answers are about {answer.split!r}."
            )
        if (people := len(np.unique(answer.subjects))) < bootstrap.LEAST_PEOPLE:
            warnings.warn(
                f"{task} is calibrated on fewer than {bootstrap.LEAST_PEOPLE} people ({people}), who tell little of "
                "others; give pictures of more people, or take calibrated=False.",
                stacklevel=2,
            )
        temperature = round(fit_temperature(answer), 4)
        fitted[task] = {"temperature": temperature}
        if is_detection(task):
            fitted[task]["temperatures"] = dict.fromkeys(answer.action_units, temperature)
            probability = apply(answer, fitted[task]).expected_values
            fitted[task]["thresholds"] = {
                unit: fit_threshold(answer.labels[:, column], probability[:, column])
                for column, unit in enumerate(answer.action_units)
            }
        elif len(get_task(task).texts[0]) == 1:
            humbler = apply(answer, fitted[task])
            errors = {
                way: np.nanmean(np.abs(decide(humbler, way).values - answer.labels)) for way in ("median", "mode")
            }
            fitted[task]["decision"] = min(errors, key=errors.get)
            fitted[task]["mass"] = fit_mass(apply(answer, fitted[task]))
        else:
            fitted[task]["temperatures"] = dict.fromkeys(answer.action_units, temperature)
            fitted[task]["lines"] = {
                unit: fit_line(answer.labels[:, column], answer.expected_values[:, column])
                for column, unit in enumerate(answer.action_units)
                if (answer.labels[:, column] > 0).any()
            }
            fitted[task]["margins"] = fit_margins(apply(answer, fitted[task]))
    return fitted


def fit_folds(predictions: str | Path) -> dict[int, dict[str, dict]]:
    """[`fit`] for each test fold by itself, from stored predictions about the split validation.

    Args:
        predictions: Folder or file.

    Returns:
        `dict`: By test fold (0 where there is one test split) what [`fit`] gives, with `fitted_on`.
    """
    answers, origin, fitted = read_answers(predictions), read_origin(predictions), {}
    for fold in sorted({int(fold) for answer in answers.values() for fold in answer.folds}):
        own = fit({task: answer.take(answer.folds == fold) for task, answer in answers.items()})
        source = {name: origin[name] for name in ("dataset", "protocol", "options")} | {"fold": fold}
        fitted[fold] = {task: values | {"fitted_on": [source]} for task, values in own.items()}
    return fitted


def fit_temperature(answers: Answers) -> float:
    """The temperature, 0.05 to 20, under which the labels are most likely."""
    seen = ~np.isnan(answers.labels)
    log_probability = np.log(answers.distributions[seen].clip(1e-12))
    chosen = nearest(answers.labels[seen], answers.task)

    def surprise(log_temperature: float) -> float:
        scaled = log_probability / np.exp(log_temperature)
        scaled -= scaled.max(1, keepdims=True)
        return float((np.log(np.exp(scaled).sum(1)) - np.take_along_axis(scaled, chosen[:, None], 1)[:, 0]).mean())

    return float(np.exp(minimize_scalar(surprise, bounds=(np.log(0.05), np.log(20)), method="bounded").x))


def fit_threshold(labels: np.ndarray, probability: np.ndarray) -> float:
    """The threshold on the probability of presence with the best F1; 0.5 where no label is positive.

    It is the mean over resampled pictures, of which a few with the unit decide where F1 peaks.

    >>> round(fit_threshold(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.3, 0.9])), 1)
    0.3
    """
    seen = ~np.isnan(labels)
    labels, probability = labels[seen], probability[seen]
    generator = np.random.default_rng(0)
    drawn = [generator.integers(len(labels), size=len(labels)) for _ in range(RESAMPLES)] if len(labels) else []
    found = [best_threshold(labels[rows], probability[rows]) for rows in drawn if (labels[rows] == 1).any()]
    return round(float(np.mean(found)), 6) if found else 0.5


def best_threshold(labels: np.ndarray, probability: np.ndarray) -> float:
    """The threshold with the best F1 on these pictures, some of them positive.

    Between two neighbouring probabilities the middle is taken.

    >>> best_threshold(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.3, 0.9]))
    0.25
    """
    order = np.argsort(-probability, kind="stable")
    ranked, hits = probability[order], np.cumsum(labels[order] == 1)
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + hits[-1])
    last_of_ties = np.append(ranked[1:] < ranked[:-1], True)
    best = int(np.where(last_of_ties, f1, -1).argmax())
    below = ranked[best + 1] if best + 1 < len(ranked) else 0.0
    return float((ranked[best] + below) / 2)


def fit_line(labels: np.ndarray, expected: np.ndarray) -> list[float]:
    """Zero and slope of the line from the expected value to the value, cut off at 0 and 1.

    The best line has the smallest sum of the mean absolute error, in parts of that of always answering zero, and of
    what ICC(3,1) lacks of 1.

    >>> fit_line(np.array([0, 0, 0.2, 0.4]), np.array([0.1, 0.1, 0.3, 0.5]))
    [0.1, 1.0]
    """
    seen = ~np.isnan(labels)
    labels, expected = labels[seen], expected[seen]
    zeros = np.unique(np.append(np.quantile(expected, SHARES), 0))
    lines = np.array([(zero, slope) for zero in zeros for slope in SLOPES])
    values = (lines[:, 1] * (expected[:, None] - lines[:, 0])).clip(0, 1)
    moments = bootstrap.intensity_sums(np.broadcast_to(labels[:, None], values.shape), values).sum(0)
    scores = bootstrap.intensity_scores(moments)
    zero, slope = lines[(scores["mae"] / labels.mean() - scores["icc31"]).argmin()]
    return [round(float(zero), 6), float(slope)]


def fit_mass(answers: Answers) -> float:
    """How much of a distribution, 0.5 to 1, an interval has to hold for nine labels of ten to lie in it.

    They have to both where the lowest value is answered and where more is.

    Args:
        answers ([`Answers`]): Calibrated, about people who are not trained on.
    """
    for mass in np.arange(50, 100) / 100:
        found = coverage(answers, dict.fromkeys(answers.folds.tolist(), {"mass": float(mass)}))
        if found and np.nanmin([kind["holds"] for kind in found.values()]) >= HELD:
            return float(mass)
    return 1.0


def fit_margins(answers: Answers) -> dict[str, list[float]]:
    """How far labels lie from the lowest answer, and from all others, nine times in ten, in the task's range.

    Of n errors it is the k-th smallest, k being nine tenths of n + 1, rounded up: so many keep the promise for one
    face more. Where there are fewer than nine, nothing but the whole range does. Between two of the task's values the
    larger one is taken, so that an interval's ends are values of the task.

    Args:
        answers ([`Answers`]): Calibrated, about people who are not trained on.

    Returns:
        `dict`: By unit, where any label is known.
    """
    lowest, second, *_, highest = get_task(answers.task).values
    step, margins = second - lowest, {}
    for column, unit in enumerate(answers.action_units):
        labels, values = answers.labels[:, column], answers.values[:, column]
        seen = ~np.isnan(labels)
        errors = np.abs(labels - values)
        kinds = (np.sort(errors[seen & (values == lowest)]), np.sort(errors[seen & (values > lowest)]))
        ranks = [math.ceil(HELD * (len(kind) + 1)) for kind in kinds]
        if seen.any():
            margins[unit] = [
                round(math.ceil(round(kind[rank - 1] / step, 6)) * step, 6) if rank <= len(kind) else highest - lowest
                for kind, rank in zip(kinds, ranks, strict=True)
            ]
    return margins


def apply(answers: Answers, fitted: dict) -> Answers:
    """The answers that a calibrated model gives.

    Args:
        answers ([`Answers`]): As the model gave them.
        fitted (`dict`): As [`fit`] gives it for the task.
    """
    allowed = torch.tensor(get_task(answers.task).values, dtype=torch.float64)
    found = as_recognition(answers).calibrated(fitted, answers.action_units, allowed)
    return recognised(answers, found)


def own_people(calibrations: dict[int, dict], task: str, origin: dict, split: str = "test") -> dict[int, dict]:
    """One task's calibration for each test fold; empty unless every fold has one, and none knows the people scored.

    Empty, too, if one was fitted to labels of this data set's other protocol, which calls other levels present.

    Args:
        calibrations (`dict[int, dict]`): By test fold, from [`load`].
        task (`str`): Which task.
        origin (`dict`): `dataset`, `protocol` and `options` of the test set.
        split (`str`): Which people are scored. In `validation` and `train` are those whom a calibration on the same
            data set was fitted on.

    Raises:
        ValueError: A calibration was fitted for another fold of this data set: on people that are tested here.
    """
    found = {fold: fitted[task] for fold, fitted in calibrations.items() if task in fitted}
    own = RENDERED if origin["dataset"] in RENDERED else (origin["dataset"],)  # rendered faces are of the same people
    sources = [(fold, source) for fold, fitted in found.items() for source in fitted.get("fitted_on", [])]
    for fold, source in sources:
        if source["dataset"] not in own:
            continue
        if split != "test" or source["protocol"] != origin["protocol"]:
            return {}
        if (source["fold"], whose(source["options"])) != (fold, whose(origin["options"])):
            raise ValueError(
                f"The calibration for {task} was fitted for {source}, not for fold {fold} of {origin}: thresholds "
                "would have seen test people. Calibrate this fold's own model, or give --calibration FOLDER."
            )
    return found if len(found) == len(calibrations) else {}


def fitted_to(calibrations: dict[str, dict]) -> str:
    """To whom a task's calibration was fitted, in words.

    Args:
        calibrations (`dict[str, dict]`): By test fold, as `results.json` has them; one at least.

    >>> fitted_to({"0": {"fitted_on": [{"dataset": "synthetic", "protocol": "standard", "options": "", "fold": 0}]}})
    'validation people of synthetic, none of whom is tested'
    """
    unknown = [{"dataset": "an unknown set", "protocol": "standard"}]
    sources = [source for own in calibrations.values() for source in own.get("fitted_on", unknown)]
    names = ", ".join(sorted({source["dataset"] for source in sources}))
    seen = any(leaks(source["dataset"], source["protocol"]) for source in sources)
    return f"validation people of {names}, {'other frames of whom are' if seen else 'none of whom is'} tested"


def temperatures_in_words(result: dict, form: str) -> str:
    """The temperatures that a task's answers are scored with, each once; where there are folds, of each fold.

    Args:
        result (`dict`): A task's entry of `results.json`, with a calibration.
        form (`str`): How numbers are written.

    >>> own = {"temperature": 0.4, "temperatures": {"AU12": 0.5, "FEAFA12": 0.4}}  # the last list's first
    >>> temperatures_in_words({"action_units": ["AU12"], "calibration": {"fitted": {"0": own}}}, ".2f")
    '0.50'
    """
    fitted, words = result["calibration"]["fitted"], []
    for fold, own in fitted.items():
        for found in sorted(set(temperatures_of(own, result["action_units"]))):
            words.append(f"{found:{form}}" + (f" (fold {fold})" if len(fitted) > 1 else ""))
    return ", ".join(words)


def apply_folds(answers: Answers, fitted: dict[int, dict]) -> Answers:
    """[`apply`] where each test fold has a model of its own, with a calibration of its own.

    Args:
        answers ([`Answers`]): As the models gave them.
        fitted (`dict[int, dict]`): By test fold; 0 where there is one test split.
    """
    arrays = {name: answers.__dict__[name].copy() for name in ("values", "expected_values", "distributions")}
    for fold, own in fitted.items():
        rows = answers.folds == fold
        part = apply(answers.take(rows), own)
        for name, whole in arrays.items():
            whole[rows] = part.__dict__[name]
    return replace(answers, **arrays)


def nearest(labels: np.ndarray, task: str) -> np.ndarray:
    """Which of the task's values each label is: integers, the nearest one where it lies between two."""
    values = get_task(task).values
    return np.rint((labels - values[0]) / (values[-1] - values[0]) * (len(values) - 1)).astype(int)


def reliability(answers: Answers) -> dict:
    """How far probabilities and frequencies lie apart, over all Action Units together.

    For `detection` the probability is that of presence; for the other tasks it is that of the value answered, and what
    is counted is whether it was the right one: of `intensity`, to the hundredth.

    Returns:
        `dict`: `ece`, the expected calibration error over 15 equal bins (0 is perfect); `brier`, the mean squared
        distance between distribution and truth, 0 to 2; `bins`, for each non-empty bin `[mean probability, frequency,
        count]`.
    """
    seen = ~np.isnan(answers.labels)
    distributions, truth = answers.distributions[seen], nearest(answers.labels[seen], answers.task)
    told = np.ones_like(truth) if is_detection(answers.task) else nearest(answers.values[seen], answers.task)
    probability, at_truth = (np.take_along_axis(distributions, at[:, None], 1)[:, 0] for at in (told, truth))
    right, brier = (told == truth).astype(float), float(((distributions**2).sum(1) - 2 * at_truth + 1).mean())
    own = np.minimum((probability * BINS).astype(int), BINS - 1)
    bins = [
        [float(probability[own == place].mean()), float(right[own == place].mean()), int((own == place).sum())]
        for place in np.unique(own)
    ]
    ece = sum(count * abs(mean - frequency) for mean, frequency, count in bins) / len(own)
    return {"ece": float(ece), "brier": brier, "bins": bins}


def coverage(answers: Answers, fitted: dict[int, dict]) -> dict[str, dict] | None:
    """How often intervals hold the label, and how wide they are, over all Action Units together.

    Args:
        answers ([`Answers`]): Calibrated.
        fitted (`dict[int, dict]`): By test fold, what they were calibrated by.

    Returns:
        `dict`: For `lowest` answers and `more`: `holds`, 0 to 1, the share of labels that lie in their intervals;
        `width`, in the task's unit, the mean distance of an interval's ends; `answers`, how many there are. None for
        a calibration without intervals.
    """
    allowed = torch.tensor(get_task(answers.task).values, dtype=torch.float64)
    ends = np.full((*answers.labels.shape, 2), np.nan)
    for fold, own in fitted.items():
        rows = answers.folds == fold
        ends[rows] = as_recognition(answers.take(rows)).intervals(own, answers.action_units, allowed).numpy()
    low, high = ends[..., 0], ends[..., 1]
    known = ~np.isnan(answers.labels) & ~np.isnan(low)
    if not known.any():
        return None
    holds = (answers.labels >= low - 1e-6) & (answers.labels <= high + 1e-6)
    found = {}
    for name, kind in (("lowest", answers.values == float(allowed[0])), ("more", answers.values > float(allowed[0]))):
        chosen = known & kind
        found[name] = {
            "holds": float(bootstrap.mean_over(holds[chosen])),
            "width": float(bootstrap.mean_over((high - low)[chosen])),
            "answers": int(chosen.sum()),
        }
    return found


def store(fitted: dict, folder: str | Path) -> Path:
    """Write a calibration into `processor_config.json` of a model's folder, in place of older ones of the same tasks.

    A task may be fitted on several lists of units, one after the other: what was found for units that are not in the
    last one stays. Of levels, whose units share all, the last list counts.

    Raises:
        FileNotFoundError: The folder has no processor.
    """
    path = Path(folder) / "processor_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"No processor_config.json in {folder}; calibrate a local folder with its processor.")
    settings = json.loads(path.read_text())
    known = settings.get("calibration") or {}
    for task, own in fitted.items():
        before = known.get(task, {})
        before = before if isinstance(before.get("fitted_on"), list) else {}
        asked, known[task] = own.get("temperatures", {}), own.copy()
        for name in BY_UNIT:
            if name in own:  # a unit that now has no line, say, keeps none of older labels
                others = {unit: found for unit, found in before.get(name, {}).items() if unit not in asked}
                known[task][name] = others | own[name]
        if before.get("temperatures", {}).keys() - asked.keys():  # other units' stay
            earlier = [source for source in before["fitted_on"] if source not in own["fitted_on"]]
            known[task]["fitted_on"] = earlier + own["fitted_on"]
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(settings | {"calibration": known}, indent=2) + "\n")
    os.replace(draft, path)
    write_decision_files(AuLlavaProcessor.from_pretrained(folder), folder)
    return path


def load(source: str | Path | None) -> dict:
    """The calibration of a model, from its folder or the Hub; empty if it has none.

    Raises:
        ValueError: It was made when less was noted of whom it was fitted to.
    """
    if source is None:
        return {}
    found = AuLlavaProcessor.get_processor_dict(source)[0].get("calibration") or {}
    if old := [task for task, own in found.items() if isinstance(own.get("fitted_on"), dict)]:
        raise ValueError(f"{source}: {', '.join(old)} was calibrated by an earlier version; --calibrate it again.")
    return found
