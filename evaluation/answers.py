"""Stored predictions, read back as arrays; everything that is scored starts here."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from au_llava.action_units import get_task
from au_llava.recognition_au_llava import Recognition


STAMP = b"au_llava"  # the key under which a file of predictions remembers how it was made


@dataclass(frozen=True)
class Answers:
    """One task's labels and answers about the same pictures.

    Args:
        task (`str`): `detection`, `intensity_level` or `intensity`.
        split (`str`): `test`, `validation` or `train`.
        action_units (`list[str]`): Codes of the columns.
        samples, subjects (`numpy.ndarray` of shape `(samples,)`): Names of pictures and of the people in them.
        folds (`numpy.ndarray` of shape `(samples,)`): Test folds, from 1; 0 for a single test split.
        groups (`dict[str, numpy.ndarray]`): What else is known of the pictures.
        labels (`numpy.ndarray` of shape `(samples, units)`): In the task's range, NaN where unknown.
        values (`numpy.ndarray` of shape `(samples, units)`): The numbers answered.
        expected_values (`numpy.ndarray` of shape `(samples, units)`): Means of the distributions; for `detection` the
            probability that the unit is present.
        distributions (`numpy.ndarray` of shape `(samples, units, values)`): Probability of every allowed value.
        decision (`str`): How the values follow from the distributions: `mode`, `mean` or `median`.
    """

    task: str
    split: str
    action_units: list[str]
    samples: np.ndarray
    subjects: np.ndarray
    folds: np.ndarray
    groups: dict[str, np.ndarray]
    labels: np.ndarray
    values: np.ndarray
    expected_values: np.ndarray
    distributions: np.ndarray
    decision: str = "mode"

    def take(self, rows) -> "Answers":
        """Some of the pictures, by index or mask."""
        arrays = ("samples", "subjects", "folds", "labels", "values", "expected_values", "distributions")
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in arrays},
            groups={name: column[rows] for name, column in self.groups.items()},
        )


def decide(answers: Answers, decision: str) -> Answers:
    """The answers that `model.recognize(..., decision=decision)` gives, from the distributions.

    Args:
        answers ([`Answers`]): As stored: each answer is the mode, read digit by digit.
        decision (`str`): `mode`, `mean` or `median`. Answers of `detection`, which are yes or no, stay as they are.
    """
    grid = np.array(get_task(answers.task).values)
    if decision == "mode" or len(grid) == 2:
        return answers
    return recognised(answers, as_recognition(answers).decide(decision, torch.from_numpy(grid)))


def as_recognition(answers: Answers) -> Recognition:
    """The same answers as the model gives them."""
    names = ("values", "expected_values", "distributions")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(answers.__dict__[name])) for name in names}
    nothing = torch.empty(0)
    return Recognition(sequences=nothing, probabilities=nothing, forwards=0, decision=answers.decision, **tensors)


def recognised(answers: Answers, recognition: Recognition) -> Answers:
    """The same answers with the numbers of a [`Recognition`]."""
    names = ("values", "expected_values", "distributions")
    arrays = {name: getattr(recognition, name).numpy() for name in names}
    return replace(answers, decision=recognition.decision, **arrays)


def _file(path: str | Path) -> Path:
    path = Path(path)
    path = path / "predictions.parquet" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"No predictions at {path}; write them first with --model and --output.")
    return path


def _read(path: str | Path, reader: Callable):
    file = _file(path)
    try:
        return reader(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{file} is damaged ({error}); delete it, and write it again with --model.") from error


def read_origin(path: str | Path) -> dict:
    """What `predictions.parquet`, or the folder that holds it, remembers: `dataset`, `split`, `protocol`, `model`, ...

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or of something else.
    """
    known = _read(path, pq.read_schema).metadata or {}
    if STAMP not in known:
        raise ValueError(f"{path}: no predictions that evaluate_au.py wrote; write some with --model and --output.")
    return {"options": ""} | json.loads(known[STAMP])


def stamp_of(path: str | Path) -> str:
    """What tells one `predictions.parquet` from another: the beginning of its SHA-256.

    Args:
        path: The file, or the folder that holds it.
    """
    with _file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read_answers(path: str | Path, decision: str = "mode") -> dict[str, Answers]:
    """Read `predictions.parquet`, or the folder that holds it.

    Args:
        path: Folder or file.
        decision (`str`): See [`decide`].

    Returns:
        `dict[str, Answers]`: By task.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged.
    """
    table, answers = _read(path, pq.read_table), {}
    for task in pc.unique(table["task"]).to_pylist():
        part = table.filter(pc.equal(table["task"], task))
        units, count = part["action_units"][0].as_py(), len(part)

        def array(name, part=part, count=count, units=units):
            flat = part[name].combine_chunks().flatten()
            flat = flat.flatten() if name == "distributions" else flat
            return flat.to_numpy(zero_copy_only=False).astype(float).reshape(count, len(units), -1)

        group_rows = [dict(row) for row in part["groups"].to_pylist()]
        answers[task] = Answers(
            task=task,
            split=part["split"][0].as_py(),
            action_units=units,
            samples=np.array(part["sample"].to_pylist()),
            subjects=np.array(part["subject"].to_pylist()),
            folds=part["fold"].to_numpy(),
            groups={name: np.array([row[name] for row in group_rows]) for name in group_rows[0]},
            labels=array("labels")[..., 0],
            # Stored as 32 bit: two decimals bring back the grid of 0.01 that the answers lie on.
            values=array("values")[..., 0].round(2),
            expected_values=array("expected_values")[..., 0],
            distributions=array("distributions"),
        )
    return {task: decide(answer, decision) for task, answer in answers.items()}
