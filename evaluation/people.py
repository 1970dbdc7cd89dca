"""Whom a model was trained on, calibrated on and tested on: numbers are worth something where these are others."""

import warnings
from dataclasses import replace
from pathlib import Path

from au_llava.adapters import LOST
from au_llava.datasets_scripts.report import read_json

from .data import HELD_OUT, RENDERED, EvaluationSet, folds_of, is_own, leaks, read_set, same_people
from .predict import of_fold


def held_out(model: str, dataset: str) -> list[str] | None:
    """The people of a data set that a model was not trained on, if `train_sft.py` noted them in its folder."""
    return noted(Path(model, "held_out.json")).get(dataset)


def noted(file: Path) -> dict[str, list[str]]:
    """People by data set, of a model that is a folder here and was trained by `train_sft.py`."""
    return read_json(file, LOST) if file.is_file() else {}


def trained(folder: str, dataset: str) -> set[str]:
    """The people of a data set that a model was trained on, under any name of a data set that shows them."""
    people = noted(Path(folder, "trained_on.json"))
    return {name for other in same_people(dataset) for name in people.get(other, ())}


def people_apart(
    model: str, dataset: str, data_dir: str | Path, protocol: str = "standard", fold: int | None = None
) -> EvaluationSet:
    """Whom thresholds may be fitted to: those of the training people whom the model of each fold was not trained on.

    They were drawn among the people of all sources of its training, so that one of these does not tell. Where nothing
    is noted of them, and of rendered faces, it is the split `validation`.

    Args:
        model (`str`): Folder, `{fold}` in it stands for a number; `train_sft.py` writes `held_out.json` there.
        dataset, data_dir, protocol, fold: As for [`read_set`].

    Returns:
        [`EvaluationSet`]: Of the split `validation`.

    Raises:
        ValueError: The model of a fold was trained on everyone.
    """
    numbers = folds_of(dataset, protocol, fold)
    known = {number: held_out(of_fold(model, number), same_people(dataset)[0]) for number in numbers}
    if dataset in RENDERED or None in known.values():
        return read_set(dataset, data_dir, "validation", protocol, fold)
    train = read_set(dataset, data_dir, "train", protocol, fold)
    for number, people in train.people().items():
        if not people & {*known[number]}:
            raise ValueError(
                f"{of_fold(model, number)} was trained on everyone in {data_dir}; train it with --held_out {HELD_OUT}."
            )
    rows = [row for row, who in enumerate(zip(train.folds, train.subjects, strict=True)) if who[1] in known[who[0]]]
    return replace(train.take(rows), split="validation")


def check_never_seen(model: str, about: EvaluationSet) -> None:
    """Refuse to test a model on people that it was trained on: it is better on them than on others.

    With folds, a model is tested on one of them. Names in a csv of one's own may be anyone's, and rendered faces of
    other seeds have the same names, so that these are told. Nothing is refused of the split `train`, which asks what
    was learnt, nor of FEAFA under the paper's protocol, which leaks by its own words.

    Args:
        model (`str`): Folder, `{fold}` in it stands for a number; `train_sft.py` writes `trained_on.json` there.
            Without one, nothing is known.
        about (`EvaluationSet`): What is asked.

    Raises:
        ValueError: The model was trained on some of them.
    """
    if about.split == "train" or leaks(about.name, about.protocol):
        return
    for fold, asked in about.people().items():
        folder = of_fold(model, fold)
        if known := sorted(asked & trained(folder, about.name)):
            some = ", ".join(known[:5]) + (f" and {len(known) - 5} others" if len(known) > 5 else "")
            told = f"{folder} was trained on {some}, who are in the split {about.split}"
            if not (is_own(about.name) or about.name in RENDERED):
                raise ValueError(
                    f"{told}{f' of fold {fold}' if fold else ''}; name the fold that it was not trained on with "
                    "--fold, a model for each fold with {fold} in --model, or the naming of its training "
                    "(--data_dir DIR?naming=...). --split train shows what it has learnt."
                )
            warnings.warn(
                f"{told}, unless others have the same names; scores of people trained on are too good.", stacklevel=2
            )


def check_apart(apart: EvaluationSet, about: EvaluationSet) -> None:
    """Refuse to fit on people that are tested, but for FEAFA under the paper's protocol, which leaks by its own words.

    Args:
        apart ([`EvaluationSet`]): Who is fitted on.
        about ([`EvaluationSet`]): Who is scored; people of the splits `validation` and `train` are told apart later.

    Raises:
        ValueError: Someone is in both. Names in a csv of one's own may be anyone's, so that they are told.
    """
    if about.split != "test" or leaks(about.name, about.protocol):
        return
    tested = about.people()
    for fold, people in apart.people().items():
        if both := sorted(people & tested[fold]):
            told = f"{', '.join(both[:5])}{' and others' * (len(both) > 5)} would be fitted on and tested"
            if not is_own(about.name):
                raise ValueError(f"{told}; give other people with --validation_dir.")
            warnings.warn(f"{told}, unless others have the same names.", stacklevel=2)


def check_held_out(model: str, dataset: str, people: set[str]) -> None:
    """Refuse to fit on people that a model was trained on: it is surer about them than about others.

    Args:
        model (`str`): Folder; `train_sft.py` writes `held_out.json` there. Without one, nothing is known.
        dataset (`str`): Whose people they are.
        people (`set[str]`): The subjects that are to be fitted on.

    Raises:
        ValueError: The model was trained on some of them.
    """
    known, seen = held_out(model, dataset), people & trained(model, dataset)
    if known is not None:
        seen |= people - set(known)
    if seen:
        raise ValueError(
            f"{model} was trained on {', '.join(sorted(seen))}, whom --calibrate would fit to; train it with "
            f"--held_out {HELD_OUT}, or leave --calibrate out."
        )
