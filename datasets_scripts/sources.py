"""Training rows named in one line, as recipes and command lines need it: `NAME:FOLDER?option=value&option=value`.

>>> from au_llava.datasets_scripts.sources import Source
>>> Source("bp4d:data/bp4d?config_name=fold1")
Source(text='bp4d:data/bp4d?config_name=fold1')
>>> Source("bp4d:data/bp4d?config_name=fold1").name
'bp4d'
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import yaml
from datasets import BuilderConfig, Dataset

from ..action_units import CATALOGUE, TASKS, get_task
from .bp4d import Bp4d
from .csv_labels import CsvLabels
from .disfa import Disfa
from .feafa import Feafa
from .instructions import FEATURES
from .report import check_whole
from .synthetic_faces.builder import SyntheticFaces


# Options of builders that say how crops are made, and nothing of crops that are there.
_MAKING = {"camera", "detector", "workers", "skip_bad_labels"}
# Data sets, as rows name them, that show the same people: part B of FEAFA is of DISFA's videos.
SAME_PEOPLE = {"disfa": ("disfa", "feafa"), "feafa": ("feafa", "disfa")}
BUILDERS = {"synthetic": SyntheticFaces, "bp4d": Bp4d, "disfa": Disfa, "feafa": Feafa, "csv": CsvLabels}


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Args:
        text (`str`): `synthetic:FOLDER` (rendered faces; without a folder the committed sample); `bp4d:FOLDER`,
            `disfa:FOLDER`, `feafa:FOLDER` (prepared crops); `csv:FILE`; or only a folder of Parquet shards with the
            columns of `instructions.FEATURES`. Options of the builder follow after `?`, such as
            `config_name=fold1&task=detection`; `split` is what is taken instead of the usual one.
    """

    text: str

    @property
    def name(self) -> str:
        """Which builder, or nothing for a folder of rows."""
        name = self.text.partition(":")[0]
        return name if name in BUILDERS else ""

    def rows(self, split: str = "train", questions: Sequence[str] = ()) -> list[Dataset]:
        """Read one split.

        Args:
            split (`str`, *optional*, defaults to `"train"`): Which, where the source names none.
            questions (`Sequence[str]`, *optional*): What is asked about each rendered face: `task:preset` or
                `task:codes`.

        Returns:
            `list[Dataset]`: A part for each question, in the columns of `instructions.FEATURES`.

        Raises:
            FileNotFoundError: There are no files of rows.
            ValueError: Such a data set has no rows in this split or no such option, a question is none, a column is
                missing, or a label is out of range.
        """
        place, _, query = self.text.removeprefix(f"{self.name}:").partition("?")
        pairs = parse_qsl(query.replace("+", "%2B"))  # a plus in a folder's name is no blank
        options = {key: value if key == "crops_dir" else yaml.safe_load(value) for key, value in pairs}
        split = options.pop("split", split)
        if not self.name:
            parts = [_read_folder(Path(place), split)]
        elif self.name == "synthetic" and "config_name" not in options:
            parts = [_build(self.name, place, split, options | _asked(text)) for text in questions]
        else:
            parts = [_build(self.name, place, split, options)]
        for part in parts:
            check_rows(part, self.text)
        return parts


def _asked(text: str) -> dict[str, str]:
    """The builder's options for a question about rendered faces, `task:preset` or `task:codes`."""
    task, colon, units = text.partition(":")
    if not (colon and task in TASKS):
        raise ValueError(
            f"questions: {text!r} is no question; give task:preset or task:codes, as in detection:bp4d, with one of "
            f"the tasks {', '.join(TASKS)}."
        )
    return {"config_name": task, "action_units": units}


def _build(name: str, place: str, split: str, options: dict) -> Dataset:
    folder = "data_dir" if name in ("synthetic", "csv") else "crops_dir"
    own = {field.name for field in fields(BUILDERS[name].BUILDER_CONFIG_CLASS)}
    taken = (own - {field.name for field in fields(BuilderConfig)} | {"config_name"}) - {folder}
    if folder == "crops_dir":
        taken -= _MAKING
        if settled := ", ".join(sorted(options.keys() & _MAKING)):
            raise ValueError(
                f"{name}:{place}: {settled} was settled when these crops were made; leave it out, or make others with "
                f"python -m au_llava.datasets_scripts.{name}."
            )
    if strange := ", ".join(sorted(options.keys() - taken)):
        accepted = ", ".join(sorted(taken | {"split"}))
        raise ValueError(f"{name}:{place}: unknown option {strange}; accepted: {accepted}.")
    builder = BUILDERS[name](**{folder: place or None}, **options)
    builder.download_and_prepare()
    splits = {kind: info.num_examples for kind, info in builder.info.splits.items()}
    if not splits.get(split):
        found = ", ".join(f"{kind} ({count} rows)" for kind, count in splits.items())
        remedy = "Name another: split=..."
        if split == "validation" and name != "synthetic":  # not the test people, by whom nothing may be chosen
            remedy = "Leave eval_data out, and keep some of the training people for validation with held_out."
        elif name == "csv":  # an evaluation takes no other
            remedy = "Give the csv pictures of people, with labels, in this split."
        elif folder == "crops_dir":  # neither are these
            remedy = "Give options that take some of these crops, such as FEAFA's part=B, or other crops."
        raise ValueError(f"{name}:{place} has no rows in the split {split!r}; it has: {found}. {remedy}")
    return builder.as_dataset(split)


def _read_folder(folder: Path, split: str) -> Dataset:
    every = sorted(folder.glob("*.parquet"))
    files = [file for file in every if file.name.startswith(f"{split}-")]
    if split == "train" and not any(file.name.startswith(("train-", "validation-", "test-")) for file in every):
        files = every
    if not files:
        raise FileNotFoundError(
            f"No Parquet shards in {folder} for the split {split!r} ({split}-*.parquet); prepare them first "
            f"(docs/data.md), or name the data set: {', '.join(f'{name}:{folder}' for name in BUILDERS)}."
        )
    check_whole(files)
    rows = Dataset.from_parquet([str(file) for file in files])
    missing = [name for name in FEATURES if name not in rows.column_names]
    if missing:
        raise ValueError(f"{folder}: no column {', '.join(missing)}; there are: {', '.join(rows.column_names)}.")
    rows = rows.select_columns(list(FEATURES))
    return rows if rows.features == FEATURES else rows.cast(FEATURES)  # to cast writes all of it once more


def check_rows(rows: Dataset, source: str) -> None:
    """See that all rows can be trained on, before hours go into the first ones.

    Raises:
        ValueError: There are no rows, a unit's code is not as `action_units.py` writes it, a label is not in its
            task's range, or a row has no known label, or a unit twice.
    """
    if not len(rows):
        raise ValueError(f"{source}: no rows.")
    for batch in rows.select_columns(["labels", "action_units", "task"]).iter(batch_size=10_000):
        for labels, codes, task in zip(*batch.values(), strict=True):
            if strange := ", ".join(repr(code) for code in codes if code not in CATALOGUE):
                raise ValueError(f"{source}: unknown Action Unit {strange}; accepted: {', '.join(CATALOGUE)}.")
            if len(set(codes)) < len(codes) or not any(label is None or label == label for label in labels):
                raise ValueError(
                    f"{source}: a row asks about {', '.join(codes)} with the labels {labels}; give each unit once, "
                    "and leave out rows of which no label is known."
                )
            wrong = [
                f"{code}={label!r}"
                for code, label in zip(codes, labels, strict=True)
                if label is None or not (np.isnan(label) or get_task(task).takes(label))
            ]
            if wrong:
                raise ValueError(
                    f"{source}: {', '.join(wrong)}, but {task} takes {get_task(task).answer}, and NaN for unknown."
                )


def digest_rows(rows: Dataset) -> str:
    """A short hash of everything in some rows but the pictures and the questions, which are drawn anew."""
    columns = [name for name in FEATURES if name not in ("images", "prompt", "completion")]
    found = hashlib.sha256()
    for batch in rows.select_columns(columns).iter(batch_size=10_000):
        found.update(repr(batch).encode())
    return found.hexdigest()[:16]


def draw_people(parts: Iterable[Dataset], share: float, seed: int = 0) -> dict[str, list[str]]:
    """Choose people to validate on, over all parts of each data set at once; a person of several is in all or none.

    Args:
        parts: Training rows with `dataset` and `subject`.
        share (`float`): This share of each data set's people, 0 to 1, but one at least; they are drawn by a hash of
            their names. Whoever is drawn in another data set that shows the same people comes on top.

    Returns:
        `dict`: Their names, sorted, by data set.

    Raises:
        ValueError: Nobody of a data set is left to train on.
    """
    people = defaultdict(set)
    for dataset, subject in who_is_in(parts):
        people[dataset].add(subject)
    drawn = {}
    for dataset, names in people.items():
        order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
        drawn[dataset] = set(order[: max(1, round(share * len(order)))])
    apart = {}
    for dataset, names in people.items():
        known = set().union(*(drawn.get(other, ()) for other in SAME_PEOPLE.get(dataset, (dataset,))))
        apart[dataset] = sorted(names & known)
        if len(apart[dataset]) == len(names):
            raise ValueError(
                f"held_out {share} of {len(names)} people ({dataset}) leaves none to train on; give less."
            )
    return apart


def who_is_in(parts: Iterable[Dataset]) -> set[tuple[str, str]]:
    """Data set and name of everyone in some rows."""
    return {person for part in parts for person in zip(part["dataset"][:], part["subject"][:], strict=True)}


def set_apart(rows: Dataset, people: Mapping[str, Sequence[str]]) -> tuple[Dataset, Dataset]:
    """Divide rows into those of everyone else and those of some people, named by data set."""
    names = zip(rows["dataset"][:], rows["subject"][:], strict=True)
    apart = np.array([subject in people.get(dataset, ()) for dataset, subject in names], bool)
    return rows.select(np.flatnonzero(~apart)), rows.select(np.flatnonzero(apart))


def hold_out(rows: Dataset, share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Set people apart for validation, so that nobody is in both parts: [`draw_people`], then [`set_apart`]."""
    return set_apart(rows, draw_people([rows], share, seed))
