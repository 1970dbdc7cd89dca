"""`results.json`: all scores of one evaluation, and what a reader needs to know to repeat it."""

import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import transformers

from au_llava import __version__
from au_llava.action_units import PRESENT_LEVEL

from .answers import Answers
from .calibration import apply_folds, coverage, own_people, reliability
from .compare import compare_task, same_pictures
from .data import protocol_in_words
from .published import PUBLISHED
from .scores import CALIBRATED, MODEL, score


def summarise(
    answers: dict[str, Answers],
    settings: dict,
    command: str,
    calibrations: dict[int, dict] | None = None,
    beside: dict[str, tuple[dict[str, Answers], dict[int, dict]]] | None = None,
    resamples: int = 1000,
) -> dict:
    """Score every task, and note model, data, versions and command.

    Args:
        answers (`dict[str, Answers]`): From [`read_answers`].
        settings (`dict`): What was evaluated; kept as it is. Needs `dataset`, `protocol`, `options`, `models`.
        command (`str`): The command lines that repeat it.
        calibrations (`dict`, *optional*): By test fold, from [`calibration.load`]; adds a row, and reliability after
            calibration and, as far as users get them, how often intervals hold the label.
        beside (`dict`, *optional*): By name, other models' answers about the same pictures, and their calibrations: a
            row for each, and a comparison with ours, like with like.
        resamples (`int`): Of people, for the intervals.
    """
    tasks, origin = {}, {name: settings[name] for name in ("dataset", "protocol", "options")}
    for task, raw in answers.items():
        fitted = own_people(calibrations or {}, task, origin, raw.split)
        calibrated = apply_folds(raw, fitted) if fitted else None
        # Masses and margins go with the decision that they were fitted to; with another one users get no interval.
        told = calibrated and all(raw.decision in ("mode", own.get("decision")) for own in fitted.values())
        others, comparisons = {}, []
        for name, (found, found_calibrations) in (beside or {}).items():
            if task not in found:
                continue
            asked = np.isin(found[task].samples, raw.samples)  # with --limit, ours are some of theirs
            _, others[name] = same_pictures(raw, found[task].take(asked))
            comparisons += _comparisons(MODEL, name, raw, others[name], resamples)
            own = own_people(found_calibrations, task, origin, raw.split)
            if own:
                better = CALIBRATED.replace(MODEL, name)
                others[better] = apply_folds(others[name], own)
                if calibrated is not None:
                    comparisons += _comparisons(CALIBRATED, better, calibrated, others[better], resamples)
        tasks[task] = score(raw, calibrated, others, resamples) | {
            "published": _published(settings["dataset"], task),
            "comparisons": comparisons,
            "calibration": {
                "fitted": {str(fold): values for fold, values in fitted.items()},
                "before": reliability(raw),
                "after": reliability(calibrated) if calibrated else None,
                "intervals": coverage(calibrated, fitted) if told else None,
            },
        }
    return {
        "settings": settings,
        "protocol": _protocol(settings, answers),
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "au_llava": __version__,
            "numpy": np.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "tasks": tasks,
    }


def _comparisons(ours: str, other: str, first: Answers, second: Answers, resamples: int) -> list[dict]:
    """How two rows differ on average, by each score that is compared."""
    rows = compare_task(first, second, resamples)
    return [{"ours": ours, "other": other} | row for row in rows if row["action_unit"] == "mean"]


def _protocol(settings: dict, answers: dict[str, Answers]) -> str:
    """The protocol in words, with what may be unfair about this use of it."""
    words = protocol_in_words(settings["dataset"], settings["protocol"], settings["options"])
    folds = {int(fold) for answer in answers.values() for fold in answer.folds}
    if len(settings["models"]) == 1 and len(folds) > 1:
        words += "; one model for all folds, which is fair only if it was trained on none of these people"
    if folds != {0} and len(folds) < 3:
        words += f"; only fold {', '.join(map(str, sorted(folds)))}"
    if by_levels := settings.get("by_levels"):
        words += f"; whether {', '.join(by_levels)} are present is told by their levels, {PRESENT_LEVEL} or more"
    return words


def _published(dataset: str, task: str) -> list[dict]:
    """The paper's rows for this data set and task, as `results.json` keeps them."""
    metric, rows = PUBLISHED.get((dataset, task), ("", ()))
    return [
        {"method": row.method, "metric": metric, "mean": row.mean, "printed": row.printed, "note": row.note}
        | {"action_units": row.scores}
        for row in rows
    ]


def write_json(content: dict, output: str | Path, name: str) -> Path:
    """Write a JSON file; NaN, which JSON does not have, becomes null."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    draft = output / f"{name}.tmp"
    draft.write_text(json.dumps(_plain(content), indent=1) + "\n")
    os.replace(draft, output / name)
    return output / name


def _plain(value):
    """The same value without NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
