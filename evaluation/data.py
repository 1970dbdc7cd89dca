"""What is asked of a model on each data set, and the rows it is asked about."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import parse_qsl

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from au_llava.action_units import PRESENT_LEVEL, PRESETS
from au_llava.datasets_scripts.csv_labels import CsvLabels
from au_llava.datasets_scripts.report import check_whole
from au_llava.datasets_scripts.sources import SAME_PEOPLE, Source, hold_out
from au_llava.datasets_scripts.synthetic_faces.builder import SAMPLE
from au_llava.datasets_scripts.synthetic_faces.expression import FACS_CODES


# For each data set: the task, and the Action Units that its published results are about. A set has one list a task, so
# that the rendered faces' FACS intensities are a set of their own.
QUESTIONS = {
    "synthetic": (("detection", "bp4d"), ("intensity_level", "disfa"), ("intensity", "feafa")),
    "synthetic_facs": (("intensity", "disfa"),),
    "bp4d": (("detection", "bp4d"),),
    "disfa": (("detection", "disfa8"), ("intensity_level", "disfa")),
    "feafa": (("intensity", "feafa"),),
}
# What each protocol means, in the words of the report.
_SUBJECT_FOLDS = (
    "three published folds of subjects (JAANet's order), none in both training and test; scores are the mean over "
    "folds for each AU, then over AUs"
)
_RENDERED_SPLIT = "rendered faces of identities that are in no other split; one test split"
PROTOCOLS = {
    ("synthetic", "standard"): _RENDERED_SPLIT,
    ("synthetic_facs", "standard"): f"{_RENDERED_SPLIT}; a label is the share, 0 to 1, of a unit's full contraction",
    ("bp4d", "standard"): f"{_SUBJECT_FOLDS}; label 9 is unknown and left out",
    ("disfa", "standard"): f"{_SUBJECT_FOLDS}; present means level 2 or more, as in the literature",
    ("feafa", "standard"): "three folds of videos, in part B of people, none in both training and test; scores are "
    "the mean over folds, then over units",
    ("bp4d", "paper"): f"{_SUBJECT_FOLDS}; label 9 is unknown and left out (the paper's protocol is the standard one)",
    ("disfa", "paper"): f"{_SUBJECT_FOLDS}; present means a level above 2, as the paper's text says",
    ("feafa", "paper"): "the paper's random 4:1 split of frames; it leaks, as neighbouring frames of one video are in "
    "training and test set alike, so that these numbers say nothing about new people",
}
RENDERED = ("synthetic", "synthetic_facs")
OWN = "csv"  # begins the name of a data set that someone brought, `csv:site_a/labels` of `site_a/labels.csv`
# Share of the training people who are the split `validation` of a data set that comes without one.
HELD_OUT = 0.2
_PRESENT_FROM = {"standard": PRESENT_LEVEL, "paper": 3}  # DISFA's levels
# Options of data sets that say which pictures are asked about, as they are by default.
_WHICH = {"naming": "jaanet", "part": "a", "drop_bad_landmarks": "false"}
# Under which names of rows to train on the people of a set stand, where that is not its own name alone.
_PEOPLE = SAME_PEOPLE | {
    "synthetic": ("synthetic_faces",),
    "synthetic_facs": ("synthetic_faces",),
    OWN: (CsvLabels.DATASET,),
}
SPLITS = ("train", "validation", "test")
FOLDS = {"1": 1, "2": 2, "3": 3, "all": None}  # what `--fold` may say, and how `read_set` takes it


@dataclass
class EvaluationSet:
    """Pictures and labels that a model is scored on.

    Args:
        name (`str`): `synthetic`, `synthetic_facs`, `bp4d`, `disfa`, `feafa`, or `csv:` and names of folder and file.
        split (`str`): `test`, `validation` or `train`.
        protocol (`str`): `standard` or `paper`.
        images (`datasets.Dataset`): One column of aligned face crops, decoded when read.
        samples (`list[str]`): A name for each picture, the same on every machine.
        subjects (`list[str]`): Who is in it; intervals resample these.
        folds (`list[int]`): The test fold that each picture belongs to, from 1; 0 where the set has one test split.
        units (`dict[str, list[str]]`): Codes of the units that each task asks about.
        labels (`dict`): task to array `(samples, units)`, NaN where unknown, in the order of `units`.
        groups (`list[dict[str, str]]`): What else is known of each picture, such as the apparent skin tone.
        change (*optional*): Called with a picture and its row, gives the picture that the model sees instead.
        options (`str`, *optional*): Which pictures were asked for, where not those by default, as in
            `naming=megraphau`; of a csv its task.
    """

    name: str
    split: str
    protocol: str
    images: datasets.Dataset
    samples: list[str]
    subjects: list[str]
    folds: list[int]
    units: dict[str, list[str]]
    labels: dict[str, np.ndarray]
    groups: list[dict[str, str]]
    change: Callable[[Image.Image, int], Image.Image] | None = None
    options: str = ""

    def __len__(self) -> int:
        return len(self.samples)

    def people(self) -> dict[int, set[str]]:
        """Who is in it, by test fold."""
        found: dict[int, set[str]] = {fold: set() for fold in sorted(set(self.folds))}
        for fold, subject in zip(self.folds, self.subjects, strict=True):
            found[fold].add(subject)
        return found

    def pictures(self, rows: list[int]) -> list[Image.Image]:
        """Some of the face crops."""
        (column,) = self.images.column_names
        pictures = [item[0] if isinstance(item, list) else item for item in self.images[rows][column]]
        if self.change is None:
            return pictures
        return [self.change(picture, row) for picture, row in zip(pictures, rows, strict=True)]

    def take(self, rows: list[int]) -> "EvaluationSet":
        """Some of the pictures, in this order, the same one twice if need be."""
        picked = {
            name: [self.__dict__[name][row] for row in rows] for name in ("samples", "subjects", "folds", "groups")
        }
        labels = {task: values[rows] for task, values in self.labels.items()}
        return replace(self, images=self.images.select(rows), labels=labels, **picked)

    def origin(self) -> dict[str, str]:
        """What predictions about this set remember of it."""
        return {"dataset": self.name, "split": self.split, "protocol": self.protocol, "options": self.options}

    def fingerprint(self) -> str:
        """The same for the same pictures, labels and people, and else another."""
        about = [self.name, self.split, self.units, self.samples, self.subjects, self.folds, self.groups]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for labels in self.labels.values():
            digest.update(labels.tobytes())
        for batch in self.images.with_format("arrow").iter(1000):
            (column,) = batch.columns
            files = pc.list_flatten(column) if pa.types.is_list(column.type) else column
            for file in pc.struct_field(files, "bytes").to_pylist():
                digest.update(file)
        return digest.hexdigest()


def spread(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` rows, evenly spread, so that a quick look sees all people.

    >>> spread(10, 4)
    [0, 3, 6, 9]
    """
    return np.linspace(0, count - 1, min(limit or count, count)).astype(int).tolist()


def _thin(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    return rows if limit is None else rows.select(spread(len(rows), limit))


def has_folds(dataset: str, protocol: str) -> bool:
    """Whether everyone is tested, in one of three folds, or there is one test split."""
    return not is_own(dataset) and dataset not in RENDERED and not leaks(dataset, protocol)


def folds_of(dataset: str, protocol: str, fold: int | None = None) -> tuple[int, ...]:
    """The numbers of a set's test folds, of one that is asked for, or 0 where there is one test split.

    >>> folds_of("bp4d", "standard"), folds_of("bp4d", "standard", 2), folds_of("csv", "standard")
    ((1, 2, 3), (2,), (0,))
    """
    if not has_folds(dataset, protocol):
        return (0,)
    return (fold,) if fold else (1, 2, 3)


def is_own(dataset: str) -> bool:
    """Whether someone brought the data set.

    >>> is_own("csv"), is_own("csv:labels"), is_own("bp4d")
    (True, True, False)
    """
    return dataset.partition(":")[0] == OWN


def leaks(dataset: str, protocol: str) -> bool:
    """Whether people are in training and test by a protocol's own words: FEAFA's random frames are of everyone."""
    return (dataset, protocol) == ("feafa", "paper")


def same_people(dataset: str) -> tuple[str, ...]:
    """Under which names of data sets people of this one stand in `trained_on.json` and `held_out.json`.

    >>> same_people("disfa"), same_people("csv:labels")
    (('disfa', 'feafa'), ('own',))
    """
    return _PEOPLE.get(dataset.partition(":")[0], (dataset,))


def whose(options: str) -> set[str]:
    """Those of a set's options that say who is tested in which fold.

    >>> whose("drop_bad_landmarks=True&naming=megraphau")
    {'naming=megraphau'}
    """
    return {option for option in options.split("&") if option.partition("=")[0] in ("naming", "part")}


def protocol_in_words(dataset: str, protocol: str, options: str = "") -> str:
    """What a protocol means, as reports tell it.

    >>> protocol_in_words("feafa", "standard", "part=B").endswith("then over units (asked for with part=B)")
    True
    """
    if is_own(dataset):
        return "one's own pictures; nobody is in both training and test, as far as the csv names who is seen"
    words = PROTOCOLS[dataset, protocol]
    if "naming=megraphau" in options:
        words = words.replace("JAANet's order", "ME-GraphAU's order")
    return f"{words} (asked for with {options})" if options else words


def read_set(
    dataset: str,
    data_dir: str | Path = SAMPLE,
    split: str = "test",
    protocol: str = "standard",
    fold: int | None = None,
    limit: int | None = None,
) -> EvaluationSet:
    """Read what a model is to be scored on.

    Args:
        dataset (`str`): `synthetic`, `synthetic_facs`, `bp4d`, `disfa`, `feafa` or `csv`.
        data_dir: Rendered shards; prepared crops (`python -m au_llava.datasets_scripts.bp4d` and so on), with options
            that say whose pictures they are, as in `data/bp4d?naming=megraphau`; for `csv` the file with the options
            of [`CsvLabels`], as in `labels.csv?task=intensity&crops_dir=data/mine`.
        split (`str`): `test`, `train` or `validation`. All but rendered faces come without a validation split: there
            it is the training pictures of those people whom `train_sft.py --held_out 0.2` leaves out.
        protocol (`str`): `standard` or `paper`; see `PROTOCOLS`.
        fold (`int`, *optional*): 1, 2 or 3; all three by default, where the protocol has folds.
        limit (`int`, *optional*): At most so many pictures of each fold, evenly spread.

    Raises:
        ValueError: There is no such split, or the data set has no such protocol or fold.
        FileNotFoundError: `data_dir` holds no prepared pictures.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; accepted: {', '.join(SPLITS)}.")
    if (dataset, protocol) not in PROTOCOLS and not (is_own(dataset) and protocol == "standard"):
        raise ValueError(f"{dataset} has no protocol {protocol!r}; accepted: standard.")
    single = not has_folds(dataset, protocol)
    if fold is not None and (single or fold not in (1, 2, 3)):
        raise ValueError(f"{dataset} has no fold {fold} under the protocol {protocol}; leave --fold out.")
    if dataset in RENDERED:
        return _read_rendered(dataset, data_dir, split, limit)
    if is_own(dataset):
        return _read_own(str(data_dir), split, limit)
    parts = []
    for number in folds_of(dataset, protocol, fold):
        config = "config_name=paper" if single else f"config_name=fold{number}"
        if dataset == "feafa" and not single:
            config = f"config_name=subject&fold={number}"
        rows = _read_split(_source(dataset, str(data_dir), config), split, limit)
        parts.append(rows.add_column("fold", [number] * len(rows)))
    rows = datasets.concatenate_datasets(parts)
    labels = {QUESTIONS[dataset][-1][0]: np.array(rows["labels"], float)}
    if dataset == "disfa":
        levels = labels["intensity_level"][:, [PRESETS["disfa"].index(code) for code in PRESETS["disfa8"]]]
        present = np.where(np.isnan(levels), np.nan, levels >= _PRESENT_FROM[protocol])
        labels = {"detection": present} | labels
    asked = parse_qsl(str(data_dir).partition("?")[2])
    options = "&".join(
        f"{name}={value}" for name, value in sorted(asked) if value.lower() != _WHICH.get(name, value.lower())
    )
    found = _from_crops(dataset, split, protocol, rows, list(rows["fold"]), _preset_units(dataset), labels)
    return replace(found, options=options)


def _source(dataset: str, place: str, config: str = "") -> Source:
    """Rows of a data set at a place with options.

    Raises:
        ValueError: The options say what the evaluation says itself.
    """
    folder, _, options = place.partition("?")
    settled = {"split"} if is_own(dataset) else {"split", "config_name", "fold", "task", "threshold", "action_units"}
    given = sorted(settled & {name for name, _ in parse_qsl(options)})
    if given:
        raise ValueError(
            f"{place}: --data_dir goes without {', '.join(given)}; --split, --fold and --protocol say what is asked, "
            "and keep people who are trained or calibrated on apart from those who are tested."
        )
    return Source(f"{dataset}:{folder}?{'&'.join(filter(None, (options, config)))}")


def _read_split(source: Source, split: str, limit: int | None) -> datasets.Dataset:
    """A split of a data set that has `train` and `test` alone: `validation` is some of the people of `train`."""
    (rows,) = source.rows("test" if split == "test" else "train")
    if split == "validation":
        _, rows = hold_out(rows, HELD_OUT)
    return _thin(rows, limit)


def _preset_units(dataset: str) -> dict[str, list[str]]:
    return {task: list(PRESETS[preset]) for task, preset in QUESTIONS[dataset]}


def _read_own(source: str, split: str, limit: int | None) -> EvaluationSet:
    """A csv of someone's own, as `datasets_scripts/csv_labels.py` reads it: one task, one test split."""
    rows = _read_split(_source(OWN, source), split, limit)
    (asked,) = rows.select_columns(["task", "action_units"]).select([0])
    # Many a csv is called labels.csv, and one may be asked about by several tasks: a card has a section for each.
    file, task = Path(source.partition("?")[0]).resolve(), asked["task"]
    name, labels = f"{OWN}:{file.parent.name}/{file.stem}", {task: np.array(rows["labels"], float)}
    found = _from_crops(name, split, "standard", rows, [0] * len(rows), {task: asked["action_units"]}, labels)
    return replace(found, options=f"task={task}")


def _from_crops(
    name: str,
    split: str,
    protocol: str,
    rows: datasets.Dataset,
    folds: list[int],
    units: dict[str, list[str]],
    labels: dict[str, np.ndarray],
) -> EvaluationSet:
    """Rows of prepared crops, in the columns of `instructions.FEATURES`."""
    return EvaluationSet(
        name=name,
        split=split,
        protocol=protocol,
        images=rows.select_columns(["images"]),
        samples=[f"{sequence}/{frame}" for sequence, frame in zip(rows["sequence"], rows["frame"], strict=True)],
        subjects=list(rows["subject"]),
        folds=folds,
        units=units,
        labels=labels,
        groups=[{} for _ in folds],
    )


def _read_rendered(dataset: str, data_dir: str | Path, split: str, limit: int | None) -> EvaluationSet:
    """The rendered faces, as `datasets_scripts/synthetic_faces/writer.py` wrote them."""
    files = sorted(Path(data_dir).glob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"No shards {split}-*.parquet in {data_dir}; render them with "
            f"python -m au_llava.datasets_scripts.synthetic_faces --output_dir DIR, and give --data_dir DIR."
        )
    check_whole(files)
    rows = _thin(datasets.Dataset.from_parquet([str(file) for file in files]), limit)

    def labels(task: str, preset: str) -> np.ndarray:
        if preset == "feafa":
            return np.array(rows["feafa"], float).round(4)
        column = {"detection": "occurrences", "intensity_level": "levels", "intensity": "facs"}[task]
        return np.array(rows[column], float).round(4)[:, [FACS_CODES.index(code) for code in PRESETS[preset]]]

    return EvaluationSet(
        name=dataset,
        split=split,
        protocol="standard",
        images=rows.select_columns(["image"]),
        samples=[f"{identity}/{index}" for identity, index in zip(rows["identity"], rows["index"], strict=True)],
        subjects=list(rows["identity"]),
        folds=[0] * len(rows),
        units=_preset_units(dataset),
        labels={task: labels(task, preset) for task, preset in QUESTIONS[dataset]},
        groups=list(rows.select_columns(["skin", "gender", "age"])),
    )
