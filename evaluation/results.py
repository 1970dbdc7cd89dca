"""`results.json`: all scores of one evaluation, and what a reader needs to know to repeat it."""

import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path

import numpy
import torch
import transformers

from au_llava import __version__

from .answers import Answers
from .calibration import apply, reliability
from .compare import same_pictures
from .data import PROTOCOLS
from .published import PUBLISHED
from .scores import score


def summarise(
    answers: dict[str, Answers],
    settings: dict,
    command: str,
    calibration: dict | None = None,
    beside: dict[str, dict[str, Answers]] | None = None,
    resamples: int = 1000,
) -> dict:
    """Score every task, and note model, data, versions and command.

    Args:
        answers (`dict[str, Answers]`): From [`read_answers`].
        settings (`dict`): What was evaluated; kept as it is. Needs `dataset`, `protocol`, `model`.
        command (`str`): The command line that repeats it.
        calibration (`dict`, *optional*): From [`calibration.load`]; adds a row and reliability after calibration.
        beside (`dict`, *optional*): Other models' answers about the same pictures, by name and task.
        resamples (`int`): Of people, for the intervals.
    """
    tasks = {}
    for task, raw in answers.items():
        fitted = (calibration or {}).get(task)
        calibrated = apply(raw, fitted) if fitted else None
        others = {name: same_pictures(raw, other[task])[1] for name, other in (beside or {}).items() if task in other}
        tasks[task] = score(raw, calibrated, others, resamples) | {
            "published": _published(settings["dataset"], task),
            "calibration": {
                "fitted": fitted,
                "before": reliability(raw),
                "after": reliability(calibrated) if calibrated else None,
            },
        }
    return {
        "settings": settings,
        "protocol": _protocol(settings, answers),
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "au_llava": __version__,
            "numpy": numpy.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "tasks": tasks,
    }


def _protocol(settings: dict, answers: dict[str, Answers]) -> str:
    """The protocol in words, with what may be unfair about this use of it."""
    words = PROTOCOLS[settings["dataset"], settings["protocol"]]
    folds = {int(fold) for answer in answers.values() for fold in answer.folds}
    if settings["model"] and "{fold}" not in settings["model"] and len(folds) > 1:
        words += "; one model for all folds, which is fair only if it was trained on none of these people"
    if folds != {0} and len(folds) < 3:
        words += f"; only fold {', '.join(map(str, sorted(folds)))}"
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
