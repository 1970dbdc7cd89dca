"""The rows that a training learns from, and those that it is validated on."""

from collections import Counter

import numpy as np
from datasets import Dataset, concatenate_datasets

from .arguments import AuLlavaArguments
from .datasets_scripts.instructions import mix
from .datasets_scripts.sources import Source, draw_people, set_apart


def read_rows(arguments: AuLlavaArguments) -> tuple[Dataset, Dataset | None, dict[str, list[str]]]:
    """The rows to train on, those to validate on, and by data set the people that were held out of the former.

    Args:
        arguments ([`AuLlavaArguments`]): `train_data`, `eval_data`, `fold`, `questions`, `weights`, `held_out`,
            `limit` and `eval_limit` of it.

    Raises:
        ValueError: What [`Source`] refuses, or weights that are not one for each data set and question.
    """
    train: list[Dataset] = []
    validation: list[Dataset] = []
    people: dict[str, list[str]] = {}
    for text in arguments.train_data:
        train += Source(text.replace("{fold}", str(arguments.fold))).rows(questions=arguments.questions)
    if arguments.held_out:  # for all sources at once, for a person may be in several
        people = draw_people(train, arguments.held_out)
        pairs = [set_apart(part, people) for part in train]
        train, validation = [rest for rest, _ in pairs], [apart for _, apart in pairs]
    train = [part.select(range(min(len(part), arguments.limit or len(part)))) for part in train]
    for text in arguments.eval_data:
        validation += Source(text.replace("{fold}", str(arguments.fold))).rows("validation", arguments.questions)
    few = [
        part.select(np.linspace(0, len(part) - 1, min(len(part), arguments.eval_limit or len(part))).astype(int))
        for part in validation
    ]
    together = mix(train, arguments.weights) if arguments.weights else concatenate_datasets(train)
    return together, concatenate_datasets(few) if few else None, people


def count_rows(splits: dict[str, Dataset | None]) -> list[tuple[str, str, str, int]]:
    """Data set, task, split and number of samples, of each data set and task in each split (`train`, `validation`)."""
    return [
        (*name, split, count)
        for split, rows in splits.items()
        if rows is not None
        for name, count in Counter(zip(rows["dataset"], rows["task"], strict=True)).items()
    ]
